"""Find, read and check documents on a disk or in a bucket."""
