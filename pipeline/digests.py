"""Sets of millions of fixed-width byte strings, in a fifth of the memory that a Python set takes.

Numpy's ``S`` type strips trailing zeros, but comparisons stay exact because all strings have the same width.
"""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Digests = NDArray[np.bytes_]


def digests(names: Iterable[str]) -> Digests:
    """(n,) S16: the 128-bit BLAKE2b of each name."""
    return np.frombuffer(b"".join(blake2b(name.encode(), digest_size=16).digest() for name in names), "S16")


def as_digests(column: pa.ChunkedArray) -> Digests:
    """(n,) S16: the values of a binary column of 16 bytes each."""
    return np.frombuffer(b"".join(column.to_pylist()), "S16")


def side_by_side(*parts: NDArray[np.generic]) -> Digests:
    """(n,) byte strings: the bytes of the parts (n elements each), concatenated element by element."""
    columns = [np.ascontiguousarray(p).view(np.uint8).reshape(len(p), p.dtype.itemsize) for p in parts]
    joined = np.concatenate(columns, axis=1)
    return joined.view(f"S{joined.shape[1]}")[:, 0]


def document_digests(rows: pa.Table) -> Digests:
    """(n,) S16: the document of each row."""
    return digests(rows.column("document_id").to_pylist())


def version_digests(rows: pa.Table) -> Digests:
    """(n,) S32: the document of each row, in the version that its content gives."""
    return side_by_side(document_digests(rows), as_digests(rows.column("fingerprint")))


def row_digests(rows: pa.Table) -> Digests:
    """(n,) S36: each row of a table; no two rows of a table have the same one."""
    return side_by_side(document_digests(rows), rows.column("chunk").to_numpy(), as_digests(rows.column("key")))


class DigestSet:
    """A set of byte strings of one width.

    They are kept in sorted runs, each more than twice as long as the next, so that adding many at a time costs little
    more than sorting them.
    """

    def __init__(self) -> None:
        self._runs: list[Digests] = []

    def has(self, wanted: Digests) -> NDArray[np.bool_]:
        """(n,) whether each of n byte strings is in the set."""
        found = np.zeros(len(wanted), bool)
        for run in self._runs:
            found |= run[np.minimum(np.searchsorted(run, wanted), len(run) - 1)] == wanted
        return found

    def add(self, added: Digests) -> NDArray[np.bool_]:
        """Add n byte strings; returns (n,) which of them were new. Of equal ones, only the first is new."""
        values, first = np.unique(added, return_index=True)
        fresh = ~self.has(values)
        new = np.zeros(len(added), bool)
        new[first[fresh]] = True
        run = values[fresh]
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")  # a merge of two sorted runs
        if len(run):
            self._runs.append(run)
        return new
