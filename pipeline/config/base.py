"""Base class of all settings.

The same frozen models define the Python arguments, the YAML file, the command line's flags and the Prefect form; the
docstring of a field is its help text in all of them.

A setting is *given* if a flag, a file, a form or a Python call sets it, even to its default value. Settings remember
this, also as JSON: only a setting that is left out may be taken from a table or a student that exists already.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    model_serializer,
)
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
        """The schema for Prefect's form: each setting has its ``position`` there, since PostgreSQL sorts the names.

        A default stands in the description alone. The form would fill it in, and so give what is to be left out.
        """
        schema = handler(core)
        for position, setting in enumerate(handler.resolve_ref_schema(schema).get("properties", {}).values()):
            setting["position"] = position
            default = setting.pop("default", None)
            if default not in (None, {}, []):
                shown = " ".join(map(str, default)) if isinstance(default, list) else default
                setting["description"] = f"{setting.get('description', '')} Default: {shown}.".lstrip()
        return schema

    @model_serializer(mode="wrap")
    def _only_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Prefect, a file or another process gets what was given, so that reading it back gives the same settings."""
        return {name: value for name, value in serialize(self).items() if name in self.model_fields_set}

    def completed(self) -> Self:
        """The same settings with every default filled in, as if all of them were given; for records.

        Raises:
            ValidationError: if a given setting contradicts a default.
        """
        values = {name: value.completed() if isinstance(value, Settings) else value for name, value in self}
        return type(self).model_validate(values)

    def taking(self, values: Mapping[str, Any]) -> Self:
        """The same settings, with these values for those that are left out."""
        return self.model_copy(update={name: values[name] for name in values if not self.gives(name)})

    def gives(self, *names: str) -> bool:
        """Whether all of these settings are given."""
        return self.model_fields_set.issuperset(names)


def summary(invalid: ValidationError) -> str:
    """The first error of invalid settings, with the name of the setting or section."""
    error = invalid.errors()[0]
    name = ".".join(map(str, error["loc"])) or "settings"
    return f"invalid {name}: {error['msg'].removeprefix('Value error, ')}"


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
