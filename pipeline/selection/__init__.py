"""What is kept of a distribution: an exact head and an unbiased sampled tail."""
