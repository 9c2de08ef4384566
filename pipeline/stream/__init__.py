"""From a table to a student's batches: the order of an epoch, packing, and the held-out rows."""
