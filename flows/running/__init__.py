"""What surrounds the run of a flow: the server, log lines, progress, events, retries and outages."""
