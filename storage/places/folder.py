"""A place in a local folder, or in a file system that several machines share.

File locks show which writers are alive; they are released when their process ends.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from softlabel.storage.lock import ForeignFileError, opened
from softlabel.storage.places import durable
from softlabel.storage.places.place import (
    LARGEST_FILE,
    SIDE_FOLDER,
    WRITING,
    Draft,
    File,
    PendingFile,
    reading,
    require_small,
)

_NAMES_OF_FILES = (".json", ".parquet", "_last_checkpoint")
"""No folder has such a name, unless someone has put it in the place of a file, which then can't be read."""


class Folder:
    """``storage.places.place.Place`` in a local folder, which is created with its first file."""

    sees_writers = True
    is_remote = False

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self.address = str(self._path.resolve())

    def where(self, name: str) -> str:
        """Its path."""
        return str(self._path / name)

    def exists(self) -> bool:
        """Whether the path is a folder."""
        with suppress(FileNotFoundError), reading(str(self._path)):
            return self._path.is_dir()
        return False  # because its name is too long

    def files(self, folder: str = "", after: str = "") -> Iterator[File]:
        """Files that are deleted during the listing are left out; a folder in the place of a file is one of them."""
        for root, folders, names in os.walk(self._path / folder, onerror=_unless_missing):
            with suppress(ValueError):
                folders.remove("lost+found")  # in the root of a volume; only root can read it
            start = os.path.relpath(root, self._path)
            for name in (*names, *(folder for folder in folders if folder.endswith(_NAMES_OF_FILES))):
                relative = name if start == "." else f"{start}/{name}"
                if relative > after:
                    with suppress(FileNotFoundError), reading(self.where(relative)):
                        yield _file(relative, os.lstat(f"{root}/{name}"))

    def stat(self, name: str) -> File:
        """The time of change is that of the content or of the name, whichever is later; a link is not followed."""
        with reading(self.where(name)):
            return _file(name, (self._path / name).lstat())

    def read(self, name: str, limit: int = LARGEST_FILE) -> bytes:
        """Its bytes."""
        with reading(self.where(name)), self._opened(name) as file:
            require_small(self.where(name), os.fstat(file.fileno()).st_size, limit)
            return file.read()

    def open(self, name: str) -> tuple[Any, File]:
        """Opened natively by pyarrow."""
        with reading(self.where(name)):
            found = (self._path / name).lstat()
            _require_regular(found, self.where(name))
            return pa.OSFile(str(self._path / name)), _file(name, found)

    @contextmanager
    def fetch(self, name: str) -> Iterator[BinaryIO]:
        """The file itself."""
        with reading(self.where(name)), self._opened(name) as file:
            yield file

    def fetch_folder(self, name: str) -> Path:
        """The folder itself, in which every file is a regular one, and none is too large."""
        with reading(self.where(name)):
            for path in (self._path / name).iterdir():
                found = path.lstat()
                _require_regular(found, str(path))
                require_small(str(path), found.st_size, LARGEST_FILE)
        return self._path / name

    def _opened(self, name: str) -> BinaryIO:
        """A regular file; opening a pipe would wait for its other end, and a link may lead anywhere."""
        try:
            descriptor = os.open(self._path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV):
                _require_regular((self._path / name).lstat(), self.where(name))
            raise
        try:
            found = os.fstat(descriptor)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.where(name))
            _require_regular(found, self.where(name))
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise

    def write(self, name: str, content: bytes, *, replace: bool = True) -> None:
        """Atomic and durable."""
        durable.write(self._path / name, content, replace=replace)

    def write_folder(self, source: Path, name: str) -> None:
        """Atomic and durable."""
        target = self._path / name
        copy = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        if not target.exists():
            try:
                durable.make_folder(target.parent)
                shutil.copytree(source, copy)
                durable.publish(copy, target)
            except OSError:
                shutil.rmtree(copy, ignore_errors=True)
                if not target.exists():  # otherwise another process was first, with the same files
                    raise

    def draft(self) -> Draft:
        """A locked file in the writing folder."""
        folder = self._path / WRITING
        durable.make_folder(folder)
        path = folder / f"{_machine()}-{uuid.uuid4().hex}.parquet"
        with self.gate():
            file = path.open("x+b")
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH)
        return _Draft(self._path, path, file)

    def pending(self, name: str) -> PendingFile:
        """The file itself."""
        return _PendingFile(self._path, self._path / name)

    def delete(self, name: str) -> None:
        """A file at once, a folder file by file."""
        path = self._path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    @contextmanager
    def gate(self, *, exclusive: bool = False) -> Iterator[int]:
        """A file lock; no protection if the file system has no locks, or does not share them between machines."""
        folder = self._path / SIDE_FOLDER
        durable.make_folder(folder)
        descriptor = opened(folder / "maintenance.lock")
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield _now(folder) if exclusive else 0
        finally:
            os.close(descriptor)

    def is_written(self, name: str) -> bool | None:
        """Whether its lock is held. If not, the writer is dead, provided that it ran on this machine."""
        path = self._path / name
        try:
            descriptor = opened(path, create=False)
        except FileNotFoundError:
            return True  # it has just been published
        except ForeignFileError:
            return None
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return False if path.name.startswith(f"{_machine()}-") else None


class _PendingFile:
    """A file that is renamed when it is published."""

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder, self._path, self._named = folder, path, False

    def publish(self, name: str) -> None:
        """An identical file may have the name already; it is replaced."""
        target = self._folder / name
        if self._path != target:
            durable.publish(self._path, target)
            self._path, self._named = target, True

    def discard(self) -> None:
        """A published file stays: another writer may be about to commit the same file."""
        if not self._named:
            self._path.unlink(missing_ok=True)


class _Draft(_PendingFile):
    """A file that is locked while it is open."""

    def __init__(self, folder: Path, path: Path, file: BinaryIO) -> None:
        super().__init__(folder, path)
        self.file = file

    def discard(self) -> None:
        """Closing the file releases its lock."""
        super().discard()
        with suppress(OSError):  # on a full disk, flushing fails
            self.file.close()


def _unless_missing(error: OSError) -> None:
    """Raise unless the folder is missing: an unreadable one may hold records that protect files from deletion."""
    with suppress(FileNotFoundError, NotADirectoryError), reading(str(error.filename)):
        raise error


def _now(folder: Path) -> int:
    """The file system's time in nanoseconds; a network file system has its own clock."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _file(name: str, found: os.stat_result) -> File:
    return File(name, found.st_size, max(found.st_mtime_ns, found.st_ctime_ns))


def _require_regular(found: os.stat_result, where: str) -> None:
    """Refuse a pipe, a device, a socket, a link or a folder: softlabel never wrote it.

    Raises:
        OSError: without an error number, because the file system works.
    """
    if not stat.S_ISREG(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "a pipe, a device, a socket or a folder"
        raise OSError(f"not a regular file but {kind}: {where}")


@cache
def _machine() -> str:
    """Identifies the running kernel; processes under one kernel see each other's locks, even across containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = f"{uuid.getnode():x}"
    return hashlib.blake2b(boot.encode(), digest_size=4).hexdigest()
