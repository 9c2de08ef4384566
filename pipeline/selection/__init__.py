"""Select what is stored of a distribution: an exact head and an unbiased sampled tail."""
