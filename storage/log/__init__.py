"""The Delta log of a table: commits and checkpoints, and what they say about each version."""
