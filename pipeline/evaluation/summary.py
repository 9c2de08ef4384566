"""What an evaluation reports of a student and its teacher: means with their errors and bounds, from sums.

The docstrings here are the description of report.json. All means are per captured position, in nats unless a field says
otherwise, at temperature 1. Measures nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, isinf, log, sqrt
from typing import Literal

import numpy as np

from softlabel.pipeline.evaluation.bootstrap import Difference, Estimate, Floats, Sums, difference, estimate
from softlabel.pipeline.evaluation.metrics import (
    CALIBRATION,
    CONFIDENCE_BINS,
    ENTROPY_BIN,
    ENTROPY_BINS,
    GROUPED,
    OVERALL,
    POSITION_BINS,
    TEACHER_CALIBRATION,
)
from softlabel.pipeline.evaluation.standings import Gap

KlKind = Literal["unbiased", "lower bound", "mean over teachers"]


@dataclass(frozen=True)
class Bounded(Estimate):
    """A mean that a table with truncated distributions does not determine exactly."""

    low: float
    """The mean over these positions is certainly not below this, whatever the tail is and however stored probabilities
    were rounded."""
    high: float | None
    """Nor above this; None if nothing bounds it."""
    sampling_error: float | None
    """Standard error of ``mean`` on these very positions, from the draws of the tail; None if it is not known, or if
    nothing was drawn, so that the mean is only a bound."""


@dataclass(frozen=True)
class Bin:
    """Positions at which a model's most likely token has a probability in [low, high)."""

    low: float
    high: float
    positions: int
    confidence: float
    """Mean probability of the most likely token."""
    correct: float
    """How often it is the token that follows."""
    teacher: float | None
    """Mean probability that the teacher gives it; None for the teacher itself."""
    teacher_bounds: tuple[float, float] | None


@dataclass(frozen=True)
class Calibration:
    """Whether a model is as often right as it is confident."""

    ece: Estimate
    """Expected calibration error: mean distance of confidence and correctness over bins of confidence."""
    ece_to_teacher: Estimate | None
    """The same with the teacher's probability in place of correctness; None for the teacher itself."""
    bins: tuple[Bin, ...]
    """Bins with positions, in the order of confidence."""


@dataclass(frozen=True)
class Group:
    """Positions that have something in common, and means over them."""

    name: str
    low: float | None
    """Positions with an entropy (nats) or place in [low, high); None for a value of a column."""
    high: float | None
    positions: int
    cross_entropy: Estimate
    bits_per_byte: Estimate | None
    kl: Estimate
    agreement: Estimate | None
    reverse_kl: Estimate | None
    """None for an average of teachers, like the following."""
    jsd: Estimate | None
    acceptance: Estimate | None
    confidence: Estimate | None
    """Mean probability of the most likely token."""
    correct: Estimate | None
    """How often it is the token that follows."""


@dataclass(frozen=True)
class Metrics:
    """A student's metrics over held-out positions."""

    sequences: int
    positions: int
    documents: int
    cross_entropy: Estimate
    """With the token that actually follows."""
    perplexity: Estimate
    bits_per_byte: Estimate | None
    """Cross-entropy in bits per byte of the text; None if no token stands for text."""
    kl: Bounded
    """Forward KL, from the teacher to the student."""
    kl_kind: KlKind
    """Unbiased if the table has a sampled tail or stores whole distributions; a lower bound if all tokens outside the
    head count as one outcome; for an average of teachers, the (unbiased) mean of the KL from each teacher, which is the
    KL from their average plus how far the teachers differ from it."""
    reverse_kl: Bounded | None
    """KL from the student to the teacher. None for an average of teachers, like the following."""
    jsd: Bounded | None
    """Jensen-Shannon divergence."""
    total_variation: Bounded | None
    """Half the sum of the absolute differences of all probabilities."""
    acceptance: Bounded | None
    """Rate at which the teacher accepts the student's tokens in speculative decoding: 1 - total_variation."""
    tokens_per_step: Bounded | None
    """Mean number of tokens per forward pass of the teacher, if the student drafts ``metrics.DRAFT`` tokens at a time:
    along the held-out text, and up to the first token that is not accepted, plus the teacher's own."""
    agreement: Estimate | None
    """Share of positions at which both have the same most likely token; None if the table has no head."""
    top_agreement: Bounded | None
    """Share of the teacher's ``positions.TOP`` most likely tokens that are also the student's, where the head reaches
    that far; the bounds are for all positions."""
    top_positions: int
    """Number of positions at which the head reaches that far."""
    calibration: Calibration | None
    by_entropy: tuple[Group, ...]
    """By the teacher's entropy; groups without positions are left out."""
    by_position: tuple[Group, ...]
    """By the number of tokens before the predicted one, and itself."""
    by_column: dict[str, tuple[Group, ...]]
    """By the value of each column of ``by``, those with the most positions first."""


