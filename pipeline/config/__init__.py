"""All settings, each defined once as a frozen pydantic model for the command line, YAML, Prefect and Python."""
