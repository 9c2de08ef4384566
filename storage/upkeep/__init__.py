"""What keeps a table sound for years: log replay, verification, rewriting, take-downs, deletion, inspection."""
