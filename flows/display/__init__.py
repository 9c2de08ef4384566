"""What people read in the terminal when a verb is done."""
