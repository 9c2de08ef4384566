"""The interface to the place of a table's files, a local folder or a bucket; the rest of storage uses only this.

Names of files are relative to the table, with slashes. In every place, files are written atomically, and of several
processes that write a file with ``replace=False`` at the same time, one succeeds. Knows nothing about tables.
"""

import errno
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol

from softlabel.storage.errors import AccessError

SIDE_FOLDER = "_softlabel"
"""Folder next to the shards; Delta's own vacuum skips folders whose name starts with an underscore."""

REJECTS = f"{SIDE_FOLDER}/rejects.jsonl"
"""List of the documents that the newest capture rejected."""
WRITING = f"{SIDE_FOLDER}/writing"
"""Folder of unfinished shards, if they are written in the table's own folder."""


LARGEST_FILE = 1 << 31
"""Bytes of a file that is read as a whole; a larger one is refused."""


@dataclass(frozen=True)
class File:
    """Properties of a file, without its content."""

    name: str
    """Relative to the table."""
    bytes: int
    changed: int
    """Time of the last change of content or name, in nanoseconds, by the clock of its place."""


class PendingFile(Protocol):
    """A finished file without its final name."""

    def publish(self, name: str) -> None:
        """Give the file its final name, durably; if it has the name already, make sure that the file still exists.

        Raises:
            OSError: if it can't be written.
        """
        ...

    def discard(self) -> None:
        """Release the file, and delete it if it has no final name yet."""
        ...


class Draft(PendingFile, Protocol):
    """A file that is being written; locked, if its place has locks, while its writer is alive."""

    file: BinaryIO
    """Open for writing and reading."""


class Place(Protocol):
    """A folder of files.

    Methods raise ``FileNotFoundError`` for a missing file, ``AccessError`` if the place can't be read, and either
    ``AccessError`` or ``OSError`` if it can't be written. Something other than a regular file, such as a pipe, a device
    or a link, is never opened: reading it is an ``OSError``.
    """

    address: str
    """Absolute path or URL; the same for the same place, however its location is written."""
    sees_writers: bool
    """Whether ``gate`` and ``is_written`` can detect other processes that write."""
    is_remote: bool
    """Whether each read is a network request, so that few large reads are better."""

    def where(self, name: str) -> str:
        """Path or URL of a file, for messages."""
        ...

    def exists(self) -> bool:
        """Whether the folder exists."""
        ...

    def files(self, folder: str = "", after: str = "") -> Iterator[File]:
        """Every file in a folder and its subfolders whose name comes after a given one, in no particular order.

        There are none if there is no such folder.
        """
        ...

    def stat(self, name: str) -> File:
        """Properties of a file."""
        ...

    def read(self, name: str, limit: int = LARGEST_FILE) -> bytes:
        """The content of a small file.

        Raises:
            OSError: if it has more bytes than ``limit``, or is not a regular file.
        """
        ...

    def open(self, name: str) -> tuple[Any, File]:
        """A file for random access by pyarrow, and its properties."""
        ...

    def fetch(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to read from beginning to end, and then again if necessary."""
        ...

    def fetch_folder(self, name: str) -> Path:
        """A local folder with the small files of a folder; it exists at least as long as this process."""
        ...

    def write(self, name: str, content: bytes, *, replace: bool = True) -> None:
        """Write a small file.

        Raises:
            FileExistsError: if it exists and ``replace`` is false; of several writers at once, one succeeds.
            OSError: if it can't be written; then nothing is left behind.
        """
        ...

    def write_folder(self, source: Path, name: str) -> None:
        """Copy a local folder of small files. Other processes may copy the same files at the same time."""
        ...

    def draft(self) -> Draft:
        """A new, empty file to write a shard to."""
        ...

    def pending(self, name: str) -> PendingFile:
        """A finished file that has only a temporary name."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file, or a folder and everything in it; does nothing if it is missing."""
        ...

    def gate(self, *, exclusive: bool = False) -> AbstractContextManager[int]:
        """A lock between writers and maintenance.

        Writers share it while they publish and commit files; maintenance holds it exclusively while it deletes files.
        In a place without locks it does nothing, and writers are protected by a grace period.

        Returns:
            The time by the clock of the place, in nanoseconds, if ``exclusive``; else 0.
        """
        ...

    def is_written(self, name: str) -> bool | None:
        """Whether the writer of a file in the writing folder is alive; None if that is unknown."""
        ...


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Distinguish what can't be read at the moment from what is missing or damaged.

    Errors of the operating system have an error number: no permission, too many open files, a failing disk or network.
    These become an ``AccessError``. A Parquet reader's errors about content have none; they pass through, as does the
    error for a missing file or a folder in its place. A file whose name is too long to exist is a missing file.

    Args:
        where: path or URL of what is read, for the message.

    Raises:
        AccessError: if the operating system refuses, or memory runs out.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from error
        raise inaccessible(where, str(error) or "not enough memory") from error


def inaccessible(where: str, found: str) -> AccessError:
    """The error for something that can't be read at the moment."""
    return AccessError(
        "this can't be read at the moment, so it is not known whether it is damaged",
        expected="read permission, free memory, fewer open files than the limit (ulimit -n), a working disk or network",
        found=found,
        where=where,
        do="fix the cause, then run the same command again",
    )


def require_small(name: str, size: int, limit: int) -> None:
    """Refuse to read a file that is too large to be what its name says.

    Raises:
        OSError: if it is; without an error number, because its place works.
    """
    if size > limit:
        raise OSError(f"{name} has {size:,} bytes, more than the {limit:,} that such a file may have")


def hash_of(content: bytes) -> str:
    """128-bit BLAKE2b, as 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def hash_in_name(name: str) -> str:
    """The content hash with which the name of a shard ends, before its suffix."""
    return PurePath(name).stem.rpartition("-")[2]


def content_hash(file: BinaryIO) -> str:
    """``hash_of`` a file's bytes, which need not fit into memory."""
    digest = hashlib.blake2b(digest_size=16)
    file.seek(0)
    for part in iter(lambda: file.read(1 << 20), b""):
        digest.update(part)
    return digest.hexdigest()
