"""Where a table's files lie: a folder of this machine, or a bucket; all that the rest of storage knows of either.

Files have names relative to the table, with slashes. Whatever the place, a file is there whole or not at all, and one
that is written with ``replace=False`` has one writer of several at once. Never knows what a table is.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from softlabel.storage.errors import AccessError

SIDE_FOLDER = "_softlabel"
"""Beside the shards; Delta's vacuum spares folders whose name starts with an underscore."""

REJECTS = f"{SIDE_FOLDER}/rejects.jsonl"
"""What the newest capture could not use, by document."""
WRITING = f"{SIDE_FOLDER}/writing"
"""Folder of shards in the making, where they are made in the table's own place."""


@dataclass(frozen=True)
class File:
    """What a place says of a file without a look into it."""

    name: str
    """Relative to the table."""
    bytes: int
    changed: int
    """When it got there or was last changed, in nanoseconds, by the clock of its place."""


class Unnamed(Protocol):
    """A finished file that lacks its final name."""

    def publish(self, name: str) -> None:
        """Give it that name, durably; if it has been given already, see that the file is there still.

        Raises:
            OSError: if it can't be written.
        """
        ...

    def discard(self) -> None:
        """Let go of it; if it has no final name by now, it is deleted."""
        ...


class Draft(Unnamed, Protocol):
    """A file in the making; marked, where its place has marks, as being written by a living process."""

    file: BinaryIO
    """To be written, and to be read again at any time."""


class Place(Protocol):
    """A folder of files.

    Methods raise ``FileNotFoundError`` for a file that is not there, an ``AccessError`` if the place can't be read, and
    that or an ``OSError`` if it can't be written.
    """

    address: str
    """Absolute, and the same for the same place however it was written."""
    sees_writers: bool
    """Whether ``gate`` and ``is_written`` tell of others that are at work."""
    is_remote: bool
    """Whether each read is a request, so that fewer and larger ones are better."""

    def where(self, name: str) -> str:
        """What to call a file in front of people."""
        ...

    def exists(self) -> bool:
        """Whether the folder is there."""
        ...

    def files(self, folder: str = "") -> Iterator[File]:
        """Every file in a folder and below it, in no order; none if there is no such folder."""
        ...

    def stat(self, name: str) -> File:
        """What is known of one file."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        ...

    def open(self, name: str) -> tuple[Any, File]:
        """A file for pyarrow, to be read here and there, in requests no smaller than pyarrow's; and what it is."""
        ...

    def fetch(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to be read from its beginning to its end, and then again where need be."""
        ...

    def fetch_folder(self, name: str) -> Path:
        """A folder of small files, on this machine for as long as this process lives."""
        ...

    def write(self, name: str, content: bytes, *, replace: bool = True) -> None:
        """Write a small file.

        Raises:
            FileExistsError: if it must not be replaced and is there; of several at once, one succeeds.
            OSError: if it can't be written; then nothing is left behind.
        """
        ...

    def write_folder(self, source: Path, name: str) -> None:
        """Copy a folder of small files from this machine. Others may do the same at once, with the same files."""
        ...

    def settle(self, name: str) -> None:
        """See that a file which others have written survives a power cut."""
        ...

    def draft(self) -> Draft:
        """A new file, empty, for a shard to be made in."""
        ...

    def waiting(self, name: str) -> Unnamed:
        """A file that has a name for the time being."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing happens if it is not there."""
        ...

    def gate(self, *, alone: bool = False) -> AbstractContextManager[int]:
        """Writers hold this together while their files are neither theirs alone nor the table's; maintenance, alone.

        Where a place has no locks everybody walks through, and a grace period is what protects a writer.

        Returns:
            The time by the clock of the place, in nanoseconds, if ``alone``; else 0.
        """
        ...

    def is_written(self, name: str) -> bool | None:
        """Whether whoever makes a file in the writing folder is alive; None if that can't be told from here."""
        ...


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Tell what can't be read here and now from what is missing or damaged.

    What the system itself refuses has a number: no permission, too many open files, a disk or a network that fails.
    What a Parquet reader has to say about bytes has none, and is for others to judge; so is a file that is missing,
    or has a folder in its place.

    Args:
        where: what is read, as people call it.

    Raises:
        AccessError: naming it.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        raise inaccessible(where, str(error) or "not enough memory") from error


def inaccessible(where: str, found: str) -> AccessError:
    """The error that says so."""
    return AccessError(
        "this can't be read at the moment, so it is not known whether it is damaged",
        expected="read permission, free memory, fewer open files than the limit (ulimit -n), a working disk or network",
        found=found,
        where=where,
        do="fix the cause, then run the same command again",
    )


def hash_of(content: bytes) -> str:
    """128-bit BLAKE2b, as 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def content_hash(file: BinaryIO) -> str:
    """``hash_of`` a file's bytes, which need not fit into memory."""
    digest = hashlib.blake2b(digest_size=16)
    file.seek(0)
    for part in iter(lambda: file.read(1 << 20), b""):
        digest.update(part)
    return digest.hexdigest()
