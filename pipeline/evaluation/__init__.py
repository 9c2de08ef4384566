"""Compare students with their teacher from the table alone, and write the report."""
