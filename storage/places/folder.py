"""A place in a local folder, or in a file system that several machines share.

File locks show which writers are alive; they are released when their process ends.
"""

import errno
import fcntl
import hashlib
import os
import shutil
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
from softlabel.storage.places.place import SIDE_FOLDER, WRITING, Draft, File, PendingFile, reading


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
        with reading(str(self._path)):
            return self._path.is_dir()

    def files(self, folder: str = "") -> Iterator[File]:
        """Files that are deleted during the listing are left out."""
        for root, folders, names in os.walk(self._path / folder, onerror=_unless_missing):
            with suppress(ValueError):
                folders.remove("lost+found")  # in the root of a volume; only root can read it
            for name in names:
                with suppress(FileNotFoundError):
                    yield self.stat(str(Path(root, name).relative_to(self._path)))

    def stat(self, name: str) -> File:
        """The time of change is that of the content or of the name, whichever is later."""
        with reading(self.where(name)):
            return _file(name, (self._path / name).stat())

    def read(self, name: str) -> bytes:
        """Its bytes."""
        with reading(self.where(name)):
            return (self._path / name).read_bytes()

    def open(self, name: str) -> tuple[Any, File]:
        """Opened natively by pyarrow."""
        found = self.stat(name)
        with reading(self.where(name)):
            return pa.OSFile(str(self._path / name)), found

    @contextmanager
    def fetch(self, name: str) -> Iterator[BinaryIO]:
        """The file itself."""
        with reading(self.where(name)), (self._path / name).open("rb") as file:
            yield file

    def fetch_folder(self, name: str) -> Path:
        """The folder itself."""
        return self._path / name

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

    def sync(self, name: str) -> None:
        """Sync the file and its folder."""
        durable.sync(self._path / name)
        durable.sync_names(self._path / name)

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


def _file(name: str, stat: os.stat_result) -> File:
    return File(name, stat.st_size, max(stat.st_mtime_ns, stat.st_ctime_ns))


@cache
def _machine() -> str:
    """Identifies the running kernel; processes under one kernel see each other's locks, even across containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = f"{uuid.getnode():x}"
    return hashlib.blake2b(boot.encode(), digest_size=4).hexdigest()
