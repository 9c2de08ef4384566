"""The training loop: objective, steps, checkpoints and several processes."""
