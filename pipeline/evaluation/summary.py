"""The figures of a report, with their errors and bounds, from the sums of an evaluation. Measures nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, isinf, log, sqrt
from typing import Any

import numpy as np

from softlabel.pipeline.evaluation.bootstrap import Difference, Estimate, Floats, Sums, difference, estimate, worth
from softlabel.pipeline.evaluation.figures import (
    Bin,
    Bounded,
    Calibration,
    Comparison,
    Group,
    KlKind,
    Metrics,
    TeacherGroup,
    TeacherMetrics,
)
from softlabel.pipeline.evaluation.metrics import (
    BINNED,
    CONFIDENCE_BINS,
    ENTROPY_BIN,
    ENTROPY_BINS,
    POSITION_BINS,
    QUANTITIES,
)
from softlabel.pipeline.evaluation.standings import Gap

_Range = tuple[str, float | None, float | None]


def _entropy_range(number: int) -> _Range:
    low, high = number * ENTROPY_BIN, (number + 1) * ENTROPY_BIN
    return f"{low:g}-{high:g} nats", low, high


def _position_range(number: int) -> _Range:
    low, high = 2**number, 2 ** (number + 1)
    return f"{low}" if high == low + 1 else f"{low:,}-{high - 1:,}", low, high


def _column(name: str, values: Sequence[str]) -> tuple[str, Sequence[_Range]]:
    """The part of the sums for a column, and its values."""
    return f"column {name}", [(value, None, None) for value in values]


_ENTROPY_RANGES = [_entropy_range(number) for number in range(ENTROPY_BINS)]
_POSITION_RANGES = [_position_range(number) for number in range(POSITION_BINS)]
"""What each cell of a part of the sums stands for."""


@dataclass(frozen=True)
class Cell:
    """The sums over some positions, as they are (first) and in each replicate of the bootstrap."""

    values: Mapping[str, Floats]
    """(1 + replicates,) of each of ``QUANTITIES``."""
    bins: Mapping[str, Mapping[str, Floats]]
    """(1 + replicates, CONFIDENCE_BINS) by kind and quantity of ``BINNED``."""
    documents: float
    """How many documents of equal size the positions are worth."""
    average: bool
    """Whether the teacher is an average of several: then little is known."""

    @property
    def positions(self) -> int:
        """Number of positions."""
        return int(self.values["positions"][0])

    def ratio(self, name: str, by: str = "positions") -> Floats:
        """(1 + replicates,) mean of a quantity over the positions that ``by`` counts."""
        with np.errstate(invalid="ignore", divide="ignore"):
            result: Floats = self.values[name] / self.values[by]
        return result

    def mean(self, name: str) -> Estimate:
        """Mean over all positions of a quantity that is known everywhere."""
        return estimate(self.ratio(name), self.documents)

    def figures(self) -> dict[str, Any]:
        """The fields of ``Figures``."""
        cross_entropy, kl = self.mean("cross_entropy"), self._bounded("forward_kl")
        assert kl is not None
        variation = None if self.average else self._bounded("total_variation")
        return {
            "positions": self.positions,
            "cross_entropy": cross_entropy,
            "perplexity": _perplexity(cross_entropy),
            "bits_per_byte": self._bits_per_byte("cross_entropy"),
            "kl": _unbounded(kl) if self.average else kl,
            "reverse_kl": None if self.average else self._bounded("reverse_kl"),
            "jsd": None if self.average else self._bounded("jsd"),
            "total_variation": variation,
            "acceptance": None if variation is None else _complement(variation),
            "tokens_per_step": None if self.average else self._bounded("steps", "windows", "windows"),
            "agreement": self._where_known("agreement", "agreement_known"),
            "top_agreement": None if self.average else self._bounded("top", "top_known"),
            "top_positions": int(self.values["top_known"][0]),
            "confidence": None if self.average else self.mean("confidence"),
            "correct": None if self.average else self.mean("correct"),
            "calibration": self._calibration("calibration", teacher=False),
        }

    def teacher(self) -> dict[str, Any]:
        """The fields of ``TeacherFigures``."""
        cross_entropy = self.mean("teacher_cross_entropy")
        return {
            "cross_entropy": cross_entropy,
            "perplexity": _perplexity(cross_entropy),
            "bits_per_byte": self._bits_per_byte("teacher_cross_entropy"),
            "entropy": self.mean("teacher_entropy"),
            "calibration": self._calibration("teacher's calibration", teacher=True),
        }

    def _where_known(self, name: str, by: str) -> Estimate | None:
        """Mean over the positions that ``by`` counts; None if there are none."""
        values = self.ratio(name, by)
        return None if np.isnan(values[0]) else estimate(values, self.documents)

    def _bounded(self, name: str, by: str = "positions", bounds_by: str = "positions") -> Bounded | None:
        """Mean of a quantity with its certain bounds; None if it is known nowhere."""
        mean = self._where_known(name, by)
        low, high = (float(self.ratio(f"{name}{end}", bounds_by)[0]) for end in ("_low", "_high"))
        if mean is None:
            return None
        return Bounded(*_fields(mean), low, None if isinf(high) else high, self._sampling_error(name))

    def _sampling_error(self, name: str) -> float | None:
        if f"{name}_variance" not in self.values or self.values["unsampled"][0]:
            return None
        return sqrt(self.values[f"{name}_variance"][0]) / self.positions

    def _bits_per_byte(self, name: str) -> Estimate | None:
        nats = self._where_known(name, "bytes")
        return None if nats is None or isinf(nats.mean) else _scaled(nats, 1 / log(2))

    def _calibration(self, kind: str, *, teacher: bool) -> Calibration | None:
        cells, prefix = self.bins[kind], "teacher_" if teacher else ""
        positions, confidence, correct = (
            cells[name] for name in ("positions", f"{prefix}confidence", f"{prefix}correct")
        )
        if not positions[0].any():
            return None
        bins = []
        for number in np.flatnonzero(positions[0]).tolist():
            mean = {name: float(values[0, number] / positions[0, number]) for name, values in cells.items()}
            bins.append(
                Bin(
                    number / CONFIDENCE_BINS,
                    (number + 1) / CONFIDENCE_BINS,
                    int(positions[0, number]),
                    mean[f"{prefix}confidence"],
                    mean[f"{prefix}correct"],
                    None if teacher else mean["teacher"],
                    None if teacher else (mean["teacher_low"], mean["teacher_high"]),
                )
            )
        with np.errstate(invalid="ignore", divide="ignore"):
            errors = [
                np.abs(confidence - target).sum(1) / positions.sum(1)
                for target in ([correct] if teacher else [correct, cells["teacher"]])
            ]
        found = [estimate(values, self.documents) for values in errors]
        bounds = None if teacher else _distance_bounds(bins)
        return Calibration(found[0], None if teacher else found[1], tuple(bins), bounds)


@dataclass(frozen=True)
class Measurement:
    """One student's sums, and how many documents of equal size all positions are worth."""

    sums: Sums
    documents: float
    average: bool
    """Whether the teacher is an average of several."""

    @cached_property
    def overall(self) -> Cell:
        """The sums over all positions."""
        return self._cell("overall", 0, self.documents)

    def metrics(self, sequences: int, documents: int, groups: Mapping[str, Sequence[str]]) -> Metrics:
        """All metrics of the student.

        Args:
            sequences: number of sequences measured.
            documents: number of documents measured.
            groups: values of each column that the sums are grouped by.
        """
        kinds: dict[bool, KlKind] = {True: "lower bound", False: "unbiased"}

        def those(part: str, ranges: Sequence[_Range]) -> tuple[Group, ...]:
            return tuple(Group(**where, **cell.figures()) for where, cell in self._groups(part, ranges))

        return Metrics(
            **self.overall.figures(),
            sequences=sequences,
            documents=documents,
            kl_kind="mean over teachers" if self.average else kinds[self.overall.values["unsampled"][0] > 0],
            by_entropy=those("entropy", _ENTROPY_RANGES),
            by_position=those("position", _POSITION_RANGES),
            by_column={name: those(*_column(name, values)) for name, values in groups.items()},
        )

    def teacher(self, groups: Mapping[str, Sequence[str]]) -> TeacherMetrics:
        """The teacher's metrics, which the student's sums contain."""

        def those(part: str, ranges: Sequence[_Range]) -> tuple[TeacherGroup, ...]:
            found = self._groups(part, ranges)
            return tuple(TeacherGroup(**where, positions=cell.positions, **cell.teacher()) for where, cell in found)

        return TeacherMetrics(
            **self.overall.teacher(),
            by_entropy=those("entropy", _ENTROPY_RANGES),
            by_position=those("position", _POSITION_RANGES),
            by_column={name: those(*_column(name, values)) for name, values in groups.items()},
        )

    def _groups(self, part: str, ranges: Sequence[_Range]) -> Iterator[tuple[dict[str, Any], Cell]]:
        """The groups with positions: what they are, and their sums."""
        counts = self._array(part, QUANTITIES)[:, :, QUANTITIES.index("positions")]
        for number, (name, low, high) in enumerate(ranges):
            if counts[0, number]:
                documents = min(self.documents, worth(counts[:, number]))
                yield {"name": name, "low": low, "high": high}, self._cell(part, number, documents)

    def _cell(self, part: str, number: int, documents: float) -> Cell:
        values = self._array(part, QUANTITIES)[:, number]
        bins = {}
        for kind, (_, names) in BINNED.items():
            binned = self._array(f"{part}: {kind}", names)[:, number * CONFIDENCE_BINS : (number + 1) * CONFIDENCE_BINS]
            bins[kind] = dict(zip(names, np.moveaxis(binned, 2, 0), strict=True))
        return Cell(dict(zip(QUANTITIES, values.T, strict=True)), bins, documents, self.average)

    def _array(self, part: str, names: Sequence[str]) -> Floats:
        """(1 + replicates, cells, names) of a part."""
        values = self.sums.values[part]
        return values.reshape(len(values), -1, len(names))


