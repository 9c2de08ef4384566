"""What every group of settings is.

The same frozen models are the Python arguments, the YAML file, the flags of the command line and the Prefect form;
a field's docstring is its help everywhere.
"""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, WithJsonSchema

from softlabel.storage.credentials import WITHOUT_CREDENTIALS
from softlabel.storage.errors import UsageError
from softlabel.storage.location import located


class Settings(BaseModel):
    """A frozen group of settings; a name that it does not know is an error."""

    # What is refused may be a location with credentials in it, or stand beside one: pydantic would show it.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


def _located(location: str) -> str:
    try:
        return located(location)
    except UsageError as error:
        raise ValueError(str(error)) from None


Location = Annotated[
    str,
    AfterValidator(_located),
    WithJsonSchema({"type": "string", "pattern": WITHOUT_CREDENTIALS}),  # Prefect's server goes by that, before we do
]
"""The type of every setting that names a file, a folder, a bucket or a hub model: ``~`` is expanded, credentials are
refused."""
