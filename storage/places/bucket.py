"""A table's place in a bucket of S3, or of any store that speaks its language; configured as deltalake's own access is.

AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ALLOW_HTTP and what else object_store reads
from the environment. An object is there whole or not at all; one that must not be replaced is put on the condition
that there is none. Shards are made in unnamed files of this machine, which are gone with their process. There are no
locks: whoever publishes a file makes it young, looks for it after the commit, and puts it there again if maintenance
has deleted its older twin meanwhile.
"""

import io
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from softlabel.storage.errors import AccessError
from softlabel.storage.places.place import SIDE_FOLDER, Draft, File, Unnamed

_TAIL = 1 << 16
"""Bytes that are fetched when an object is opened: as many as pyarrow asks for first, to find the footer."""
_TIMEOUT = "10 minutes"
"""Of one request: long enough for a shard in a slow network."""
_COPIES: dict[tuple[str, frozenset[File]], "tempfile.TemporaryDirectory[str]"] = {}
"""Folders that were fetched, by address and by what was in them."""


class Bucket:
    """``storage.places.place.Place`` in a bucket, below a prefix.

    Objects are put in one request, so they may be 5 GB long.
    """

    sees_writers = False
    is_remote = True

    def __init__(self, url: str) -> None:
        self.address = url.rstrip("/")
        self._store = _store(self.address, tuple(sorted(i for i in os.environ.items() if i[0].startswith("AWS_"))))

    def where(self, name: str) -> str:
        """Its URL."""
        return f"{self.address}/{name}"

    def exists(self) -> bool:
        """Whether there is any object below the prefix."""
        return any(True for _ in self.files())

    def files(self, folder: str = "") -> Iterator[File]:
        """A request for each thousand."""
        with self._explained(folder):
            for page in obstore.list(self._store, prefix=folder or None, chunk_size=1000):
                for meta in page:
                    yield _file(meta["path"], meta)

    def stat(self, name: str) -> File:
        """One request."""
        with self._explained(name):
            return _file(name, obstore.head(self._store, name))

    def read(self, name: str) -> bytes:
        """One request."""
        with self._explained(name):
            return bytes(obstore.get(self._store, name).bytes())

    def open(self, name: str) -> tuple[Any, File]:
        """One request, that brings the object's end and its size."""
        try:
            found = obstore.get(self._store, name, options={"range": {"suffix": _TAIL}})
            file, tail = _file(name, found.meta), bytes(found.bytes())
        except (FileNotFoundError, BaseError):  # an empty object has no end
            file, tail = self.stat(name), b""
        return _Object(self, file, tail), file

    def range(self, name: str, start: int, end: int) -> bytes:
        """Bytes of an object from ``start`` up to, not including, ``end``; one request."""
        with self._explained(name):
            return bytes(obstore.get_range(self._store, name, start=start, end=end))

    @contextmanager
    def fetch(self, name: str) -> Iterator[BinaryIO]:
        """A copy in an unnamed file."""
        with _on_this_machine():
            copy = tempfile.TemporaryFile()  # noqa: SIM115, it is closed below
        with copy:
            with self._explained(name):
                for chunk in obstore.get(self._store, name).stream():
                    with _on_this_machine():
                        copy.write(chunk)
            with _on_this_machine():
                copy.seek(0)
            yield copy

    def fetch_folder(self, name: str) -> Path:
        """A copy in a temporary folder; made once, and gone with the process."""
        files = frozenset(self.files(name))
        if (self.address, files) not in _COPIES:
            with _on_this_machine():
                folder = tempfile.TemporaryDirectory(prefix="softlabel-")
            for file in files:
                content = self.read(file.name)
                with _on_this_machine():
                    Path(folder.name, PurePath(file.name).name).write_bytes(content)
            _COPIES[self.address, files] = folder
        return Path(_COPIES[self.address, files].name)

    def write(self, name: str, content: bytes, *, replace: bool = True) -> None:
        """Without ``replace``, a conditional put."""
        self._put(name, content, "overwrite" if replace else "create")

    def write_folder(self, source: Path, name: str) -> None:
        """File by file; what a killed process has begun, the next one writes again."""
        for path in sorted(source.iterdir()):
            self.write(f"{name}/{path.name}", path.read_bytes())

    def settle(self, name: str) -> None:
        """What a store has confirmed, it keeps."""

    def draft(self) -> Draft:
        """On this machine."""
        return _Draft(self)

    def waiting(self, name: str) -> Unnamed:
        """An object, to be copied by the store itself."""
        return _Waiting(self, name)

    def copy(self, source: str, target: str) -> None:
        """Give an object a second name."""
        with self._explained(source):
            obstore.copy(self._store, source, target)

    def upload(self, file: BinaryIO, name: str) -> None:
        """Put a whole file."""
        file.flush()
        file.seek(0)
        self._put(name, file, "overwrite")

    def delete(self, name: str) -> None:
        """One request for each thousand objects."""
        paths = [name, *(file.name for file in self.files(name))]
        with self._explained(name):
            obstore.delete(self._store, paths)

    @contextmanager
    def gate(self, *, alone: bool = False) -> Iterator[int]:
        """Open to all; maintenance leaves a mark, which the store stamps with its own time."""
        now = 0
        if alone:
            self.write(f"{SIDE_FOLDER}/maintenance.lock", b"")
            now = self.stat(f"{SIDE_FOLDER}/maintenance.lock").changed
        yield now

    def is_written(self, name: str) -> bool | None:
        """No shard is made in a bucket, and nothing tells of those that are made elsewhere."""
        return None

    def _put(self, name: str, content: bytes | BinaryIO, mode: Any) -> None:
        with self._explained(name):
            obstore.put(self._store, name, content, mode=mode, use_multipart=False)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """A store that can't be reached is no missing file, and no damage either."""
        try:
            yield
        except AlreadyExistsError:
            raise FileExistsError(f"the object exists already: {self.where(name)}") from None
        except (FileNotFoundError, BaseError) as error:
            code = _code(str(error))
            if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
                raise FileNotFoundError(f"no such object: {self.where(name)}") from None
            raise AccessError(
                "the bucket can't be used",
                expected="an S3 endpoint that has this bucket, and credentials that it accepts",
                found=code,
                where=self.where(name),
                do="check the bucket's name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL\n"
                "               (if it is http://, with AWS_ALLOW_HTTP=true), then run the same command again",
            ) from None  # the store's own words may repeat what it was given