@dataclass(frozen=True)
class TeacherMetrics:
    """The teacher on the same positions, as the table stores it."""

    cross_entropy: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate | None
    entropy: Estimate
    """Mean entropy of its distributions: the minimum of any student's cross-entropy with the teacher."""
    calibration: Calibration | None


@dataclass(frozen=True)
class Comparison:
    """Two students on the same documents: how much larger the first one's means are."""

    student: str
    other: str
    kl: Difference
    cross_entropy: Difference
    acceptance: Difference | None


@dataclass(frozen=True)
class Measurement:
    """One student's sums, and how many documents of equal size they are worth."""

    sums: Sums
    documents: float

    def ratio(self, name: str, by: str = "positions", part: str = "overall", cell: int = 0) -> Floats:
        """(1 + replicates,) mean of a quantity, as it is and in each replicate."""
        return _ratio(self._cells(part, GROUPED if part != "overall" else OVERALL), name, by, cell)

    def _cells(self, part: str, names: Sequence[str]) -> dict[str, Floats]:
        values = self.sums.values[part]
        return dict(zip(names, np.moveaxis(values.reshape(len(values), -1, len(names)), 2, 0), strict=True))

    def mean(self, name: str) -> Estimate:
        """Mean over all positions of a quantity that is known everywhere."""
        return estimate(self.ratio(name), self.documents)

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
        overall = self._cells("overall", OVERALL)
        if f"{name}_variance" not in overall or overall["unsampled"][0, 0]:
            return None
        return sqrt(overall[f"{name}_variance"][0, 0]) / float(overall["positions"][0, 0])

    def metrics(self, sequences: int, documents: int, groups: Mapping[str, Sequence[str]], average: bool) -> Metrics:
        """All metrics of the student.

        Args:
            sequences: number of sequences measured.
            documents: number of documents measured.
            groups: values of each column that the sums are grouped by.
            average: whether the teacher is an average of several.
        """
        overall = {name: values[0, 0] for name, values in self._cells("overall", OVERALL).items()}
        cross_entropy = self.mean("cross_entropy")
        kl = self._bounded("forward_kl")
        assert kl is not None
        kinds: dict[bool, KlKind] = {True: "lower bound", False: "unbiased"}
        variation = None if average else self._bounded("total_variation")
        return Metrics(
            sequences=sequences,
            positions=int(overall["positions"]),
            documents=documents,
            cross_entropy=cross_entropy,
            perplexity=_perplexity(cross_entropy),
            bits_per_byte=self._bits_per_byte("cross_entropy"),
            kl=_unbounded(kl) if average else kl,
            kl_kind="mean over teachers" if average else kinds[overall["unsampled"] > 0],
            reverse_kl=None if average else self._bounded("reverse_kl"),
            jsd=None if average else self._bounded("jsd"),
            total_variation=variation,
            acceptance=None if variation is None else _complement(variation),
            tokens_per_step=None if average else self._bounded("steps", "windows", "windows"),
            agreement=self._where_known("agreement", "agreement_known"),
            top_agreement=None if average else self._bounded("top", "top_known"),
            top_positions=int(overall["top_known"]),
            calibration=None if average else self._calibration(teacher=False),
            by_entropy=self._groups("entropy", [_entropy_range(number) for number in range(ENTROPY_BINS)]),
            by_position=self._groups("position", [_position_range(number) for number in range(POSITION_BINS)]),
            by_column={
                name: self._groups(f"column {name}", [(value, None, None) for value in values])
                for name, values in groups.items()
            },
        )

    def teacher(self, average: bool) -> TeacherMetrics:
        """The teacher's metrics, which the student's sums contain."""
        cross_entropy = self.mean("teacher_cross_entropy")
        return TeacherMetrics(
            cross_entropy=cross_entropy,
            perplexity=_perplexity(cross_entropy),
            bits_per_byte=self._bits_per_byte("teacher_cross_entropy"),
            entropy=self.mean("teacher_entropy"),
            calibration=None if average else self._calibration(teacher=True),
        )

    def _bits_per_byte(self, name: str) -> Estimate | None:
        nats = self._where_known(name, "bytes")
        return None if nats is None or isinf(nats.mean) else _scaled(nats, 1 / log(2))

    def _groups(self, part: str, ranges: Sequence[tuple[str, float | None, float | None]]) -> tuple[Group, ...]:
        cells = self._cells(part, GROUPED)
        return tuple(
            self._group(cells, number, *ranged) for number, ranged in enumerate(ranges) if cells["positions"][0, number]
        )

    def _group(
        self, cells: Mapping[str, Floats], number: int, name: str, low: float | None, high: float | None
    ) -> Group:
        def mean(quantity: str, by: str = "positions") -> Estimate:
            return estimate(_ratio(cells, quantity, by, number), self.documents)

        agreement, nats = mean("agreement", "agreement_known"), mean("cross_entropy", "bytes")
        average = not self.sums.values["calibration"].any()  # of teachers: little is known
        return Group(
            name=name,
            low=low,
            high=high,
            positions=int(cells["positions"][0, number]),
            cross_entropy=mean("cross_entropy"),
            bits_per_byte=_scaled(nats, 1 / log(2)) if isfinite(nats.mean) else None,
            kl=mean("forward_kl"),
            agreement=None if np.isnan(agreement.mean) else agreement,
            reverse_kl=None if average else mean("reverse_kl"),
            jsd=None if average else mean("jsd"),
            acceptance=None if average else _flipped(mean("total_variation")),
            confidence=None if average else mean("confidence"),
            correct=None if average else mean("correct"),
        )

    def _calibration(self, *, teacher: bool) -> Calibration | None:
        names = TEACHER_CALIBRATION if teacher else CALIBRATION
        cells = self._cells("teacher_calibration" if teacher else "calibration", names)
        prefix = "teacher_" if teacher else ""
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
        return Calibration(found[0], None if teacher else found[1], tuple(bins))


