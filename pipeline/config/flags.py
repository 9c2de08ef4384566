"""Settings as flags of the command line: for errors that say what to give, and for output that can be copied."""

import shlex
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel


def flag_of(name: str) -> str:
    """The flag of a setting: ``selection.top_p`` is ``--selection.top-p``."""
    return f"--{name}".replace("_", "-")


def as_flag(name: str, value: Any) -> str:
    """A setting as it is given on the command line, quoted for a shell; None, or no value, is "left out"."""
    if value is None or value == () or value == []:
        return f"{flag_of(name)} left out"
    if isinstance(value, bool):
        section, _, setting = name.rpartition(".")
        return flag_of(name if value else f"{section}.no-{setting}")
    values = [_text(each) for each in (value if isinstance(value, tuple | list) else (value,))]
    if any(text.startswith("-") for text in values):  # only after a = is it no flag of its own
        return " ".join(f"{flag_of(name)}={_quoted(text)}" for text in values)
    return " ".join([flag_of(name), *map(_quoted, values)])


def flags_of(settings: BaseModel, section: str = "") -> Iterator[str]:
    """Each setting that is not its default, as it is given on the command line; those that have none are left out."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from flags_of(value, f"{section}{name}.")
        elif not field.is_required() and value is not None and value != field.get_default(call_default_factory=True):
            yield as_flag(f"{section}{name}", value)


def shown(value: Any) -> str:
    """A setting's value in an error."""
    return " ".join(map(_text, value)) or "none" if isinstance(value, tuple) else _text(value)


def _text(value: Any) -> str:
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else str(value)


def _quoted(text: str) -> str:
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(each if each.isprintable() else _escaped(each) for each in escaped)}'"


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
