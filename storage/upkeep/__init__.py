"""Maintenance of tables: log replay, verification, rewriting, take-downs, deletion of unused files, inspection."""