class _Object(io.RawIOBase):
    """An object as a file: each read is one request, but for the object's end, which is there already."""

    def __init__(self, bucket: Bucket, file: File, tail: bytes) -> None:
        self._bucket, self._file, self._tail = bucket, file, tail
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.bytes}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        start, whole = self._position, self._file.bytes
        end = whole if size is None or size < 0 else min(start + size, whole)
        if start >= end:
            return b""
        tail = whole - len(self._tail)
        if start >= tail:
            content = self._tail[start - tail : end - tail]
        else:
            content = self._bucket.range(self._file.name, start, end)
        self._position = start + len(content)
        return content


class _Draft:
    """A file of this machine that is uploaded when it is published."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket, self._name = bucket, ""
        self.file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115, it is closed by discard

    def publish(self, name: str) -> None:
        if name != self._name or not _is_there(self._bucket, name):
            self._bucket.upload(self.file, name)
            self._name = name

    def discard(self) -> None:
        self.file.close()


class _Waiting:
    """An object that is copied when it is published."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._waits, self._name = bucket, name, ""

    def publish(self, name: str) -> None:
        if name != self._name or not _is_there(self._bucket, name):
            self._bucket.copy(self._waits, name)
            self._name = name

    def discard(self) -> None:
        self._bucket.delete(self._waits)


@contextmanager
def _on_this_machine() -> Iterator[None]:
    """What fails for want of room for a copy is no damage to what was to be copied."""
    try:
        yield
    except OSError as error:
        raise AccessError(
            "an object can't be copied to this machine",
            expected="space for a few shards in the folder for temporary files",
            found=error,
            where=os.environ.get("TMPDIR", "/tmp"),
            do="free space there or set TMPDIR to another folder, then run the same command again",
        ) from error


def _is_there(bucket: Bucket, name: str) -> bool:
    try:
        bucket.stat(name)
    except FileNotFoundError:
        return False
    return True


@lru_cache(maxsize=64)
def _store(url: str, environment: tuple[tuple[str, str], ...]) -> S3Store:
    """One for each place and configuration, whose connections are used again."""
    # Options that are given here take the place of those in the environment; the one that matters is passed on.
    http = dict(environment).get("AWS_ALLOW_HTTP", "").lower() in ("true", "1")
    return S3Store.from_url(url, client_options={"timeout": _TIMEOUT, "allow_http": http})


def _file(name: str, meta: Any) -> File:
    return File(name, meta["size"], int(meta["last_modified"].timestamp() * 1e9))


def _code(error: str) -> str:
    """What S3 calls it, or what the client says in its first line."""
    if "/latest/api/token" in error:  # of a cloud machine's own credentials, where the client looks last
        return "no credentials"
    code = re.search(r"<Code>(\w+)</Code>", error) or re.search(r"status code: (\d+ [\w ]+)", error)
    return code[1] if code else error.splitlines()[0].rpartition(" - ")[2]