def _distance_bounds(bins: Sequence[Bin]) -> tuple[float, float]:
    """The smallest and the largest mean distance of the confidence from what the teacher's probability can be."""
    smallest = largest = 0.0
    for each in bins:
        assert each.teacher_bounds is not None
        low, high = each.teacher_bounds
        smallest += each.positions * max(0.0, low - each.confidence, each.confidence - high)
        largest += each.positions * max(abs(each.confidence - low), abs(each.confidence - high))
    positions = sum(each.positions for each in bins)
    return smallest / positions, largest / positions


def compared(names: Sequence[str], overall: Sequence[Cell]) -> tuple[Comparison, ...]:
    """Each pair of students, measured on the same documents."""
    pairs = []
    for first in range(len(names)):
        for second in range(first + 1, len(names)):
            a, b = overall[first], overall[second]

            def less(name: str, a: Cell = a, b: Cell = b, sign: int = 1) -> Difference:
                return difference(sign * a.ratio(name), sign * b.ratio(name), a.documents)

            pairs.append(
                Comparison(
                    names[first],
                    names[second],
                    less("forward_kl"),
                    less("cross_entropy"),
                    None if a.average else less("total_variation", sign=-1),
                )
            )
    return tuple(pairs)


def gaps_closed(names: Sequence[str], overall: Sequence[Cell], gap: Gap | None) -> tuple[Estimate | None, ...]:
    """Share of the gap in forward KL between control and reference that each student closes; None without a gap."""
    if gap is None:
        return (None,) * len(names)
    kl = {name: each.ratio("forward_kl") for name, each in zip(names, overall, strict=True)}
    start = kl[gap.control]
    width = start - (0.0 if gap.reference is None else kl[gap.reference])
    documents = overall[0].documents
    with np.errstate(invalid="ignore", divide="ignore"):
        return tuple(estimate((start - kl[name]) / width, documents) for name in names)


