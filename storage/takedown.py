"""Documents that were taken down: which, so that nothing brings them back; and what went with them.

    TABLE/_softlabel/purged/<hash>.json

Such a record is first a refuse list: whoever adds rows leaves its documents out. When their rows are gone from the
newest version it becomes a tombstone too, for the shards of old versions that are deleted then. Documents are named by
hashes. ``storage.upkeep.purge`` is what takes them down.
"""

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from softlabel.storage.errors import PurgedError
from softlabel.storage.identity import user
from softlabel.storage.places.place import hash_of
from softlabel.storage.records import Record, Records, now


@dataclass(frozen=True)
class Purge(Record):
    """One take-down."""

    documents: list[str]
    """Hash of each document's id."""
    version: int | None
    """The first that is without them; None as long as there is none."""
    shards: list[str]
    """Files that were deleted."""
    versions: list[int]
    """Those that need such a file, and can no longer be opened."""


PURGES = Records("purged", Purge)


def purges(table: str) -> list[Purge]:
    """All take-downs, the oldest first."""
    return sorted(PURGES.all(table), key=lambda purge: (purge.time, purge.version or 0))


def refusal(table: str) -> Callable[[str], bool]:
    """A function that says of a document's id whether it was taken down."""
    refused = {name for purge in PURGES.all(table) for name in purge.documents}
    return (lambda document: _hash(document) in refused) if refused else (lambda document: False)


def refuse(table: str, documents: Iterable[str]) -> Purge:
    """Write down that documents are taken down; from now on nobody adds a row of them. Twice the same is once."""
    hashes = sorted(map(_hash, documents))
    name = _name(hashes)
    with suppress(FileExistsError):
        PURGES.write(table, name, Purge(now(), user(), hashes, None, [], []), replace=False)
    return next(purge for purge in PURGES.all(table) if _name(purge.documents) == name)


def bury(table: str, purge: Purge, version: int, shards: Iterable[str], versions: Iterable[int]) -> Purge:
    """Write down what goes with documents, before it goes; what went before with the same ones stays written down."""
    buried = replace(
        purge,
        version=purge.version if purge.version is not None else version,
        shards=sorted({*purge.shards, *shards}),
        versions=sorted({*purge.versions, *versions}),
    )
    PURGES.write(table, _name(purge.documents), buried, replace=True)
    return buried


def carry_over(source: str, target: str) -> None:
    """Let a table refuse what another one does."""
    for purge in PURGES.all(source):
        with suppress(FileExistsError):
            copy = replace(purge, version=0, shards=[], versions=[])
            PURGES.write(target, _name(purge.documents), copy, replace=False)


def lost(table: str) -> dict[int, Purge]:
    """Versions that can no longer be opened, and why."""
    return {version: purge for purge in purges(table) for version in purge.versions}


def tombstone(table: str, shard: str) -> PurgedError | None:
    """What to tell who looks for a shard that is not there; None if no take-down took it."""
    found = [purge for purge in purges(table) if shard in purge.shards]
    return explain(table, found[0]) if found else None


def explain(table: str, purge: Purge) -> PurgedError:
    """What to tell who looks for what a take-down took."""
    return PurgedError(
        f"documents in this version were taken down: {len(purge.documents):,}, on {purge.time}, by {purge.user}",
        expected=f"version {purge.version} or a newer one, which do not contain these documents",
        found="the shards that contained them are deleted",
        where=table,
        do=f"use {table}, the newest version; students that were trained on an older one have seen these documents",
    )


def _hash(document: str) -> str:
    return hashlib.blake2b(document.encode(), digest_size=16, person=b"softlabel purged").hexdigest()


def _name(documents: list[str]) -> str:
    return hash_of("\n".join(documents).encode())
