"""The verbs of those who look after a table: verify, reprocess, maintain, mix, inspect, history."""
