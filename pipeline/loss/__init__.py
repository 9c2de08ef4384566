"""Divergences from sparse targets, with gradients, without a tensor of positions x vocabulary."""
