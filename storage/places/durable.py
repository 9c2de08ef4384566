"""Durable writes: after a power cut, a file or folder is as it was before, or as it should be afterwards.

A file system may keep a new name and lose the content behind it, unless the content was synced first. It may also lose
the name, unless the folder with the name was synced. So the content is written under another name and synced, then it
gets its name, and then the folders are synced. Only after that may a caller delete what has been superseded.

Whoever may read or change a file follows from the umask alone, as for any other program: libraries make some files and
folders for their owner only, and copies have the permissions of their originals.
"""

import errno
import os
import shutil
import stat
import uuid
from contextlib import suppress
from pathlib import Path


def require_permission(folder: Path) -> None:
    """Refuse a folder that this user can't write to, or can't make, as far as its permissions tell.

    Raises:
        OSError: if it is not writable.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def write(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file at once; its folder is made if necessary.

    Raises:
        FileExistsError: if it exists and ``replace`` is false; of several writers at once, one succeeds.
        OSError: if it can't be written; then nothing is left behind.
    """
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        if replace:
            publish(temporary, path)
        else:
            _sync(temporary)
            path.hardlink_to(temporary)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def publish(source: Path, target: Path) -> None:
    """Give a finished file, or a finished folder with all that is in it, its final name on the same file system.

    It gets the permissions that the umask leaves.

    Args:
        source: the file or folder under its temporary name.
        target: its final name. A file replaces the file there; for a folder, there may be at most an empty folder.
    """
    if source.is_dir() or not source.stat().st_mode & 0o077:
        _as_umask_says(source)
    sync(source)
    make_folder(target.parent)
    source.replace(target)
    _sync(target.parent)


def replace_folder(source: Path, target: Path, scratch: Path) -> None:
    """Give the content of a durable folder a second name, in place of the folder that may have it.

    The first name stays, so that a caller can repeat this after a kill: for a moment, nothing has the second one.

    Args:
        source: the folder.
        target: the second name.
        scratch: folder on the same file system, for what is not in use.
    """
    copy = scratch / f"{target.name}.{uuid.uuid4().hex}"
    shutil.copytree(source, copy, copy_function=_link)
    sync(copy)
    if target.is_dir():
        target.replace(scratch / f"{target.name}.{uuid.uuid4().hex}")
    copy.replace(target)
    _sync(target.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, as far as they are missing.

    Raises:
        NotADirectoryError: if something else has one of these names.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"not a folder: {path}") from error
    _sync(path.parent)


def sync(path: Path) -> None:
    """Make the content of a file durable, or everything in a folder; its own name is in the folder above."""
    if path.is_dir():
        for part in path.iterdir():
            sync(part)
    _sync(path)


def sync_names(path: Path) -> None:
    """Make the name of a file or folder durable."""
    _sync(path.parent)


def remove_folder(path: Path, scratch: Path) -> None:
    """Delete a folder, which is never seen half deleted under its own name.

    Args:
        path: the folder.
        scratch: folder on the same file system, for what is not in use; a kill may leave parts of the folder there.
    """
    make_folder(scratch)
    aside = scratch / f"{path.name}.{uuid.uuid4().hex}"
    path.replace(aside)
    _sync(path.parent)
    shutil.rmtree(aside)


def _link(source: str, target: str) -> None:
    """Give a file a second name or, on a file system without these, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _as_umask_says(path: Path) -> None:
    """Give a file, or a folder with all that is in it, the permissions of a new file and a new folder."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        of_file = stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
    of_folder = of_file | (of_file & 0o444) >> 2  # who may read a folder may enter it
    for part in [path, *path.rglob("*")]:
        now = stat.S_IMODE(part.lstat().st_mode)
        kept = now & ~0o777  # a folder may hand its group down
        wanted = kept | (of_folder if part.is_dir() else of_file)
        if now != wanted and not part.is_symlink():
            with suppress(PermissionError):  # another user's, who has begun this training
                part.chmod(wanted)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
