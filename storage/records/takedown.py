"""Records of documents that were taken down, so that they are never added again, and of what was deleted with them.

    TABLE/_softlabel/purged/<hash>.json

A record is first a refuse list: every writer leaves out its documents. Once the newest version no longer contains
them, the record also lists the shards of old versions that are then deleted, and the versions that need these shards.
Documents are named only by hashes of their ids. ``storage.upkeep.purge`` performs the take-down.
"""

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from softlabel.storage.errors import PurgedError
from softlabel.storage.identity import user
from softlabel.storage.places.place import hash_of
from softlabel.storage.records.store import Record, RecordStore, now


@dataclass(frozen=True)
class Purge(Record):
    """One take-down."""

    documents: list[str]
    """Hash of each document's id."""
    version: int | None
    """The first version without these documents; None until there is one."""
    shards: list[str]
    """Shards that were deleted."""
    versions: list[int]
    """Versions that need a deleted shard, and so can no longer be opened."""

    def is_of(self, documents: Iterable[str]) -> bool:
        """Whether it took exactly these documents down."""
        return self.documents == sorted(map(_hash, documents))


PURGES = RecordStore("purged", Purge)


def purges(table: str) -> list[Purge]:
    """All take-downs, oldest first."""
    return sorted(PURGES.all(table), key=lambda purge: (purge.time, purge.version or 0))


def refusal(table: str) -> Callable[[str], bool]:
    """A function that tells whether the document with a given id was taken down."""
    refused = {name for purge in PURGES.all(table) for name in purge.documents}
    return (lambda document: _hash(document) in refused) if refused else (lambda document: False)


def refuse(table: str, documents: Iterable[str]) -> Purge:
    """Record that documents are taken down; from now on no writer adds their rows. Repeating this changes nothing."""
    hashes = sorted(map(_hash, documents))
    name = _name(hashes)
    with suppress(FileExistsError):
        PURGES.write(table, name, Purge(now(), user(), hashes, None, [], []), replace=False)
    return next(purge for purge in PURGES.all(table) if _name(purge.documents) == name)


def record_deletion(table: str, purge: Purge, version: int, shards: Iterable[str], versions: Iterable[int]) -> Purge:
    """Add the shards and versions that a take-down is about to delete to its record."""
    buried = replace(
        purge,
        version=purge.version if purge.version is not None else version,
        shards=sorted({*purge.shards, *shards}),
        versions=sorted({*purge.versions, *versions}),
    )
    PURGES.write(table, _name(purge.documents), buried, replace=True)
    return buried


def carry_over(source: str, target: str) -> None:
    """Copy the refuse lists of one table to another."""
    for purge in PURGES.all(source):
        with suppress(FileExistsError):
            copy = replace(purge, version=0, shards=[], versions=[])
            PURGES.write(target, _name(purge.documents), copy, replace=False)


def purged_versions(table: str) -> dict[int, Purge]:
    """Versions that can no longer be opened, each with the take-down that removed it."""
    return {version: purge for purge in purges(table) for version in purge.versions}


def tombstone(table: str, shard: str) -> PurgedError | None:
    """The error for a missing shard; None if no take-down deleted it."""
    found = [purge for purge in purges(table) if shard in purge.shards]
    return purged_error(table, found[0]) if found else None


def purged_error(table: str, purge: Purge) -> PurgedError:
    """The error for a version that a take-down removed."""
    return PurgedError(
        "this version can no longer be opened: it contained documents that were taken down "
        f"({len(purge.documents):,} in all, on {purge.time}, by {purge.user})",
        expected=f"version {purge.version} or a newer one",
        found="the shards that contained them are deleted",
        where=table,
        do=f"use {table}, the newest version; students that were trained on an older one have seen these documents",
    )


def _hash(document: str) -> str:
    return hashlib.blake2b(document.encode(), digest_size=16, person=b"softlabel purged").hexdigest()


def _name(documents: list[str]) -> str:
    return hash_of("\n".join(documents).encode())
