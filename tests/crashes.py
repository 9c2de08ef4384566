"""Records what a block does to a folder, and rebuilds what a power cut at any moment may leave of it.

Native libraries are seen as well: what they write is found when it is synced, or when a name changes. As POSIX permits,
each change of a name may be lost or kept until its folder is synced, and content is lost until its file is synced.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_CALLS = ("replace", "rename", "link", "unlink", "rmdir", "mkdir", "fsync")
Tree = frozenset[tuple[str, str | None]]
"""Relative paths, each with the key of its content; None for a folder."""


class Disk:
    """The moments of a recording; each is the tree that a kill leaves, and those that a power cut may leave."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held: list[int] = []  # an open file keeps its number, which would otherwise be used again
        self._contents: dict[str, bytes] = {"": b""}
        self._cache: dict[tuple[int, int, int], str] = {}
        self._folders: set[int] = set()
        self._entries, self._files = self._scan()
        self._top = root.stat().st_ino
        self._held += [os.open(path, os.O_RDONLY) for path in root.rglob("*")]
        self.moments: list[tuple[Tree, set[Tree]]] = []

    def rebuild(self, tree: Tree, at: Path) -> Path:
        """Write a tree into a new folder."""
        at.mkdir()
        for name, content in sorted(tree, key=lambda item: item[0]):
            if content is None:
                (at / name).mkdir()
            else:
                (at / name).write_bytes(self._contents[content])
        return at

    def is_content(self, key: str | None, content: bytes) -> bool:
        """Whether these are the bytes of a file of a tree."""
        return key is not None and self._contents[key] == content

    def look(self) -> None:
        """Note the moment."""
        entries, files = self._scan()
        kept, content = self._entries, self._files

        def lost(number: int) -> str:
            return content.get(number, "")

        def torn(number: int) -> str:
            if number in content:
                return content[number]
            whole = self._contents[files.get(number, "")]
            return self._keep(whole[: len(whole) // 2])

        def nothing_new(number: int) -> dict[str, int]:
            return kept.get(number, {})

        def everything(number: int) -> dict[str, int]:
            return entries.get(number, {})

        def only_removals(number: int) -> dict[str, int]:
            return {name: n for name, n in nothing_new(number).items() if name in everything(number)}

        def no_removals(number: int) -> dict[str, int]:
            return {**nothing_new(number), **everything(number)}

        names = (nothing_new, everything, only_removals, no_removals)
        cuts = {self._tree(named, content) for named in names for content in (lost, torn)}
        self.moments.append((self._tree(everything, lambda number: files[number]), cuts))

    def synced(self, descriptor: int) -> None:
        """Note that a file's content, or a folder's names, are durable."""
        path, number = Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor).st_ino
        if not path.is_relative_to(self._root):
            return
        self._held.append(os.dup(descriptor))
        if path.is_dir():
            self._entries = {**self._entries, number: _names(path)}
            self._held += [os.open(part, os.O_RDONLY) for part in path.iterdir()]
        else:
            self._files = {**self._files, number: self._read(path)}

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)

    def _scan(self) -> tuple[dict[int, dict[str, int]], dict[int, str]]:
        entries, files = {}, {}
        for folder, _, names in os.walk(self._root):
            root = Path(folder)
            entries[root.stat().st_ino] = _names(root)
            files |= {(root / name).stat().st_ino: self._read(root / name) for name in names}
        self._folders |= entries.keys()
        return entries, files

    def _read(self, path: Path) -> str:
        stat = path.stat()
        seen = stat.st_ino, stat.st_size, stat.st_mtime_ns
        if seen not in self._cache:
            self._cache[seen] = self._keep(path.read_bytes())
        return self._cache[seen]

    def _keep(self, content: bytes) -> str:
        key = hashlib.sha256(content).hexdigest() if content else ""
        self._contents[key] = content
        return key

    def _tree(self, names: Callable[[int], dict[str, int]], content: Callable[[int], str]) -> Tree:
        found: list[tuple[str, str | None]] = []

        def walk(number: int, path: str) -> None:
            for name, part in names(number).items():
                inside = f"{path}{name}"
                found.append((inside, None if part in self._folders else content(part)))
                if part in self._folders:
                    walk(part, f"{inside}/")

        walk(self._top, "")
        return frozenset(found)


@contextmanager
def recorded(root: Path) -> Iterator[Disk]:
    """Record the changes in a folder during a block."""
    disk = Disk(root)
    busy: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def wrapped(name: str, real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if busy:
                    return real(*args, **kwargs)
                busy.append(name)
                try:
                    disk.look()
                    done = real(*args, **kwargs)
                    if name == "fsync":
                        disk.synced(args[0])
                    return done
                finally:
                    busy.clear()

            return call

        for name in _CALLS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        try:
            yield disk
        finally:
            busy.append("end")
            disk.look()
            disk.close()


def _names(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as parts:
        return {part.name: part.inode() for part in parts}
