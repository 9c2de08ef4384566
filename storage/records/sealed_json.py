"""JSON objects with a hash of their other fields, so that a damaged one is recognized."""

import json
from collections.abc import Mapping
from typing import Any

from softlabel.storage.places.place import hash_of


def seal(fields: Mapping[str, Any]) -> bytes:
    """The content of a file with these fields and their hash."""
    return json.dumps({**fields, "hash": _hash(fields)}, indent=2).encode()


def unseal(content: bytes) -> dict[str, Any]:
    """The fields of a file's content, without the hash.

    Raises:
        ValueError: if the fields do not match the hash.
    """
    try:
        fields: dict[str, Any] = json.loads(content)
        if fields.pop("hash") == _hash(fields):
            return fields
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("not a JSON object with a hash") from error
    raise ValueError("the content does not match its hash")


def _hash(fields: Mapping[str, Any]) -> str:
    return hash_of(json.dumps(fields, sort_keys=True).encode())
