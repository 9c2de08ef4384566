"""What the soft labels of some of a table's positions hold: how much is kept, and how sure the teacher was.

From row groups spread evenly over the table, so that the largest table takes no longer; a small table is read whole.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.storage.codec import decode
from softlabel.storage.labels import SoftLabels
from softlabel.storage.log.state import Shard
from softlabel.storage.reader import Outline, current, stored_names
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table

_GROUPS = 16
"""Row groups in the sample."""
_NARROWEST = 0.5
"""Width in nats of the bars of the histogram ..."""
_BARS = 24
"""... and most of them; a table of undecided teachers gets wider ones."""


@dataclass(frozen=True)
class EntropyBar:
    """Positions at which the teacher's entropy is in a range, in nats."""

    low: float
    high: float
    positions: int


@dataclass(frozen=True)
class LabelSample:
    """Soft labels of a sample of positions."""

    positions: int
    """Size of the sample."""
    mass: float
    """Mean probability of the head: what is stored exactly."""
    ids: float
    """Mean number of ids in a head."""
    draws: float
    """Mean number of distinct ids drawn from outside the head."""
    cross_entropy: float
    """Mean of -log p of the tokens, or labels, that really followed, in nats; exp of it is the teacher's perplexity.
    NaN if none is known; all means leave out what the table does not know."""
    entropy: float
    """Mean entropy of the teacher's distributions, in nats."""
    histogram: tuple[EntropyBar, ...]
    """Positions by the teacher's entropy."""
    entropies: dict[str, float]
    """Bytes per position with a perfect code for single values, for each soft-label column."""


def label_sample(table: Table) -> LabelSample:
    """Measure a sample of a table's soft labels.

    Raises:
        IntegrityError: if a shard of the sample is damaged.
    """
    names = [name for name in SOFT_LABELS.names if name in table.schema.names]
    frequencies = {name: _Frequencies() for name in names}
    groups = []
    for shard, wanted in _spread(table):
        with Outline(table, shard) as opened:
            for group in _evenly(opened.row_groups, wanted):
                rows = opened.read(group, stored_names(table, SOFT_LABELS.names))
                for name, found in frequencies.items():
                    found.add(rows.column(name))
                groups.append(_small(decode(current(table, rows, SOFT_LABELS.names), table.numbering)))
    joined = [np.concatenate(each) for each in zip(*groups, strict=True)] or [np.zeros(0)] * 5
    kept, ids, draws, next_logprobs, entropies = joined
    positions = len(kept)
    return LabelSample(
        positions=positions,
        mass=_mean(kept),
        ids=_mean(ids),
        draws=_mean(draws),
        cross_entropy=_mean(-next_logprobs),
        entropy=_mean(entropies),
        histogram=_histogram(entropies[~np.isnan(entropies)]),
        entropies={name: found.bytes / max(positions, 1) for name, found in frequencies.items()} if groups else {},
    )


def _small(labels: SoftLabels) -> tuple[NDArray[Any], ...]:
    """(P,) probability of the head, ids in it, distinct draws, log-probability of what follows, and entropy."""
    kept = -np.expm1(labels.tail_log_masses[0].astype(np.float64))
    return kept, labels.head_counts, labels.tail_counts, labels.next_logprobs.astype(np.float64), labels.entropies


def _mean(values: NDArray[Any]) -> float:
    """Mean of the values that are known."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0 if not len(values) else float("nan")


class _Frequencies:
    """How often each value of a column occurs."""

    def __init__(self) -> None:
        self._values: NDArray[Any] = np.zeros(0)
        self._counts = np.zeros(0, np.int64)

    def add(self, column: pa.ChunkedArray) -> None:
        for chunk in column.chunks:
            values, counts = np.unique(chunk.flatten().to_numpy(), return_counts=True)
            joined = np.concatenate([self._values, values]) if len(self._values) else values
            self._values, place = np.unique(joined, return_inverse=True)
            self._counts = np.bincount(place, np.append(self._counts, counts), len(self._values)).astype(np.int64)

    @property
    def bytes(self) -> float:
        """Bytes of all values with a perfect code for single values."""
        total = self._counts.sum()
        if not total:
            return 0.0
        shares = self._counts / total
        return float(abs((shares * np.log2(shares)).sum())) * int(total) / 8  # not -0


def _spread(table: Table) -> list[tuple[Shard, int]]:
    """Shards at even distances in the table, each with how many of its row groups to read, at least 1."""
    shards = table.shards()
    chosen = [shards[i] for i in _evenly(len(shards), _GROUPS)]
    return [(shard, max(1, _GROUPS // len(chosen))) for shard in chosen]


def _evenly(count: int, wanted: int) -> list[int]:
    """At most this many of the numbers below a count, at even distances; all, if there are not more."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, wanted).astype(int))] if count else []


def _histogram(entropies: NDArray[np.float32]) -> tuple[EntropyBar, ...]:
    if not len(entropies):
        return ()
    highest = float(entropies.max())
    width = max(_NARROWEST, np.ceil(highest / _BARS / _NARROWEST) * _NARROWEST)
    edges = np.arange(int(highest / width) + 2) * width
    counts, _ = np.histogram(entropies, edges)
    return tuple(EntropyBar(float(a), float(b), int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False))
