"""Find, hash, load and prune models. Nothing here captures or trains."""
