"""Documents as they lie on a disk or in a bucket: finding, reading and checking them."""
