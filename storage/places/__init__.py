"""Where a table's files lie: a folder of this machine, or a bucket."""
