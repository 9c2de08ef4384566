"""Find the files that a documents path names, on this machine or in an S3 bucket; readers treat both alike.

Buckets are configured like those of tables, see ``storage.places.bucket``.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa

from softlabel.storage.errors import DocumentsError, TableError, UsageError
from softlabel.storage.location import located


class File(NamedTuple):
    """A file that may contain documents."""

    name: str
    """Path below the folder or below the fixed part of the glob, with slashes."""
    address: str
    """Path or URL."""
    open: Callable[[], pa.NativeFile]
    """Opens the file for random or sequential reading."""

    @property
    def suffixes(self) -> list[str]:
        """Like ``Path.suffixes``, in lower case."""
        return PurePosixPath(self.name.lower()).suffixes


class Found(NamedTuple):
    """The files that a path names, sorted by name."""

    files: list[File]
    is_folder: bool
    """Whether the path is a folder; then hidden files (whose names start with . or _) are left out."""


def find_files(path: str) -> Found:
    """The files that a path names: a file, a folder or a glob, or s3://BUCKET/ followed by one of these.

    Raises:
        UsageError: if there is nothing there, or the path contains credentials.
        DocumentsError: if the bucket can't be read.
    """
    path = located(path)
    scheme, is_url, rest = path.partition("://")
    if is_url and (scheme != "s3" or rest.startswith("/") or not rest):
        raise UsageError(
            "softlabel can't read documents from this kind of address",
            expected="a path on this machine, or s3://BUCKET/PATH",
            found=path,
            do="copy the documents to this machine or to an S3 bucket",
        )
    with bucket_errors():
        found = _in_bucket(*rest.partition("/")[::2]) if is_url else _on_disk(path)
    if not found.files and not found.is_folder:
        raise UsageError(
            "there are no documents at this path",
            expected="a file, a folder or a glob",
            found="nothing there",
            where=path,
            do="check the path; put a glob in quotes, so that the shell does not expand it",
        )
    files = [file for file in found.files if not found.is_folder or _is_visible(file.name)]
    return found._replace(files=sorted(files, key=lambda file: file.name.split("/")))


@contextmanager
def bucket_errors() -> Iterator[None]:
    """Turn the errors of a bucket into errors about documents.

    Raises:
        DocumentsError: if the bucket can't be read.
    """
    try:
        yield
    except TableError as error:
        raise DocumentsError(str(error)) from None


def _on_disk(path: str) -> Found:
    root = Path(path)
    if is_folder := root.is_dir():
        paths = list(root.rglob("*"))
    elif root.is_file():
        root, paths = root.parent, [root]
    else:
        root = Path(*_fixed(root.parts))
        pattern = Path(path).relative_to(root).as_posix()
        paths = list(root.glob(pattern)) if pattern != "." else []
    found = [path for path in paths if path.is_file()]
    # As bytes, because a file name need not be valid UTF-8.
    files = [File(p.relative_to(root).as_posix(), str(p), partial(pa.OSFile, os.fsencode(p))) for p in found]
    return Found(files, is_folder)


def _in_bucket(name: str, key: str) -> Found:
    from softlabel.storage.places.bucket import (
        Bucket,
    )  # imported here, so that its library loads only when there is a bucket

    bucket, key = Bucket(f"s3://{name}"), key.strip("/")

    def file(key: str, name: str) -> File:
        return File(name, bucket.where(key), lambda: pa.PythonFile(bucket.open(key)[0], "r"))

    def below(root: str) -> list[File]:
        lead = f"{root}/" if root else ""
        # A folder may be an object itself.
        return [file(o.name, o.name.removeprefix(lead)) for o in bucket.files(root) if o.name != root]

    with suppress(FileNotFoundError):
        if key:
            bucket.stat(key)
            return Found([file(key, PurePosixPath(key).name)], is_folder=False)
    if folder := below(key):
        return Found(folder, is_folder=True)
    parts = PurePosixPath(key).parts
    root = _fixed(parts)
    pattern = parts[len(root) :]
    files = [file for file in below("/".join(root)) if _matches(tuple(file.name.split("/")), pattern)]
    return Found(files if pattern else [], is_folder=False)


def _fixed(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of a path before the first part that is a pattern."""
    return tuple(takewhile(lambda part: not set(part) & set("*?["), parts))


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether ``Path.glob`` would find this path."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _is_visible(name: str) -> bool:
    return not any(part.startswith((".", "_")) for part in name.split("/"))
