"""JSON objects that hold a hash of what else they say, so that a damaged one is not taken for another."""

import json
from collections.abc import Mapping
from typing import Any

from softlabel.storage.places.place import hash_of


def seal(says: Mapping[str, Any]) -> bytes:
    """A file's content that says this."""
    return json.dumps({**says, "hash": _hash(says)}, indent=2).encode()


def unseal(content: bytes) -> dict[str, Any]:
    """What a file's content says.

    Raises:
        ValueError: if it is not what was sealed.
    """
    try:
        says: dict[str, Any] = json.loads(content)
        if says.pop("hash") == _hash(says):
            return says
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("not a JSON object with a hash") from error
    raise ValueError("the content does not match its hash")


def _hash(says: Mapping[str, Any]) -> str:
    return hash_of(json.dumps(says, sort_keys=True).encode())
