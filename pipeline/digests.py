"""Sets of fixed-width byte strings, for millions of them: a set of Python's own takes five times as much memory.

Numpy's ``S`` compares byte strings of one width exactly: what it strips, zeros at the end, all of them have.
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
    """(n,) S16: the values of a binary column, which are 16 bytes each."""
    return np.frombuffer(b"".join(column.to_pylist()), "S16")


def side_by_side(*parts: NDArray[np.generic]) -> Digests:
    """(n,) byte strings of the parts' bytes one after the other, of parts with n elements each."""
    columns = [np.ascontiguousarray(p).view(np.uint8).reshape(len(p), p.dtype.itemsize) for p in parts]
    joined = np.concatenate(columns, axis=1)
    return joined.view(f"S{joined.shape[1]}")[:, 0]


class DigestSet:
    """A set of byte strings of one width.

    They lie in sorted runs, each more than twice as long as the next, so that adding many at a time takes little more
    than sorting them.
    """

    def __init__(self) -> None:
        self._runs: list[Digests] = []

    def has(self, wanted: Digests) -> NDArray[np.bool_]:
        """(n,) which of n are in the set."""
        found = np.zeros(len(wanted), bool)
        for run in self._runs:
            found |= run[np.minimum(np.searchsorted(run, wanted), len(run) - 1)] == wanted
        return found

    def add(self, added: Digests) -> NDArray[np.bool_]:
        """Add n, and say (n,) which of them were not there before; of equal ones, the first."""
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
