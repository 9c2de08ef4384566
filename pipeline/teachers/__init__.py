"""Teachers: load them and run sequences through them."""
