"""Model files: finding, hashing, loading and pruning them. Nothing here captures or trains."""
