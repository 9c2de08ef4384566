"""A table's place in a folder of this machine, or of a file system that several share.

Files are synced before they get their final names, by a rename or, where nothing may be replaced, by a hard link.
Who is writing is told by locks, which are gone with the process that held them.
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
from softlabel.storage.places.place import SIDE_FOLDER, WRITING, Draft, File, Unnamed, reading


class Folder:
    """``storage.places.place.Place`` in a local folder, made when the first file comes."""

    sees_writers = True
    is_remote = False

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self.address = str(self._path.resolve())

    def where(self, name: str) -> str:
        """Its path."""
        return str(self._path / name)

    def exists(self) -> bool:
        """Whether it is there, and a folder."""
        with reading(str(self._path)):
            return self._path.is_dir()

    def files(self, folder: str = "") -> Iterator[File]:
        """Those that vanish meanwhile are left out."""
        for root, folders, names in os.walk(self._path / folder, onerror=_unless_missing):
            with suppress(ValueError):
                folders.remove("lost+found")  # of a volume's root, which nobody may look into
            for name in names:
                with suppress(FileNotFoundError):
                    yield self.stat(str(Path(root, name).relative_to(self._path)))

    def stat(self, name: str) -> File:
        """A file's age is that of its content or of its name, whichever is younger."""
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
        """It survives a power cut whole."""
        publish(content, self._path / name, replace=replace)

    def write_folder(self, source: Path, name: str) -> None:
        """All at once, by a rename."""
        target = self._path / name
        copy = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        if not target.exists():
            try:
                copy.mkdir(parents=True)
                for path in source.iterdir():
                    publish(path.read_bytes(), copy / path.name)
                copy.rename(target)
                _sync(target.parent)
            except OSError:
                shutil.rmtree(copy, ignore_errors=True)
                if not target.exists():  # else another process was first, with the same files
                    raise

    def settle(self, name: str) -> None:
        """Synced, with its name."""
        _sync(self._path / name)
        _sync((self._path / name).parent)

    def draft(self) -> Draft:
        """In the writing folder, and locked."""
        folder = self._path / WRITING
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{_machine()}-{uuid.uuid4().hex}.parquet"
        with self.gate():
            file = path.open("x+b")
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH)
        return _Draft(self._path, path, file)

    def waiting(self, name: str) -> Unnamed:
        """The file itself."""
        return _Unnamed(self._path, self._path / name)

    def delete(self, name: str) -> None:
        """A file at once, a folder file by file."""
        path = self._path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    @contextmanager
    def gate(self, *, alone: bool = False) -> Iterator[int]:
        """A lock of the file system's; where it has none, or hides it from other machines, all walk through."""
        folder = self._path / SIDE_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = opened(folder / "maintenance.lock")
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield _now(folder) if alone else 0
        finally:
            os.close(descriptor)

    def is_written(self, name: str) -> bool | None:
        """Whether its lock is held; if not, it was left by a dead writer if that was one of this machine."""
        path = self._path / name
        try:
            descriptor = opened(path, create=False)
        except FileNotFoundError:
            return True  # it has just got its final name
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


class _Unnamed:
    """A file that is renamed when it is published."""

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder, self._path, self._named = folder, path, False

    def publish(self, name: str) -> None:
        """Another file with the very same content may have the name already."""
        target = self._folder / name
        if self._path != target:
            rename(self._path, target)
            self._path, self._named = target, True

    def discard(self) -> None:
        """What has its final name stays: another writer may be about to commit its twin."""
        if not self._named:
            self._path.unlink(missing_ok=True)


class _Draft(_Unnamed):
    """A file that is locked as long as it is open."""

    def __init__(self, folder: Path, path: Path, file: BinaryIO) -> None:
        super().__init__(folder, path)
        self.file = file

    def discard(self) -> None:
        """Unlocked at last."""
        super().discard()
        with suppress(OSError):  # a full disk has no room for what is still to be written
            self.file.close()


def publish(content: bytes, path: Path, *, replace: bool = True) -> None:
    """Write a file under its final name at once, so that it survives a power cut whole.

    Raises:
        FileExistsError: if it must not be replaced and is there; of several at once, one succeeds.
        OSError: if it can't be written; then nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"not a folder: {path.parent}") from error
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        if replace:
            rename(temporary, path)
        else:
            _sync(temporary)
            path.hardlink_to(temporary)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Move a finished file to its final name, durably: the bytes first, then the name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sync(source)
    source.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unless_missing(error: OSError) -> None:
    """A folder that can't be listed is not an empty one: what is in it may be what keeps others from being deleted."""
    with suppress(FileNotFoundError, NotADirectoryError), reading(str(error.filename)):
        raise error


def _now(folder: Path) -> int:
    """The time that the file system gives a new file, in nanoseconds; on a network it has a clock of its own."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _file(name: str, stat: os.stat_result) -> File:
    return File(name, stat.st_size, max(stat.st_mtime_ns, stat.st_ctime_ns))


@cache
def _machine() -> str:
    """The running kernel: what sees one another's locks, in whichever container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = f"{uuid.getnode():x}"
    return hashlib.blake2b(boot.encode(), digest_size=4).hexdigest()
