"""Estimate the size, time and cost of a capture from a small sample."""
