"""The two demonstrations on real models and real text that the Makefile runs."""
