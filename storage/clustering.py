"""Finds a numbering of token ids (``storage.numbering``) under which the soft labels of a sample take few bytes.

Heads are clustered as by Lloyd's method: each goes to the cluster that numbers its ids lowest, and each cluster then
numbers the ids that are frequent in its heads. How many clusters there are, and how many ids each of them numbers,
depends on what the sample gains by them, so that small tables get a single cluster, and ranks for numbers. Every result
is valid, because it is stored with the table: rounding on another machine affects sizes only.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from softlabel.storage.labels import Ints, SoftLabels
from softlabel.storage.numbering import Numbering

SAMPLE = 65_536
"""Positions from which a table's numbering is found, if it has so many."""

_CLUSTERS = (16, 64, 256)
_LISTED = (256, 1024)
"""Numbers of clusters, and of ids in each, that are tried."""
_GROWTH = 4
"""How many times as large as a full sample a table is expected to become."""
_FEWEST_IDS = 1 << 16
"""Ids in the heads of a sample below which clusters are not tried."""
_ROUNDS = 8
_LAST_ROUNDS = 16
"""Rounds of the method for each shape, and for the one that is chosen."""
_PRIOR = 300.0
"""Weight of the frequencies in all heads in those of one cluster, in ids."""
_SPREAD = 8192
"""How many of the most frequent ids get numbers with two independent bytes."""


def fit(sample: SoftLabels, vocabulary: int) -> Numbering:
    """A numbering for soft labels like those of a sample.

    Args:
        sample: soft labels of some positions, at best of ``SAMPLE``.
        vocabulary: V, number of token ids; ids that do not occur get the last ranks, in ascending order.
    """
    frequencies = np.bincount(np.concatenate([sample.head_ids, sample.tail_ids]), minlength=vocabulary)
    plain = Numbering.by_rank(np.argsort(-frequencies, kind="stable").astype(np.int32))
    if len(sample.head_ids) < _FEWEST_IDS:
        return plain
    ids = _Ids(sample.head_ids, sample.head_counts, sample.tail_ids, sample.tail_counts)
    growth = _GROWTH if sample.positions >= SAMPLE else 1
    cut = 2 * sample.positions // 3
    known, held_out = ids[:cut], ids[cut:]  # of different documents

    def cost(numbering: Numbering, of: _Ids) -> float:
        return of.bytes(numbering) / len(of.head_counts) * sample.positions * growth + len(numbering.to_parquet())

    shapes = [(1, 0), *(shape for shape in product(_CLUSTERS, _LISTED) if shape[1] < vocabulary)]
    best = min(shapes, key=lambda shape: cost(_clustered(known, plain.vocabulary, *shape), held_out))
    found = _clustered(ids, plain.vocabulary, *best, _LAST_ROUNDS)
    return min(plain, found, key=lambda numbering: cost(numbering, ids))


@dataclass(frozen=True)
class _Ids:
    """The ids of P positions, position after position."""

    heads: Ints
    head_counts: Ints
    tails: Ints
    tail_counts: Ints

    def __getitem__(self, part: slice) -> Self:
        """The ids of some of the positions."""
        chosen = np.zeros(len(self.head_counts), bool)
        chosen[part] = True
        return type(self)(
            self.heads[np.repeat(chosen, self.head_counts)],
            self.head_counts[part],
            self.tails[np.repeat(chosen, self.tail_counts)],
            self.tail_counts[part],
        )

    @property
    def all(self) -> Ints:
        """All ids, those of heads first."""
        return np.concatenate([self.heads, self.tails])

    def of_each(self, clusters: NDArray[Any]) -> NDArray[Any]:
        """The cluster of each id in ``all``, given those of the positions."""
        return np.concatenate([np.repeat(clusters, counts) for counts in (self.head_counts, self.tail_counts)])

    def bytes(self, numbering: Numbering) -> float:
        """About what clusters and numbers take in a shard, where each byte of a number is coded on its own."""
        clusters = numbering.assign(self.heads, self.head_counts)
        numbers = numbering.number_heads(self.heads, self.head_counts, clusters)
        gaps, _ = numbering.number_tails(self.tails, self.tail_counts, clusters)
        parts = [clusters, *(values >> shift & 255 for values in (numbers, gaps) for shift in (0, 8, 16))]
        return sum(map(_bytes, parts))


def _bytes(values: NDArray[Any]) -> float:
    """What a Huffman code of single values takes, a bit each at least."""
    shares = np.bincount(values) / max(len(values), 1)
    shares = shares[shares > 0]
    bits = float(-(shares * np.log2(shares)).sum())
    return len(values) * (max(bits, 1.0) if len(shares) > 1 else 0.0) / 8


def _clustered(ids: _Ids, vocabulary: Ints, clusters: int, listed: int, rounds: int = _ROUNDS) -> Numbering:
    """A numbering with so many clusters, and lists of so many ids."""
    numbers = _numbers(listed + len(vocabulary))
    found = Numbering(vocabulary, np.zeros((clusters, 0), np.int32), numbers)
    if not listed:
        return found
    # At first, the heads that begin with one of the most frequent ids are a cluster, and the others are in none.
    filled = ids.head_counts > 0
    assigned = np.full(len(filled), -1)
    assigned[filled] = found.ranks[ids.heads[(np.cumsum(ids.head_counts) - ids.head_counts)[filled]]]
    for _ in range(rounds):
        found = replace(found, lists=_lists(ids, assigned, found, clusters, listed))
        assigned = found.assign(ids.heads, ids.head_counts)
    return found


def _lists(ids: _Ids, assigned: NDArray[Any], known: Numbering, clusters: int, listed: int) -> Ints:
    """(clusters, listed) the ids that are most frequent in each cluster, and then those that are everywhere."""
    everywhere = np.bincount(ids.all, minlength=len(known.vocabulary))
    prior = everywhere * (_PRIOR / everywhere.sum())
    of_each = ids.of_each(assigned)
    order = np.argsort(of_each, kind="stable")
    bounds = np.searchsorted(of_each[order], np.arange(clusters + 1))
    by_cluster = ids.all[order]
    lists = np.empty((clusters, listed), np.int32)
    for cluster in range(clusters):
        here = by_cluster[bounds[cluster] : bounds[cluster + 1]]
        weights = prior + np.bincount(here, minlength=len(prior))
        top = np.argpartition(-weights, listed)[:listed]
        lists[cluster] = top[np.lexsort((known.ranks[top], -weights[top]))]
    return lists


def _numbers(count: int) -> Ints:
    """So many numbers, for the first places first.

    Files compress each byte of the numbers on its own. The first numbers are the cells of a square of both bytes in the
    order of (high + 8) x (low + 8), so that the two bytes are nearly independent, and evenly used.
    """
    cells = np.arange(max(count, 1 << 16), dtype=np.int32)
    spread = np.argsort(((cells[: 1 << 16] >> 8) + 8) * ((cells[: 1 << 16] & 255) + 8), kind="stable")[:_SPREAD]
    numbers: Ints = np.concatenate([cells[spread], np.delete(cells, spread)])[:count].astype(np.int32)
    return numbers
