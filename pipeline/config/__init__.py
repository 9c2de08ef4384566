"""Every setting, once, as frozen pydantic models, shared by the command line, YAML files, Prefect and Python."""
