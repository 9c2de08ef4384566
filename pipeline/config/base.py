"""Base class of all settings.

The same frozen models define the Python arguments, the YAML file, the command line's flags and the Prefect form; the
docstring of a field is its help text in all of them.
"""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, GetJsonSchemaHandler, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from softlabel.storage.credentials import WITHOUT_CREDENTIALS
from softlabel.storage.errors import UsageError
from softlabel.storage.location import located


class Settings(BaseModel):
    """A frozen group of settings; an unknown name is an error."""

    # Pydantic would show the refused input, which may contain credentials.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
        model_title_generator=lambda model: model.__name__.removesuffix("Config"),
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema with each setting's ``position``, by which Prefect orders its form; PostgreSQL sorts the names."""
        schema = handler(core)
        for position, setting in enumerate(handler.resolve_ref_schema(schema).get("properties", {}).values()):
            setting["position"] = position
        return schema


def _located(location: str) -> str:
    try:
        return located(location)
    except UsageError as error:
        raise ValueError(str(error)) from None


Location = Annotated[
    str,
    AfterValidator(_located),
    WithJsonSchema({"type": "string", "pattern": WITHOUT_CREDENTIALS}),  # Prefect's server checks this before we can
]
"""Type of every setting that names a file, a folder, a bucket or a hub model: expands ``~`` and refuses credentials."""

Locations = Location | tuple[Location, ...]
"""One location or several."""
