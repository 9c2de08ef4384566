"""Turns a table into a student's batches: order of an epoch, packing, and held-out sequences."""
