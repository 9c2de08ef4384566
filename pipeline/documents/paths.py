"""Find the files that a documents path names: on this machine, in a bucket or on the Hugging Face hub.

Readers treat all of them alike. An S3 bucket is configured like those of tables, see ``storage.places.bucket``.
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

from softlabel.pipeline.documents.stores import Store, store_of
from softlabel.storage.errors import DocumentsError, TableError, UsageError, printable
from softlabel.storage.location import located


class File(NamedTuple):
    """A file that may contain documents."""

    name: str
    """Path below the folder or below the fixed part of the glob, with slashes."""
    address: str
    """Path or URL."""
    open: Callable[[], pa.NativeFile]
    """Opens the file for random or sequential reading."""
    mapped: Callable[[], pa.NativeFile]
    """The same; a file on this machine is mapped into memory, and read only as far as it is used."""

    @property
    def ending(self) -> str:
        """Like ``Path.suffix``, in lower case."""
        return PurePosixPath(self.name.lower()).suffix

    @property
    def format(self) -> str:
        """The ending without that of a compression."""
        path = PurePosixPath(self.name.lower())
        return PurePosixPath(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


class Found(NamedTuple):
    """The files that a path names, sorted by name."""

    files: list[File]
    is_folder: bool
    """Whether the path is a folder; then hidden files (whose names start with . or _) are left out."""


def find_files(path: str) -> Found:
    """The files that a path names: a file, a folder or a glob, on this machine or behind the scheme of a store.

    Raises:
        UsageError: if there is nothing there, or the path contains credentials.
        DocumentsError: if the folder or the store can't be read.
    """
    path = located(path)
    scheme, is_url, rest = path.partition("://")
    with store_errors():
        if is_url:
            root, _, key = rest.partition("/")
            found = _in_store(store_of(scheme, root, path), key.strip("/"))
        else:
            found = _on_disk(path)
    if not found.files and not found.is_folder:
        is_special = not is_url and Path(path).exists()
        raise UsageError(
            "there are no documents at this path",
            expected="a file, a folder or a glob",
            found="a pipe, a socket or a device" if is_special else "nothing there",
            where=printable(path),
            do="write the documents to a file first"
            if is_special
            else "check the path; put a glob in quotes, so that the shell does not expand it",
        )
    files = [file for file in found.files if not found.is_folder or _is_visible(file.name)]
    return found._replace(files=sorted(files, key=lambda file: file.name.split("/")))


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn the errors of a store into errors about documents.

    Raises:
        DocumentsError: if the store can't be read.
    """
    try:
        yield
    except TableError as error:
        raise DocumentsError(str(error)) from None


def _on_disk(path: str) -> Found:
    root = Path(path)
    if is_folder := root.is_dir():
        paths = list(_below(root))
    elif root.is_file():
        root, paths = root.parent, [root]
    else:
        root = Path(*_fixed(root.parts))
        pattern = Path(path).relative_to(root).as_posix()
        paths = list(root.glob(pattern)) if pattern != "." else []
    found = [path for path in paths if path.is_file() or (path.is_symlink() and not path.exists())]
    return Found([_file_on_disk(path, path.relative_to(root).as_posix()) for path in found], is_folder)


def _below(root: Path) -> Iterator[Path]:
    """All files below a folder. Links to folders are followed, and each folder is visited once."""
    seen, waiting = set[str](), [root]
    while waiting:
        for folder, folders, names in os.walk(waiting.pop(0), onerror=_unreadable):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            waiting += sorted(path for name in folders if (path := Path(folder, name)).is_symlink())
            yield from (Path(folder, name) for name in names)


def _file_on_disk(path: Path, name: str) -> File:
    raw = os.fsencode(path)  # a file name need not be valid UTF-8
    return File(name, str(path), partial(pa.OSFile, raw), partial(pa.memory_map, raw))


def _unreadable(error: OSError) -> None:
    raise DocumentsError(
        "a folder of documents can't be read",
        expected="a folder whose names you may list",
        found=error.strerror,
        where=printable(os.fsdecode(error.filename)),
        do="check its permissions, or give the folders that you can read, one by one",
    )


def _in_store(store: Store, key: str) -> Found:
    def file(key: str, name: str) -> File:
        def open_file() -> pa.NativeFile:
            return pa.PythonFile(store.open(key)[0], "r")

        return File(name, store.where(key), open_file, open_file)

    def below(root: str) -> list[File]:
        lead = f"{root}/" if root else ""
        # A folder may be an object itself.
        return [file(o.name, o.name.removeprefix(lead)) for o in store.files(root) if o.name != root]

    with suppress(FileNotFoundError):
        if key:
            store.stat(key)
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
