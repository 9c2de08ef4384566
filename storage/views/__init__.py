"""Several tables read as one."""