def compared(names: Sequence[str], measurements: Sequence[Measurement]) -> tuple[Comparison, ...]:
    """Each pair of students, measured on the same documents."""
    pairs = []
    for first in range(len(names)):
        for second in range(first + 1, len(names)):
            a, b = measurements[first], measurements[second]

            def less(name: str, a: Measurement = a, b: Measurement = b, sign: int = 1) -> Difference:
                return difference(sign * a.ratio(name), sign * b.ratio(name), a.documents)

            varies = a.sums.values["calibration"].any()
            pairs.append(
                Comparison(
                    names[first],
                    names[second],
                    less("forward_kl"),
                    less("cross_entropy"),
                    less("total_variation", sign=-1) if varies else None,
                )
            )
    return tuple(pairs)


def gaps_closed(
    names: Sequence[str], measurements: Sequence[Measurement], gap: Gap | None
) -> tuple[Estimate | None, ...]:
    """Share of the gap in forward KL between control and reference that each student closes; None without a gap."""
    if gap is None:
        return (None,) * len(names)
    kl = {name: each.ratio("forward_kl") for name, each in zip(names, measurements, strict=True)}
    start = kl[gap.control]
    width = start - (0.0 if gap.reference is None else kl[gap.reference])
    documents = measurements[0].documents
    with np.errstate(invalid="ignore", divide="ignore"):
        return tuple(estimate((start - kl[name]) / width, documents) for name in names)


def _ratio(cells: Mapping[str, Floats], name: str, by: str, cell: int) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Floats = cells[name][:, cell] / cells[by][:, cell]
    return result


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


def _flipped(share: Estimate) -> Estimate:
    interval = None if share.interval is None else (1 - share.interval[1], 1 - share.interval[0])
    return Estimate(1 - share.mean, share.error, interval)


def _complement(share: Bounded) -> Bounded:
    """1 minus a share."""
    high = 1.0 if share.high is None else share.high
    return Bounded(*_fields(_flipped(share)), 1 - high, 1 - share.low, share.sampling_error)


def _unbounded(kl: Bounded) -> Bounded:
    return Bounded(*_fields(kl), 0.0, None, None)


def _entropy_range(number: int) -> tuple[str, float, float]:
    low, high = number * ENTROPY_BIN, (number + 1) * ENTROPY_BIN
    return f"{low:g}-{high:g} nats", low, high


def _position_range(number: int) -> tuple[str, float, float]:
    low, high = 2**number, 2 ** (number + 1)
    return f"{low}" if high == low + 1 else f"{low:,}-{high - 1:,}", low, high
