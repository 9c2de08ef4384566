"""The commands that check and change tables: verify, reprocess, maintain, mix, inspect, history."""
