"""Signatures; the body follows."""

from dataclasses import dataclass

from torch import Tensor

from pipeline.config import LossConfig
from pipeline.targets import SparseTargets


@dataclass(frozen=True)
class Loss:
    """What a student is trained on, and its parts for the curves."""

    total: Tensor
    """Scalar with gradient: (hard_weight x hard + soft_weight x soft) / normaliser."""
    hard: Tensor
    """Scalar, detached: cross-entropy with the token that follows, summed over the positions, nats at T=1."""
    soft: Tensor
    """Scalar, detached: divergence x temperature², summed over the positions; 0 if soft_weight is 0."""
    positions: int
    """N of this call."""


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    next_ids: Tensor,
    targets: SparseTargets | None,
    config: LossConfig,
    *,
    bias: Tensor | None = None,
    vocabulary_size: int | None = None,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    normaliser: float | Tensor | None = None,
    recompute: bool = False,
    chunk_bytes: int | None = None,
) -> Loss:
    """Fused linear head, divergence and cross-entropy at N positions."""
    raise NotImplementedError
