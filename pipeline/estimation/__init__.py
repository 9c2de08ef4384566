"""What a capture would give, cost and take, from a small sample."""
