"""Plans the order in which a student sees the sequences of a table, and which of them share a training row.

A plan is a pure function of the sequences' lengths, the table's row groups, the seed and the epoch. It knows no ranks,
workers, batch sizes or content of sequences: ranks take their share of it by position, so that a resumed run, or one
with another number of ranks, follows the same plan.
"""

import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: every sequence exactly once, in packs (training rows), in training order."""

    sequences: Ints
    """(sequences,) number of each sequence, pack after pack."""
    pack_starts: Ints
    """(packs + 1,) index in ``sequences`` at which each pack begins; the last entry is their number."""
    window_starts: Ints
    """(windows + 1,) the first pack of each window; the last entry is the number of packs."""

    @property
    def packs(self) -> int:
        """Number of training rows of the epoch."""
        return len(self.pack_starts) - 1

    @property
    def windows(self) -> int:
        """Number of windows of the epoch."""
        return len(self.window_starts) - 1

    def members(self, first: int, last: int) -> Ints:
        """Sequences of the packs from ``first`` up to, not including, ``last``."""
        return self.sequences[self.pack_starts[first] : self.pack_starts[last]]

    def window_of(self, pack: int) -> int:
        """Window of a pack; a pack never spans two."""
        return int(np.searchsorted(self.window_starts, pack, side="right")) - 1

    def window(self, number: int) -> Ints:
        """Sequences of a window."""
        return self.members(self.window_starts[number], self.window_starts[number + 1])


def plan_epoch(
    lengths: NDArray[np.int32],
    group_starts: Ints,
    max_length: int | None,
    window_tokens: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    counts: Ints | None = None,
) -> EpochPlan:
    """Order and packing of one epoch.

    The row groups are permuted by the seed and the epoch and cut into windows of ``window_tokens`` (a window ends with
    the row group that fills it). Within a window, the sequences of all its row groups are permuted and packed by best
    fit, and the packs are permuted. So sequences of different row groups may be anywhere in the epoch, while sequences
    of one row group stay within a window. Without shuffling, row groups, sequences and packs keep the table's order, as
    far as packing within a window allows. If a sequence comes more than once, copies of its row group are permuted
    independently.

    Args:
        lengths: (sequences,) tokens of each sequence, in the table's order; none exceeds ``max_length``.
        group_starts: (row groups + 1,) the first sequence of each row group, and the number of sequences.
        max_length: tokens of a training row; None for one sequence per row.
        window_tokens: tokens within which sequences are shuffled and packed.
        seed: seed of the order.
        epoch: number of the epoch, from 0.
        shuffle: False for the table's order.
        counts: (sequences,) how often each comes in this epoch; once each if None.
    """
    draw = _Draw(seed, epoch)
    groups = _copies(group_starts, np.ones(len(lengths), np.int64) if counts is None else counts)
    groups = [groups[place] for place in draw.permutation(len(groups), 0)] if shuffle else groups
    group_tokens = np.array([lengths[group].sum(dtype=np.int64) for group in groups], np.int64)
    before = np.cumsum(group_tokens) - group_tokens
    cuts = np.flatnonzero(np.diff(before // window_tokens)) + 1
    sequences, packs_counts, windows = [], [], [0]
    for number, (first, last) in enumerate(pairwise([0, *cuts.tolist(), len(groups)])):
        members = np.concatenate([np.arange(0), *groups[first:last]])
        if shuffle:
            members = members[draw.permutation(len(members), 2 * number + 1)]
        packs = np.arange(len(members)) if max_length is None else best_fit(lengths[members], max_length)
        if shuffle:
            # Best fit starts with the longest sequences; without this, every window would begin with them.
            packs = draw.permutation(packs.max(initial=-1) + 1, 2 * number + 2)[packs]
        sequences.append(members[np.argsort(packs, kind="stable")])
        packs_counts.append(np.bincount(packs))
        windows.append(windows[-1] + len(packs_counts[-1]))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(packs_counts))])
    return EpochPlan(np.concatenate(sequences), starts, np.array(windows))


def occurrences(weights: NDArray[np.float64], seed: int, epoch: int) -> Ints:
    """(sequences,) how often each comes in an epoch, so that its mean over epochs is its weight.

    By the end of epoch e, a sequence with weight w has come floor((e + 1) w + u) times, with u drawn for it from the
    seed: w = 2 is twice in each epoch; w = 0.5 is every second epoch, the even ones for half of the sequences.

    Args:
        weights: (sequences,) weight of each.
        seed: seed of the order.
        epoch: number of the epoch, from 0.
    """
    words = np.random.Philox(key=np.array([seed % 2**64, 0], np.uint64), counter=_PHASES).random_raw(len(weights))
    phases = (words >> np.uint64(32)) * 2.0**-32  # few enough bits that adding a whole number does not round
    counts: Ints = np.floor((epoch + 1) * weights + phases).astype(np.int64)
    return counts - np.floor(epoch * weights + phases).astype(np.int64)


_PHASES = np.array([0, 0, 1, 0], np.uint64)
"""Counter block that no permutation uses."""


def _copies(group_starts: Ints, counts: Ints) -> list[Ints]:
    """Sequences of each copy of each row group: copy n holds the sequences that come more than n times."""
    groups = [np.arange(first, last) for first, last in pairwise(group_starts.tolist())]
    return [group[counts[group] > copy] for group in groups for copy in range(counts[group].max(initial=0))]


def best_fit(lengths: NDArray[np.int32], capacity: int) -> Ints:
    """Best-fit decreasing: the longest first, each into the fullest pack that still has room for it.

    Args:
        lengths: (n,) none above ``capacity``.
        capacity: tokens of a pack.

    Returns:
        (n,) pack of each sequence; packs are numbered in the order of the first sequence that they hold.
    """
    assert lengths.max(initial=0) <= capacity, "a sequence is packed whole"
    count = len(lengths)
    packs = np.empty(count, np.int64)
    rooms: list[int] = []  # of packs that are not full, sorted: free tokens and number of the pack, in one integer
    opened = 0
    for item, length in zip(*_longest_first(lengths), strict=True):
        place = bisect_left(rooms, length * count)
        if place < len(rooms):
            room, pack = divmod(rooms.pop(place), count)
        else:
            room, pack, opened = capacity, opened, opened + 1
        packs[item] = pack
        if room > length:
            insort(rooms, (room - length) * count + pack)
    first = np.unique(packs, return_index=True)[1]
    renumbered: Ints = np.argsort(np.argsort(first))[packs]
    return renumbered


def accumulation(batch_size: int, world_size: int, micro_batch_size: int) -> int:
    """Number of micro-batches into which each rank cuts its share of ``batch_size`` packs."""
    return math.ceil(math.ceil(batch_size / world_size) / micro_batch_size)


def share(first: int, last: int, rank: int, world_size: int, micro_batch_size: int, micro: int) -> range:
    """Packs of one rank's micro-batch: the global batch is dealt out pack by pack, then cut into micro-batches.

    Args:
        first: first pack of the global batch.
        last: the pack after its last.
        rank: index of the rank.
        world_size: number of ranks.
        micro_batch_size: packs of a micro-batch.
        micro: index of the micro-batch; the range is empty if a short batch has no packs left for it.
    """
    return range(first + rank, last, world_size)[micro * micro_batch_size : (micro + 1) * micro_batch_size]


def _longest_first(lengths: NDArray[np.int32]) -> tuple[list[int], list[int]]:
    order = np.argsort(-lengths, kind="stable")
    return order.tolist(), lengths[order].tolist()


class _Draw:
    """Permutations from a seed and an epoch, by the counter-based Philox4x64, whose stream numpy keeps stable."""

    def __init__(self, seed: int, epoch: int) -> None:
        self._key = np.array([seed % 2**64, epoch], np.uint64)

    def permutation(self, count: int, stream: int) -> Ints:
        """A permutation of ``range(count)``; streams are independent of each other."""
        words = np.random.Philox(key=self._key, counter=np.array([0, 0, 0, stream], np.uint64)).random_raw(count)
        return np.argsort(words, kind="stable")
