"""The training loop: what is minimised, how steps and checkpoints go, and several processes."""
