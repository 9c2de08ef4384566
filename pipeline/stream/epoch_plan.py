"""In which order a student sees the sequences of a table, and which of them share a training row.

A plan is a pure function of the sequences' lengths, the table's row groups, the seed and the epoch: it knows no rank,
no worker and no batch size, and it never touches what a sequence holds. Whoever takes a share of it takes it by
position, so that another number of ranks, or a resumed run, sees the same plan.
"""

import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Cursor:
    """How far a student has come; all that a resumed run needs, whatever its number of ranks or its batch size."""

    step: int = 0
    """Optimizer steps done since the first epoch began."""
    epoch: int = 0
    """The epoch that the last of them was of, from 0."""
    packs: int = 0
    """Packs of that epoch that are done with, over all ranks."""


@dataclass(frozen=True)
class Plan:
    """One epoch: every sequence exactly once, in packs (training rows), in the order in which they are trained on."""

    sequences: Ints
    """(sequences,) number of each sequence, pack after pack."""
    pack_starts: Ints
    """(packs + 1,) where in ``sequences`` each pack begins; the last entry is where all end."""
    window_starts: Ints
    """(windows + 1,) the first pack of each window; the last entry is the number of packs."""

    @property
    def packs(self) -> int:
        """Training rows of the epoch."""
        return len(self.pack_starts) - 1

    @property
    def windows(self) -> int:
        """Windows of the epoch."""
        return len(self.window_starts) - 1

    def members(self, first: int, last: int) -> Ints:
        """Sequences of the packs from ``first`` up to, not including, ``last``."""
        return self.sequences[self.pack_starts[first] : self.pack_starts[last]]

    def window_of(self, pack: int) -> int:
        """The window that a pack is of; a pack never spans two."""
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
) -> Plan:
    """Order and packing of one epoch.

    The row groups are put in an order that the seed and the epoch draw, and that order is cut into windows of
    ``window_tokens`` (a window ends with the row group that fills it). Within a window the sequences of all its row
    groups are permuted, packed by best fit, and the packs permuted. So two sequences of different row groups are
    anywhere in the epoch, while two of one row group are at most a window apart: what was captured together is spread
    over a window, not over the epoch. Without shuffling, row groups, sequences and packs keep the table's order, as
    far as packing within a window lets them. A sequence that comes more than once comes with copies of its row group,
    each of which has a place of its own in the epoch.

    Args:
        lengths: (sequences,) tokens of each sequence, in the table's order; none exceeds ``max_length``.
        group_starts: (row groups + 1,) the first sequence of each row group, and the number of sequences.
        max_length: tokens of a training row; None for a row, and so a pack, of its own for each sequence.
        window_tokens: tokens among which sequences are mixed and packed.
        seed: of the order.
        epoch: which pass this is, from 0.
        shuffle: False for the table's own order.
        counts: (sequences,) how often each comes in this epoch; once each if left out.
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
            # Best fit opens the packs of the longest first; without this, every window would begin with them.
            packs = draw.permutation(packs.max(initial=-1) + 1, 2 * number + 2)[packs]
        sequences.append(members[np.argsort(packs, kind="stable")])
        packs_counts.append(np.bincount(packs))
        windows.append(windows[-1] + len(packs_counts[-1]))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(packs_counts))])
    return Plan(np.concatenate(sequences), starts, np.array(windows))


def occurrences(weights: NDArray[np.float64], seed: int, epoch: int) -> Ints:
    """(sequences,) how often each comes in an epoch, so that over the epochs it comes as often as its weight says.

    By the end of epoch e a sequence has come floor((e + 1) w + u) times, u being drawn for it from the seed: w = 2 is
    twice in each epoch, w = 0.5 is every second one, for one half of the sequences the even ones.

    Args:
        weights: (sequences,) of each.
        seed: of the order.
        epoch: which pass this is, from 0.
    """
    words = np.random.Philox(key=np.array([seed % 2**64, 0], np.uint64), counter=_PHASES).random_raw(len(weights))
    phases = (words >> np.uint64(32)) * 2.0**-32  # few enough bits that adding a whole epoch to them rounds nothing
    counts: Ints = np.floor((epoch + 1) * weights + phases).astype(np.int64)
    return counts - np.floor(epoch * weights + phases).astype(np.int64)


_PHASES = np.array([0, 0, 1, 0], np.uint64)
"""Where no permutation counts."""


def _copies(group_starts: Ints, counts: Ints) -> list[Ints]:
    """Sequences of each row group, and again, as often as one of them comes, of those that come so often."""
    groups = [np.arange(first, last) for first, last in pairwise(group_starts.tolist())]
    return [group[counts[group] > copy] for group in groups for copy in range(counts[group].max(initial=0))]


def best_fit(lengths: NDArray[np.int32], capacity: int) -> Ints:
    """Best-fit decreasing: the longest first, each into the fullest pack that still has room for it.

    Args:
        lengths: (n,) none above ``capacity``.
        capacity: of a pack.

    Returns:
        (n,) number of the pack that each went to; packs are numbered by the first that they hold.
    """
    assert lengths.max(initial=0) <= capacity, "a sequence is packed whole"
    count = len(lengths)
    packs = np.empty(count, np.int64)
    rooms: list[int] = []  # of packs that are not full, sorted: the room that is left, and the pack's number, in one
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
    """Micro-batches that each rank makes of its share of ``batch_size`` packs."""
    return math.ceil(math.ceil(batch_size / world_size) / micro_batch_size)


def share(first: int, last: int, rank: int, world_size: int, micro_batch_size: int, micro: int) -> range:
    """Packs of one rank's micro-batch: the global batch is dealt out pack by pack, then cut into micro-batches.

    Args:
        first: first pack of the global batch.
        last: the pack after its last.
        rank: whose share.
        world_size: how many share.
        micro_batch_size: packs of a micro-batch.
        micro: which micro-batch; the range is empty where a short batch has none left.
    """
    return range(first + rank, last, world_size)[micro * micro_batch_size : (micro + 1) * micro_batch_size]


def _longest_first(lengths: NDArray[np.int32]) -> tuple[list[int], list[int]]:
    order = np.argsort(-lengths, kind="stable")
    return order.tolist(), lengths[order].tolist()


class _Draw:
    """Permutations from a seed and an epoch, of the counter-based Philox4x64, which no release of numpy may change."""

    def __init__(self, seed: int, epoch: int) -> None:
        self._key = np.array([seed % 2**64, epoch], np.uint64)

    def permutation(self, count: int, stream: int) -> Ints:
        """A permutation of ``range(count)``; streams are independent of each other."""
        words = np.random.Philox(key=self._key, counter=np.array([0, 0, 0, stream], np.uint64)).random_raw(count)
        return np.argsort(words, kind="stable")
