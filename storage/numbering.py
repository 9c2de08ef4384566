"""How a table writes token ids as numbers that compress well.

Positions whose heads have similar ids form a cluster. Each cluster has an order of all token ids: first those that are
frequent at its positions, its list, and then all by their rank, which is the same everywhere. The place of an id in
that order, or the difference between two places, is written as a number whose bytes compress well. FORMAT.md specifies
the file. ``storage.clustering`` finds a numbering for a sample of soft labels.
"""

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Ints = NDArray[np.int32]

_DECIDING = 64
"""How many of a head's likeliest ids decide about its cluster."""
_STEPS_PER_BIT = 4
_MOST_SAVED = 63
"""In steps: what four ids save fits into a byte."""


@dataclass(frozen=True, eq=False)
class Numbering:
    """The places of V token ids in each of C clusters, whose lists have L ids, and the number of each place."""

    vocabulary: Ints
    """(V,) token id of each rank; frequent ids come first. The id of rank r is at place L + r in all clusters."""
    lists: Ints
    """(C, L) token id at each of the first places, which are the cluster's own."""
    numbers: Ints
    """(L + V,) number of each place."""

    @classmethod
    def by_rank(cls, vocabulary: Ints) -> Self:
        """The numbering whose places and numbers are ranks, in a single cluster."""
        return cls(vocabulary, np.zeros((1, 0), np.int32), np.arange(len(vocabulary), dtype=np.int32))

    @classmethod
    def of_ids(cls, vocabulary: int) -> Self:
        """The numbering whose places and numbers are token ids, in a single cluster."""
        return cls.by_rank(np.arange(vocabulary, dtype=np.int32))

    @cached_property
    def ranks(self) -> Ints:
        """(V,) rank of each token id, the inverse of ``vocabulary``."""
        ranks = np.empty_like(self.vocabulary)
        ranks[self.vocabulary] = np.arange(len(ranks), dtype=np.int32)
        return ranks

    @cached_property
    def places(self) -> Ints:
        """Place of each number, the inverse of ``numbers``; -1 for a number that is not in use."""
        places = np.full(1 + self.numbers.max(initial=-1), -1, np.int32)
        places[self.numbers] = np.arange(len(self.numbers))
        return places

    @cached_property
    def token_ids(self) -> Ints:
        """(C x L + V,) the token id at each place of cluster 0, and then the lists of the other clusters."""
        return np.concatenate([self.lists[0], self.vocabulary, self.lists[1:].ravel()])

    @cached_property
    def starts(self) -> Ints:
        """(C,) where in ``token_ids`` the list of each cluster starts."""
        clusters, listed = self.lists.shape
        starts: Ints = len(self.vocabulary) + listed * np.arange(clusters, dtype=np.int32)
        starts[0] = 0
        return starts

    @cached_property
    def _places_by_rank(self) -> Ints:
        """(C, V) the place of the id of each rank in each cluster, the lower one of two."""
        return self._by_rank(np.arange(len(self.numbers), dtype=np.int32))

    @cached_property
    def _numbers_by_rank(self) -> Ints:
        """(C, V) the number of the place of the id of each rank in each cluster."""
        return self._by_rank(self.numbers.astype(np.int32))

    def _by_rank(self, values: Ints) -> Ints:
        """(C, V) the value at the place of the id of each rank; those of frequent ids are close together in memory."""
        clusters, listed = self.lists.shape
        found: Ints = np.tile(values[listed:], (clusters, 1))
        np.put_along_axis(found, self.ranks[self.lists], values[None, :listed], axis=1)
        return found

    @cached_property
    def _saved(self) -> NDArray[np.uint8]:
        """(V + 1, C) about what each cluster saves for the id of each rank; nothing for the last row."""
        clusters, listed = self.lists.shape
        saved, ranks = np.zeros((len(self.vocabulary) + 1, clusters), np.uint8), self.ranks[self.lists]
        steps = np.rint(_cost(listed + ranks) - _cost(np.arange(listed)))
        saved[ranks, np.arange(clusters)[:, None]] = np.minimum(steps, _MOST_SAVED)
        return saved

    def assign(self, ids: Ints, counts: NDArray[Any]) -> NDArray[np.int16]:
        """The cluster of each position: the one in which the first ids of its head have low places; 0 without a head.

        Args:
            ids: (sum of counts,) token ids, head after head.
            counts: (P,) ids in each head.
        """
        clusters = np.zeros(len(counts), np.int16)
        if len(self.lists) > 1:
            _kernels().assign(*self._ready(ids, counts), self._saved, _DECIDING, clusters)
        return clusters

    def number_heads(self, ids: Ints, counts: NDArray[Any], clusters: NDArray[Any]) -> Ints:
        """The number of the place of each id.

        Args:
            ids: (sum of counts,) token ids, head after head.
            counts: (P,) ids in each head.
            clusters: (P,) cluster of each position.
        """
        found = np.empty(len(ids), np.int32)
        _kernels().number_heads(*self._ready(ids, counts), _typed(clusters, np.int16), self._numbers_by_rank, found)
        return found

    def number_tails(self, ids: Ints, counts: NDArray[Any], clusters: NDArray[Any]) -> tuple[Ints, NDArray[np.int64]]:
        """The numbers of the gaps between the sorted places of each position; and the entry that each place is from.

        Args:
            ids: (sum of counts,) token ids, tail after tail.
            counts: (P,) ids in each tail; fewer than 2^15.
            clusters: (P,) cluster of each position.
        """
        found, order, together = (
            np.empty(len(ids), np.int32),
            np.empty(len(ids), np.int64),
            np.empty(len(ids), np.int64),
        )
        if len(ids):
            bits, entries = len(self.numbers).bit_length(), self._ready(ids, counts)
            assert len(counts).bit_length() + bits + 15 < 64, "what is sorted has 64 bits"
            _kernels().places_with_entries(*entries, _typed(clusters, np.int16), self._places_by_rank, bits, together)
            together.sort()
            _kernels().number_gaps(together, entries[1], bits, _typed(self.numbers, np.int32), found, order)
        return found, order

    def _ready(self, ids: Ints, counts: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Entries and ranks in the types that the kernels take; these check no bounds."""
        assert len(ids) == counts.sum(), "the counts are those of the ids"
        assert counts.min(initial=0) >= 0
        if ids.min(initial=0) < 0 or ids.max(initial=-1) >= len(self.vocabulary):
            raise IndexError(f"token ids from {ids.min()} to {ids.max()} are not all below {len(self.vocabulary)}")
        return _typed(ids, np.int32), _typed(counts, np.int64), self.ranks

    def ids_at(self, places: Ints, counts: NDArray[Any], clusters: NDArray[Any]) -> Ints:
        """The token id at each place.

        Args:
            places: (sum of counts,) places in the position's cluster, position after position.
            counts: (P,) places of each position.
            clusters: (P,) cluster of each position.
        """
        at = np.repeat(self.starts.take(clusters), counts)
        at *= places < self.lists.shape[1]
        at += places
        ids: Ints = self.token_ids.take(at)
        return ids

    def to_parquet(self) -> bytes:
        """The content of the table's vocabulary file."""
        (clusters, listed), ids = self.lists.shape, len(self.vocabulary)
        common, own = np.arange(listed, listed + ids), np.tile(np.arange(listed), clusters)
        places = np.concatenate([common, own]).astype(np.int32)
        file = pa.table(
            {
                "cluster": pa.array(
                    np.repeat(np.arange(-1, clusters), [ids] + [listed] * clusters).astype(np.int16),
                    mask=np.arange(len(places)) < ids,
                ),
                "place": places,
                "number": self.numbers[places],
                "token_id": np.concatenate([self.vocabulary, self.lists.ravel()]),
            }
        )
        steps = np.array_equal(self.numbers, np.arange(len(self.numbers)))
        options: dict[str, Any] = {
            "compression": "zstd",
            "compression_level": 12,
            "write_statistics": False,
            "use_dictionary": False,
            "column_encoding": {
                "cluster": "DELTA_BINARY_PACKED",
                "place": "DELTA_BINARY_PACKED",
                "number": "DELTA_BINARY_PACKED" if steps else "BYTE_STREAM_SPLIT",  # all lists have the same
                "token_id": "BYTE_STREAM_SPLIT",
            },
        }
        sink = pa.BufferOutputStream()
        pq.write_table(file, sink, **options)
        content: bytes = sink.getvalue().to_pybytes()
        return content

    @classmethod
    def from_parquet(cls, content: bytes) -> Self:
        """The numbering in a vocabulary file. One of format 1 has only ranks, and token ids in their order."""
        file = pq.read_table(pa.BufferReader(content))
        if "place" not in file.column_names:
            return cls.by_rank(file.column("token_id").to_numpy())
        places, numbers, ids = (file.column(name).to_numpy() for name in ("place", "number", "token_id"))
        clusters = file.column("cluster").fill_null(-1).to_numpy()
        common, count = clusters < 0, 1 + max(int(clusters.max(initial=-1)), 0)
        listed = int(places[common].min(initial=len(places)))
        vocabulary, lists = np.empty(common.sum(), np.int32), np.empty((count, listed), np.int32)
        vocabulary[places[common] - listed] = ids[common]
        lists[clusters[~common], places[~common]] = ids[~common]
        all_numbers = np.empty(listed + len(vocabulary), np.int32)
        all_numbers[places] = numbers
        return cls(vocabulary, lists, all_numbers)


def _cost(places: NDArray[Any]) -> NDArray[np.float64]:
    """About what a number takes, in steps of 1/4 bit, given how many ids are more frequent."""
    cost: NDArray[np.float64] = _STEPS_PER_BIT * np.log2(places + 4.0)
    return cost


def _kernels() -> ModuleType:
    """Imported by what needs it: numba takes a third of a second, and most readers do not number ids."""
    from softlabel.storage import kernels

    return kernels


def _typed(values: NDArray[Any], kind: type[np.signedinteger[Any]]) -> NDArray[Any]:
    """Values of the one type for which a kernel is compiled: Arrow's arrays can't be written to, which is another."""
    return np.require(values, kind, ["C", "W"])


def gaps_of(values: Ints, counts: NDArray[Any]) -> Ints:
    """The difference of each value from the one before it in its position, or from 0."""
    gaps = np.diff(values, prepend=np.int32(0))
    first = (np.cumsum(counts, dtype=np.int64) - counts)[counts > 0]
    gaps[first] = values[first]
    return gaps


def running_sums(gaps: NDArray[Any], counts: NDArray[Any]) -> Ints:
    """The values whose gaps are given: one running sum over all gaps, minus its value before each position.

    The sum over all may wrap around, and the difference is then still right.
    """
    filled = counts > 0
    starts = (np.cumsum(counts, dtype=np.int64) - counts)[filled]
    values = np.cumsum(gaps, dtype=np.int32)
    values -= np.repeat(values[starts] - gaps[starts].astype(np.int32), counts[filled])
    return values
