"""What every group of settings is.

The same frozen models are the Python arguments, the YAML file, the flags of the command line and the Prefect form;
a field's docstring is its help everywhere.
"""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen group of settings; a name that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
