"""Records beside a table that belong to no version: tags, pins, deleted versions, take-downs, derived tables."""
