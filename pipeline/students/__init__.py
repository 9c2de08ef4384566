"""What a student is made from, whether it fits its table, and the folder that it ends in."""
