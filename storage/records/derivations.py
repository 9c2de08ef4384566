"""Which tables were made from a table: a record beside the table that was read, since only the other one names it.

TABLE/_softlabel/derived/<hash>.json      the hash is of the new table's location
"""

import warnings
from dataclasses import dataclass

from softlabel.storage.errors import TableError
from softlabel.storage.identity import user
from softlabel.storage.places.place import hash_of
from softlabel.storage.records.store import Record, RecordStore, now


@dataclass(frozen=True)
class Derived(Record):
    """A table that was made from another one, or got rows of it."""

    table: str
    """Its absolute path or URL."""
    version: int
    """Version of the other table that was read last."""
    operation: str
    """What was done with the rows, as in the new table's history."""


DERIVED = RecordStore("derived", Derived)


def derived(table: str) -> list[Derived]:
    """The tables that were made from a table, ordered by the version that was read."""
    return sorted(DERIVED.all(table), key=lambda made: (made.version, made.table))


def record_derived(source: str, version: int, target: str, operation: str) -> None:
    """Record beside a table that another was made from it; only warn if the table is read-only.

    Args:
        source: location of the table that was read.
        version: its version.
        target: address of the table that was made.
        operation: what was done with the rows.
    """
    try:
        DERIVED.write(
            source, hash_of(target.encode()), Derived(now(), user(), target, version, operation), replace=True
        )
    except TableError as error:
        warnings.warn(
            f"{error}\nsoftlabel lineage {source} will not show that {target} was made from it.", stacklevel=2
        )
