"""Tells which shards may have rows with given keys, without reading all shards.

    TABLE/_softlabel/keys/<hash of the content>.parquet     the first 8 bytes of the keys in many shards

A file of keys describes shards, which never change, so it never becomes wrong; it may be missing, or lack shards. What
it lacks is read from the shards themselves, and kept in memory. Once this process knows enough shards that no file
describes, it writes a file, and merges smaller ones into it, so that there are few.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softlabel.storage.log.state import Shard
from softlabel.storage.places.place import SIDE_FOLDER, Place, hash_of
from softlabel.storage.reader import outline
from softlabel.storage.table import Table

KEYS = f"{SIDE_FOLDER}/keys"
"""Folder of the files of keys."""
SHARDS_PER_FILE = 100
"""Shards that no file describes, before a new file is written."""
_FEW = 16
"""So many shards are read without looking for files of keys first."""
_PREFIX = 8
"""Bytes of a key that are kept: keys with different prefixes are different."""
_THREADS = 8
"""Shards whose keys are read in parallel."""


class _Segment(NamedTuple):
    """The prefixes of some shards, in ascending order, each with the number of its shard."""

    prefixes: NDArray[np.uint64]
    owners: NDArray[np.uint32]

    @classmethod
    def of(cls, prefixes: NDArray[np.uint64], owners: NDArray[np.uint32]) -> "_Segment":
        order = np.argsort(prefixes, kind="stable")
        return cls(prefixes[order], owners[order])


class KeyIndex:
    """The prefixes of the keys in a place's shards, as far as they are known to this process."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._paths: list[str] = []
        self._segments: list[_Segment] = []
        self._unsaved: dict[str, bytes] = {}
        self._loaded: set[str] = set()
        self._lock = threading.RLock()

    def shards_sharing(self, table: Table, keys: Iterable[bytes]) -> list[Shard]:
        """The shards of a version that may have a row with one of the keys, in the order of their names.

        Raises:
            IntegrityError: if the log is damaged, or a shard whose keys have to be read.
        """
        wanted = np.unique(np.frombuffer(prefixes_of(keys), np.uint64))
        with self._lock:
            self._learn(table)
            owners = set[int]()
            for segment in self._segments:
                first = np.searchsorted(segment.prefixes, wanted)
                last = np.searchsorted(segment.prefixes, wanted, side="right")
                for start, stop in zip(first[last > first], last[last > first], strict=True):
                    owners.update(segment.owners[start:stop].tolist())
            paths = [self._paths[number] for number in owners]
        return sorted(table.by_path[path] for path in paths if path in table.by_path)

    def add(self, shard: Shard, keys: Iterable[bytes]) -> None:
        """Note the keys of a shard that this process has just committed."""
        with self._lock:
            self._add({shard.path: prefixes_of(keys)})

    def save(self, table: Table) -> None:
        """Write a file of keys of the newest version, if there are enough shards that no file describes.

        Raises:
            OSError: if it can't be written.
            TableError: if the newest version can't be read.
        """
        with self._lock:
            if len(self._unsaved) >= SHARDS_PER_FILE:
                self._load(newest := table.newest())  # another process may have written the same
                if len(self._unsaved) >= SHARDS_PER_FILE:
                    self._loaded.add(_write(newest, self._unsaved))
                    self._unsaved = {}

    def _learn(self, table: Table) -> None:
        """Know the keys of every shard of a version."""
        shards = table.by_path
        missing = shards.keys() - self._numbers.keys()
        if len(missing) > _FEW:
            self._load(table)
            missing -= self._numbers.keys()
        self._add(_read_shards(table, [shards[path] for path in sorted(missing)]))

    def _load(self, table: Table) -> None:
        for name in _names(table.place):
            if name not in self._loaded:
                described = _described(table, name)
                self._loaded.add(name)
                self._add({path: part for path, part in described.items() if path not in self._numbers})
                for path in described:
                    self._unsaved.pop(path, None)

    def _add(self, described: Mapping[str, bytes]) -> None:
        new = {path: part for path, part in described.items() if path not in self._numbers}
        if not new:
            return
        first = len(self._paths)
        self._paths += new
        self._numbers.update(zip(new, range(first, len(self._paths)), strict=True))
        self._unsaved.update(new)
        counts = [len(part) // _PREFIX for part in new.values()]
        owners = np.repeat(np.arange(first, len(self._paths), dtype=np.uint32), counts)
        self._segments.append(_Segment.of(np.frombuffer(b"".join(new.values()), np.uint64), owners))
        while len(self._segments) > 1 and len(self._segments[-2].owners) <= 2 * len(self._segments[-1].owners):
            one, two = self._segments.pop(), self._segments.pop()
            prefixes = np.concatenate([one.prefixes, two.prefixes])
            self._segments.append(_Segment.of(prefixes, np.concatenate([one.owners, two.owners])))


_INDEXES: dict[str, KeyIndex] = {}
"""The index of each place, for the life of the process: a shard's path identifies its content."""


def key_index(place: Place) -> KeyIndex:
    """The index of a place's shards."""
    return _INDEXES.setdefault(place.address, KeyIndex())


def prefixes_of(keys: Iterable[bytes]) -> bytes:
    """The first bytes of each key, one after the other."""
    return b"".join(key[:_PREFIX] for key in keys)


def tidy(table: Table) -> None:
    """Put what the files of keys say about the newest version's shards into one file, and nothing about other shards.

    Raises:
        OSError: if a file can't be written or deleted.
    """
    names, shards = _names(table.place), table.by_path
    known = {path: part for name in names for path, part in _described(table, name).items() if path in shards}
    kept = {_store(table.place, known)} if known else set[str]()
    for name in set(names) - kept:
        table.place.delete(name)


def damaged_files(place: Place) -> Iterator[str]:
    """Files of keys whose content does not match their name."""
    for name in _names(place):
        try:
            matches = hash_of(place.read(name)) == PurePath(name).stem
        except OSError:
            matches = False
        if not matches:
            yield name


def _names(place: Place) -> list[str]:
    return sorted(file.name for file in place.files(KEYS) if file.name.endswith(".parquet"))


def _read_shards(table: Table, shards: Sequence[Shard]) -> dict[str, bytes]:
    """The prefixes of each shard's keys, by path, from the shards."""
    if not shards:
        return {}
    with ThreadPoolExecutor(_THREADS, "softlabel-keys") as pool:
        return dict(zip((shard.path for shard in shards), pool.map(partial(_read_shard, table), shards), strict=True))


def _read_shard(table: Table, shard: Shard) -> bytes:
    return prefixes_of(key for part in outline(table, shard, ["key"]) for key in part.column("key").to_pylist())


def _described(table: Table, name: str) -> dict[str, bytes]:
    """The prefixes of each shard's keys, by path, from a file of keys; nothing if it is damaged or was merged."""
    try:
        content = table.place.read(name)
        if hash_of(content) != PurePath(name).stem:
            return {}
        rows = pq.read_table(pa.BufferReader(content))
        described = dict(zip(rows["shard"].to_pylist(), rows["keys"].to_pylist(), strict=True))
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return {}
    shards = table.by_path  # entries with a wrong number of keys would hide rows
    return {p: part for p, part in described.items() if p not in shards or len(part) == _PREFIX * shards[p].rows}


def _write(table: Table, new: Mapping[str, bytes]) -> str:
    """Write a file of keys, and merge into it the files that are not much larger; returns its name."""
    known = {path: part for path, part in new.items() if path in table.by_path}
    size, merged = len(_content(known)), list[str]()
    for file in sorted(table.place.files(KEYS), key=lambda file: file.bytes):
        if file.bytes > 2 * size:  # so that each key is written again only a few times, and there are few files
            break
        described = _described(table, file.name)
        known |= {path: part for path, part in described.items() if path in table.by_path}
        size += file.bytes
        merged.append(file.name)
    made = _store(table.place, known)
    for name in merged:
        if name != made:
            table.place.delete(name)
    return made


def _store(place: Place, known: Mapping[str, bytes]) -> str:
    content = _content(known)
    name = f"{KEYS}/{hash_of(content)}.parquet"
    place.write(name, content)
    return name


def _content(known: Mapping[str, bytes]) -> bytes:
    paths = sorted(known)
    rows = pa.table({"shard": pa.array(paths, pa.string()), "keys": pa.array([known[path] for path in paths])})
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return bytes(sink.getvalue().to_pybytes())
