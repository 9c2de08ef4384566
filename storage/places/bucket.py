"""A place in a bucket of S3 or an S3-compatible store, configured by the same environment variables as deltalake.

Documents can be in buckets of Google and Azure, too; tables are only in S3. For S3, the variables are
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ALLOW_HTTP and the others that object_store
reads. Objects are written atomically; one that must not be replaced is written with a conditional put.
Shards are written to unnamed local files, which vanish with their process. There are no locks: a writer uploads a file
again to make it young, checks after its commit that the file exists, and restores it if maintenance has deleted it.
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
from obstore.store import from_url

from softlabel.storage.errors import AccessError
from softlabel.storage.places.place import LARGEST_FILE, SIDE_FOLDER, Draft, File, PendingFile, require_small

_TAIL = 1 << 16
"""Bytes to fetch from the end of an object when it is opened: pyarrow reads as many first, to find the footer."""
_TIMEOUT = "10 minutes"
"""Timeout of one request: long enough for a shard over a slow network."""
_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")
_SETTINGS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL\n"
    "               (if it is http://, with AWS_ALLOW_HTTP=true)",
    "gs": "GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS",
    "abfss": "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
"""Environment variables to check when a bucket can't be used, by the scheme of its URL."""
_COPIES: dict[tuple[str, frozenset[File]], "tempfile.TemporaryDirectory[str]"] = {}
"""Temporary copies of fetched folders, by address and content."""


class Bucket:
    """``storage.places.place.Place`` in a bucket, below a prefix.

    Each object is uploaded in one request, which limits it to 5 GB.
    """

    sees_writers = False
    is_remote = True

    def __init__(self, url: str) -> None:
        self.address = url.rstrip("/")
        self._store = _store(self.address, tuple(sorted(i for i in os.environ.items() if i[0].startswith(_PREFIXES))))

    def where(self, name: str) -> str:
        """URL of the object."""
        return f"{self.address}/{name}"

    def exists(self) -> bool:
        """Whether there is any object below the prefix."""
        return any(True for _ in self.files())

    def files(self, folder: str = "", after: str = "") -> Iterator[File]:
        """One request for each thousand objects."""
        with self._translating_errors(folder):
            for page in obstore.list(self._store, prefix=folder or None, offset=after or None, chunk_size=1000):
                for meta in page:
                    yield _file(meta["path"], meta)

    def stat(self, name: str) -> File:
        """One request."""
        with self._translating_errors(name):
            return _file(name, obstore.head(self._store, name))

    def read(self, name: str, limit: int = LARGEST_FILE) -> bytes:
        """One request."""
        with self._translating_errors(name):
            found = obstore.get(self._store, name)
            require_small(name, found.meta["size"], limit)
            return bytes(found.bytes())

    def open(self, name: str) -> tuple[Any, File]:
        """One request, which fetches the end of the object and its size."""
        try:
            found = obstore.get(self._store, name, options={"range": {"suffix": _TAIL}})
            file, tail = _file(name, found.meta), bytes(found.bytes())
        except (FileNotFoundError, BaseError):  # an empty object has no last bytes
            file, tail = self.stat(name), b""
        return _Object(self, file, tail), file

    def range(self, name: str, start: int, end: int) -> bytes:
        """Bytes of an object from ``start`` up to, not including, ``end``; one request."""
        with self._translating_errors(name):
            return bytes(obstore.get_range(self._store, name, start=start, end=end))

    @contextmanager
    def fetch(self, name: str) -> Iterator[BinaryIO]:
        """A copy in an unnamed file."""
        with _on_this_machine():
            copy = tempfile.TemporaryFile()  # noqa: SIM115, it is closed below
        with copy:
            with self._translating_errors(name):
                for chunk in obstore.get(self._store, name).stream():
                    with _on_this_machine():
                        copy.write(chunk)
            with _on_this_machine():
                copy.seek(0)
            yield copy

    def fetch_folder(self, name: str) -> Path:
        """A copy in a temporary folder, made once and deleted when the process ends."""
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
        """A conditional put, unless ``replace``."""
        self._put(name, content, "overwrite" if replace else "create")

    def write_folder(self, source: Path, name: str) -> None:
        """File by file; if the process is killed, the next one writes all files again."""
        for path in sorted(source.iterdir()):
            self.write(f"{name}/{path.name}", path.read_bytes())

    def draft(self) -> Draft:
        """A local temporary file."""
        return _Draft(self)

    def pending(self, name: str) -> PendingFile:
        """An object that the store copies to its final name."""
        return _PendingObject(self, name)

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the store."""
        with self._translating_errors(source):
            obstore.copy(self._store, source, target)

    def upload(self, file: BinaryIO, name: str) -> None:
        """Upload a whole file."""
        file.flush()
        file.seek(0)
        self._put(name, file, "overwrite")

    def delete(self, name: str) -> None:
        """One request for each thousand objects."""
        paths = [name, *(file.name for file in self.files(name))]
        with self._translating_errors(name):
            obstore.delete(self._store, paths)

    @contextmanager
    def gate(self, *, exclusive: bool = False) -> Iterator[int]:
        """No lock; maintenance writes an object to learn the time by the store's clock."""
        now = 0
        if exclusive:
            self.write(f"{SIDE_FOLDER}/maintenance.lock", b"")
            now = self.stat(f"{SIDE_FOLDER}/maintenance.lock").changed
        yield now

    def is_written(self, name: str) -> bool | None:
        """Always None: shards are written to local files of their writers, and a bucket has no locks."""
        return None

    def _put(self, name: str, content: bytes | BinaryIO, mode: Any) -> None:
        with self._translating_errors(name):
            obstore.put(self._store, name, content, mode=mode, use_multipart=False)

    @contextmanager
    def _translating_errors(self, name: str) -> Iterator[None]:
        """Distinguish a missing or existing object from a store that can't be used."""
        try:
            yield
        except AlreadyExistsError:
            raise FileExistsError(f"the object exists already: {self.where(name)}") from None
        except (FileNotFoundError, BaseError) as error:
            code = _code(str(error))
            if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
                raise FileNotFoundError(f"no such object: {self.where(name)}") from None
            raise _unusable(self.where(name), code) from None  # the store's message may repeat the credentials


