"""Teachers: what turns sequences into logits, and how one is loaded."""
