"""Run a teacher over what a table lacks: the plan, the shards, the copies, the worker processes."""
