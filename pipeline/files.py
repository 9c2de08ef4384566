"""Which files of documents a path means, on a disk of this machine or in a bucket of S3; readers see both alike.

A bucket is configured as a table's is, by the environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_REGION, AWS_ALLOW_HTTP and what else object_store reads there. Objects are read as they are asked for, never whole.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from storage.errors import DocumentsError, UsageError

_READ_AHEAD = 1 << 20
"""Bytes of an object that are fetched at least, one request each."""
_ASKS_THE_MACHINE = "/latest/api/token"
"""Of the address that has a cloud machine's own credentials, where the client looks last."""


class File(NamedTuple):
    """A file that may hold documents."""

    name: str
    """Below the folder or the fixed part of the glob, with slashes."""
    address: str
    """Path or URL."""
    open: Callable[[], Any]
    """Begins to read its bytes: a seekable file for pyarrow."""

    @property
    def suffixes(self) -> list[str]:
        """Like ``Path.suffixes``, in lower case."""
        return PurePosixPath(self.name.lower()).suffixes


class Found(NamedTuple):
    """The files that a path means, sorted by name."""

    files: list[File]
    is_folder: bool
    """Whether they were not asked for by name or glob; then hidden files (. and _) are left out."""


def find_files(path: str) -> Found:
    """The files that a path means: a file, a folder or a glob, or s3://BUCKET/ and any of these.

    Raises:
        UsageError: if there is nothing there.
        DocumentsError: if the bucket can't be read.
    """
    scheme, is_url, rest = path.partition("://")
    if is_url and scheme != "s3":
        raise UsageError("documents can't be read from there", expected="a path, or s3://BUCKET/PATH", found=path)
    found = _in_bucket(*rest.partition("/")[::2]) if is_url else _on_disk(path)
    if not found.files and not found.is_folder:
        raise UsageError(
            "there are no documents at this path",
            expected="a file, a folder or a glob",
            found="nothing there",
            where=path,
            do="check the path; put a glob in quotes",
        )
    files = [file for file in found.files if not found.is_folder or _is_visible(file.name)]
    return found._replace(files=sorted(files, key=lambda file: file.name.split("/")))


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
    files = [File(p.relative_to(root).as_posix(), str(p), partial(pa.OSFile, str(p))) for p in paths if p.is_file()]
    return Found(files, is_folder)


def _in_bucket(bucket: str, key: str) -> Found:
    import obstore  # loads only where there is a bucket
    from obstore.store import S3Store

    url = f"s3://{bucket}"
    with _reachable(url):
        # Options that are given here take the place of those in the environment; the one that matters is passed on.
        http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1")
        store = S3Store.from_url(url, client_options={"allow_http": http})

    def below(root: str) -> list[File]:
        with _reachable(f"{url}/{root}"):
            keys = [meta["path"] for page in obstore.list(store, root or None, chunk_size=1000) for meta in page]
        lead = f"{root}/" if root else ""
        return [file(key, key.removeprefix(lead)) for key in keys if key != root]  # a folder may be an object, too

    def file(key: str, name: str) -> File:
        return File(name, f"{url}/{key}", partial(_Object, store, key, f"{url}/{key}"))

    key = key.strip("/")
    with _reachable(f"{url}/{key}"):
        if key and _is_object(store, key):
            return Found([file(key, PurePosixPath(key).name)], is_folder=False)
    if folder := below(key):
        return Found(folder, is_folder=True)
    parts = PurePosixPath(key).parts
    root = _fixed(parts)
    pattern = parts[len(root) :]
    files = [file for file in below("/".join(root)) if _matches(tuple(file.name.split("/")), pattern)]
    return Found(files if pattern else [], is_folder=False)


def _is_object(store: Any, key: str) -> bool:
    import obstore

    try:
        obstore.head(store, key)
    except FileNotFoundError:
        return False
    return True


class _Object(io.RawIOBase):
    """An object as a file."""

    def __init__(self, store: Any, key: str, url: str) -> None:
        import obstore

        self._url = url
        with _reachable(url):
            self._reader = obstore.open_reader(store, key, buffer_size=_READ_AHEAD)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._reader.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._reader.seek(offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        with _reachable(self._url):
            return bytes(self._reader.read(None if size is None or size < 0 else size))


@contextmanager
def _reachable(url: str) -> Iterator[None]:
    """A bucket that can't be read is said in S3's words, and not in the client's, which may repeat what it was given.

    Raises:
        DocumentsError: if it can't.
    """
    from obstore.exceptions import BaseError

    try:
        yield
    except (OSError, BaseError) as error:
        text = str(error)
        code = re.search(r"<Code>(\w+)</Code>", text) or re.search(r"status code: (\d+ [\w ]+)", text)
        found = code[1] if code else text.splitlines()[0].rpartition(" - ")[2]
        raise DocumentsError(
            "documents can't be read from this bucket",
            expected="an S3 endpoint that knows the bucket, and credentials that it accepts",
            found="no credentials" if _ASKS_THE_MACHINE in text else found,
            where=url,
            do="check the bucket's name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL\n"
            "               (if it is http://, with AWS_ALLOW_HTTP=true)",
        ) from None


def _fixed(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of a path before the first that is a pattern."""
    return tuple(takewhile(lambda part: not set(part) & set("*?["), parts))


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """What ``Path.glob`` finds."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _is_visible(name: str) -> bool:
    return not any(part.startswith((".", "_")) for part in name.split("/"))
