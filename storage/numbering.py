"""How a table writes token ids as numbers that compress well.

Positions whose heads have similar ids form a cluster. Each cluster has an order of all token ids: first those that are
frequent at its positions, its list, and then all by their rank, which is the same everywhere. The place of an id in
that order, or the difference between two places, is written as a number whose bytes compress well. FORMAT.md specifies
the file. ``storage.clustering`` finds a numbering for a sample of soft labels.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Ints = NDArray[np.int32]

_DECIDING = 16
"""How many of a head's likeliest ids decide about its cluster."""
_STEPS_PER_BIT = 8
_HEADS_AT_ONCE = 512
"""So that the costs of their clusters fit into a processor's cache."""


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
        """(C x L + V,) token ids of all lists, one list after the other, and then of all ranks."""
        return np.concatenate([self.lists.ravel(), self.vocabulary])

    @cached_property
    def _own_places(self) -> NDArray[np.int16]:
        """(C, V) place of each token id in the list of each cluster; -1 if it is not there."""
        places = np.full((len(self.lists), len(self.vocabulary)), -1, np.int16)
        np.put_along_axis(places, self.lists, np.arange(self.lists.shape[1], dtype=np.int16)[None], axis=1)
        return places

    @cached_property
    def _costs(self) -> NDArray[np.int16]:
        """(V + 1, C) about what each token id takes in each cluster; nothing for the last row."""
        clusters, listed = self.lists.shape
        costs = np.zeros((len(self.vocabulary) + 1, clusters), np.int16)
        costs[:-1] = _cost(listed + self.ranks)[:, None]
        costs[self.lists.T, np.arange(clusters)] = _cost(np.arange(listed))[:, None]
        return costs

    def assign(self, ids: Ints, counts: NDArray[Any]) -> NDArray[np.int16]:
        """The cluster of each position: the one in which the first ids of its head have low places; 0 without a head.

        Args:
            ids: (sum of counts,) token ids, head after head.
            counts: (P,) ids in each head.
        """
        clusters = np.zeros(len(counts), np.int16)
        if len(self.lists) == 1:
            return clusters
        starts, nothing = np.cumsum(counts, dtype=np.int64) - counts, len(self.vocabulary)
        buffer = np.empty((_HEADS_AT_ONCE, len(self.lists)), np.int16)
        for first in range(0, len(counts), _HEADS_AT_ONCE):
            part = slice(first, first + _HEADS_AT_ONCE)
            total = np.zeros((len(counts[part]), len(self.lists)), np.int16)
            for place in range(min(_DECIDING, int(counts[part].max(initial=0)))):
                here = np.full(len(total), nothing)
                reaches = counts[part] > place
                here[reaches] = ids[starts[part][reaches] + place]
                total += np.take(self._costs, here, axis=0, out=buffer[: len(total)], mode="clip")
            clusters[part] = total.argmin(1)
        return clusters

    def places_of(self, ids: Ints, clusters: NDArray[Any]) -> Ints:
        """The place of each token id in its cluster."""
        listed = self.lists.shape[1]
        places: Ints = self.ranks[ids] + np.int32(listed)
        if listed:  # a flat take is twice as fast as an index for each dimension
            flat = clusters.astype(np.int64) * len(self.vocabulary) + ids
            own = self._own_places.ravel().take(flat)
            np.copyto(places, own, where=own >= 0)
        return places

    def ids_at(self, places: Ints, clusters: NDArray[Any]) -> Ints:
        """The token id at each place of its cluster: the inverse of ``places_of``."""
        count, listed = self.lists.shape
        own = clusters.astype(np.int32) * listed
        ids: Ints = self.token_ids[places + np.where(places < listed, own, (count - 1) * listed)]
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


def _cost(places: NDArray[Any]) -> NDArray[np.int16]:
    """About what a number takes, in steps of 1/8 bit, given how many ids are more frequent."""
    cost: NDArray[np.int16] = np.rint(_STEPS_PER_BIT * np.log2(places + 4.0)).astype(np.int16)
    return cost


def sorted_gaps(places: Ints, counts: NDArray[Any]) -> tuple[Ints, NDArray[np.int64]]:
    """The gaps between the sorted places of each position, of which the first counts from 0; and the order of these.

    Args:
        places: (sum of counts,) below 2^31, position after position.
        counts: (P,) places of each position.
    """
    at = np.repeat(np.arange(len(counts), dtype=np.int64) << 31, counts)
    order = np.argsort(at + places)
    return gaps_of(places[order], counts), order


def gaps_of(values: Ints, counts: NDArray[Any]) -> Ints:
    """The difference of each value from the one before it in its position, or from 0."""
    gaps = np.diff(values, prepend=np.int32(0))
    first = (np.cumsum(counts, dtype=np.int64) - counts)[counts > 0]
    gaps[first] = values[first]
    return gaps


def running_sums(gaps: NDArray[Any], counts: NDArray[Any]) -> Ints:
    """The values whose gaps are given: one running sum over all gaps, minus its value before each position."""
    running = np.cumsum(gaps, dtype=np.int64)
    before = np.append(np.int64(0), running)[np.cumsum(counts, dtype=np.int64) - counts]
    values: Ints = (running - np.repeat(before, counts)).astype(np.int32)
    return values