def _fields(mean: Estimate) -> tuple[float, float | None, tuple[float, float] | None]:
    return mean.mean, mean.error, mean.interval


def _scaled(mean: Estimate, factor: float) -> Estimate:
    error = None if mean.error is None else mean.error * factor
    interval = None if mean.interval is None else (mean.interval[0] * factor, mean.interval[1] * factor)
    return Estimate(mean.mean * factor, error, interval)


def _perplexity(cross_entropy: Estimate) -> Estimate:
    """exp of a cross-entropy in nats, with its interval; the error is propagated to first order."""
    mean = _exp(cross_entropy.mean)
    error = None if cross_entropy.error is None else mean * cross_entropy.error
    interval = None if cross_entropy.interval is None else tuple(map(_exp, cross_entropy.interval))
    return Estimate(mean, error, interval)  # type: ignore[arg-type]


def _exp(value: float) -> float:
    return exp(value) if value < 700 else float("inf")


def _complement(share: Bounded) -> Bounded:
    """1 minus a share."""
    interval = None if share.interval is None else (1 - share.interval[1], 1 - share.interval[0])
    high = 1.0 if share.high is None else share.high
    return Bounded(1 - share.mean, share.error, interval, 1 - high, 1 - share.low, share.sampling_error)


def _unbounded(kl: Bounded) -> Bounded:
    return Bounded(*_fields(kl), 0.0, None, None)
