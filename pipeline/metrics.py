"""How far a student is from its teacher on captured positions."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Estimate:
    """A mean over positions, with its standard error when sequences, not positions, are taken as independent."""

    mean: float
    error: float


@dataclass(frozen=True)
class EntropyBin:
    """Positions at which the teacher's entropy (nats) is in [low, high), and the mean KL there."""

    low: float
    high: float
    positions: int
    kl: float


@dataclass(frozen=True)
class Metrics:
    """A student's numbers over positions, in nats at temperature 1, beside the teacher's own."""

    sequences: int
    positions: int
    cross_entropy: Estimate
    """With the token that really follows."""
    kl: Estimate
    """Forward KL, from the teacher to the student."""
    kl_kind: Literal["unbiased", "lower bound"]
    """Unbiased where the table has a sampled tail or the head is everything; else the tail counts as one outcome."""
    agreement: Estimate | None
    """Share of positions at which both hold the same token most likely; None if the table keeps no head."""
    teacher_cross_entropy: Estimate
    teacher_entropy: Estimate
    by_entropy: tuple[EntropyBin, ...]
    """In the order of the entropy; bins without positions are left out."""
