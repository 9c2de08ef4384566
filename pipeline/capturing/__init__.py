"""Run a teacher over the sequences that a table lacks: the plan, the shards, the copies, the worker processes."""
