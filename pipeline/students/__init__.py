"""Students: what they are made from, whether they fit their table, and the folder that they are written to."""
