"""Where a table's files are: in a local folder or in a bucket."""
