"""What a report says of a student and its teacher: the description of most of report.json.

All means are per captured position, in nats unless a field says otherwise, at temperature 1.
"""

from dataclasses import dataclass
from typing import Literal

from softlabel.pipeline.evaluation.bootstrap import Difference, Estimate

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
    """The same with the teacher's probability in place of correctness; None for the teacher itself. Where nothing was
    drawn from the tail, the probability of a token outside the head counts as 0: then only the bounds are sure."""
    bins: tuple[Bin, ...]
    """Bins with positions, in the order of confidence."""
    ece_to_teacher_bounds: tuple[float, float] | None = None
    """What it certainly is on these positions; None for the teacher itself, and for classifiers, where it is exact."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How close a student is to its teacher over some held-out positions."""

    positions: int
    cross_entropy: Estimate
    """With the token that actually follows."""
    perplexity: Estimate
    bits_per_byte: Estimate | None
    """Cross-entropy in bits per byte of the text; None if no token stands for text."""
    kl: Bounded
    """Forward KL, from the teacher to the student."""
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
    along the held-out text from each of these positions, and up to the first token that is not accepted, plus the
    teacher's own."""
    agreement: Estimate | None
    """Share of positions at which both have the same most likely token; None if the table has no head."""
    top_agreement: Bounded | None
    """Share of the teacher's ``positions.TOP`` most likely tokens that are also the student's, where the head reaches
    that far; the bounds are for all positions."""
    top_positions: int
    """Number of positions at which the head reaches that far."""
    confidence: Estimate | None
    """Mean probability of the most likely token."""
    correct: Estimate | None
    """How often it is the token that follows."""
    calibration: Calibration | None


@dataclass(frozen=True, kw_only=True)
class Group(Figures):
    """The same over positions that have something in common."""

    name: str
    low: float | None
    """Positions with an entropy (nats) or place in [low, high); None for a value of a column."""
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Metrics(Figures):
    """A student's metrics over all held-out positions, and by groups of them."""

    sequences: int
    documents: int
    kl_kind: KlKind
    """Unbiased if the table has a sampled tail or stores whole distributions; a lower bound if all tokens outside the
    head count as one outcome; for an average of teachers, the (unbiased) mean of the KL from each teacher, which is the
    KL from their average plus how far the teachers differ from it."""
    by_entropy: tuple[Group, ...]
    """By the teacher's entropy; groups without positions are left out."""
    by_position: tuple[Group, ...]
    """By the number of tokens before the predicted one, and itself."""
    by_column: dict[str, tuple[Group, ...]]
    """By the value of each column of ``by``, those with the most positions first."""


@dataclass(frozen=True, kw_only=True)
class TeacherFigures:
    """The teacher over some held-out positions, as the table stores it."""

    cross_entropy: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate | None
    entropy: Estimate
    """Mean entropy of its distributions: the minimum of any student's cross-entropy with the teacher."""
    calibration: Calibration | None


@dataclass(frozen=True, kw_only=True)
class TeacherGroup(TeacherFigures):
    """The same over positions that have something in common; see ``Group``."""

    name: str
    low: float | None
    high: float | None
    positions: int


@dataclass(frozen=True, kw_only=True)
class TeacherMetrics(TeacherFigures):
    """The teacher on all positions that students are measured on, and by the same groups of them."""

    by_entropy: tuple[TeacherGroup, ...]
    by_position: tuple[TeacherGroup, ...]
    by_column: dict[str, tuple[TeacherGroup, ...]]


@dataclass(frozen=True)
class Comparison:
    """Two students on the same documents: how much larger the first one's means are."""

    student: str
    other: str
    kl: Difference
    cross_entropy: Difference
    acceptance: Difference | None