class _Object(io.RawIOBase):
    """An object as a file: each read is one request, except at the object's end, which is fetched already."""

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
    """A local file that is uploaded when it is published."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket, self._name = bucket, ""
        self.file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115, it is closed by discard

    def publish(self, name: str) -> None:
        if name != self._name or not _exists(self._bucket, name):
            self._bucket.upload(self.file, name)
            self._name = name

    def discard(self) -> None:
        self.file.close()


class _PendingObject:
    """An object that is copied when it is published."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._temporary, self._name = bucket, name, ""

    def publish(self, name: str) -> None:
        if name != self._name or not _exists(self._bucket, name):
            self._bucket.copy(self._temporary, name)
            self._name = name

    def discard(self) -> None:
        self._bucket.delete(self._temporary)


@contextmanager
def _on_this_machine() -> Iterator[None]:
    """Report a local failure, such as a full disk, as such, and not as damage to the object."""
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


def _unusable(url: str, found: str) -> AccessError:
    scheme = url.partition(":")[0]
    return AccessError(
        "the bucket can't be used",
        expected=f"{'an S3 endpoint' if scheme == 's3' else 'a store'} that has this bucket, and credentials that it"
        " accepts",
        found=found,
        where=url,
        do=f"check the bucket's name, {_SETTINGS[scheme]}, then run the same command again",
    )


def _exists(bucket: Bucket, name: str) -> bool:
    try:
        bucket.stat(name)
    except FileNotFoundError:
        return False
    return True


@lru_cache(maxsize=64)
def _store(url: str, environment: tuple[tuple[str, str], ...]) -> Any:
    """One store for each place and configuration, so that its connections are reused."""
    # Options given here override those in the environment, so we pass on the one that matters.
    http = dict(environment).get("AWS_ALLOW_HTTP", "").lower() in ("true", "1")
    try:
        return from_url(url, client_options={"timeout": _TIMEOUT, "allow_http": http})
    except (BaseError, ValueError) as error:
        raise _unusable(url, _code(str(error))) from None


def _file(name: str, meta: Any) -> File:
    return File(name, meta["size"], int(meta["last_modified"].timestamp() * 1e9))


def _code(error: str) -> str:
    """The error code of S3, or else the first line of the client's message."""
    if "/latest/api/token" in error:  # the credentials of a cloud machine, which the client tries last
        return "no credentials"
    code = re.search(r"<Code>(\w+)</Code>", error) or re.search(r"status code: (\d+ [\w ]+)", error)
    return code[1] if code else error.splitlines()[0].rpartition(" - ")[2]
