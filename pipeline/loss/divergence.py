"""Divergences between two sparse distributions, and their gradients, in log space.

A teacher's P = (t_1 .. t_k, r) and a student's Q = (s_1 .. s_k, ρ) are k kept ids and one bucket for the rest. Every
divergence here is a sum of one term per entry, and ∂D/∂log s of an entry depends only on that entry.
``pipeline.loss.fused`` turns these into the gradient of the logits. Nothing here knows a vocabulary or a temperature.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

LOG_ZERO = -512.0
"""Log that stands for a teacher's probability of 0 in reverse KL, as in the stored codes: finite, but prohibitive."""

Terms = tuple[Tensor, Tensor]


def divergence_terms(name: str, log_t: Tensor, log_s: Tensor, mix: float) -> Terms:
    """The terms of D(P, Q) and their gradients, entry by entry.

    Args:
        name: a value of ``LossConfig.divergence``.
        log_t: any shape, nats: log of the teacher's probabilities, of ids and buckets; -inf is probability 0.
        log_s: same shape, nats: log of the student's probabilities.
        mix: β of the generalised JSD (Agarwal et al., arXiv 2306.13649), λ of the skew divergences (Ko et al.,
            arXiv 2402.03898); the others ignore it.

    Returns:
        The terms, whose sum over a distribution's entries is D in nats (total variation: a probability), and ∂D/∂log s
        of each entry, as if the entries were independent. An entry that is 0 in both distributions is 0 in both.
    """
    return _DIVERGENCES[name](log_t, log_s, mix)


def cross_entropy(log_t: Tensor, log_s: Tensor) -> Tensor:
    """-Σ t log s over the last dimension, in nats: a divergence plus the teacher's entropy."""
    return -_times(log_t.exp(), log_s).sum(-1)


def _forward_kl(log_t: Tensor, log_s: Tensor, mix: float) -> Terms:
    """D = Σ t log(t/s)."""
    t = log_t.exp()
    return _times(t, log_t - log_s), -t


def _reverse_kl(log_t: Tensor, log_s: Tensor, mix: float) -> Terms:
    """D = Σ s log(s/t)."""
    s = log_s.exp()
    terms = _times(s, log_s - log_t.clamp(min=LOG_ZERO))
    return terms, terms + s


def _jsd(log_t: Tensor, log_s: Tensor, mix: float) -> Terms:
    """D = β KL(t ‖ m) + (1-β) KL(s ‖ m), m = βt + (1-β)s."""
    t, s = log_t.exp(), log_s.exp()
    log_m = _mixture(log_t, log_s, mix)
    gradients = (1 - mix) * _times(s, log_s - log_m)
    return mix * _times(t, log_t - log_m) + gradients, gradients


def _skew_forward_kl(log_t: Tensor, log_s: Tensor, mix: float) -> Terms:
    """D = KL(t ‖ m), m = λt + (1-λ)s."""
    t = log_t.exp()
    log_m = _mixture(log_t, log_s, mix)
    return _times(t, log_t - log_m), -_times(t, (1 - mix) * (log_s - log_m).exp())


def _skew_reverse_kl(log_t: Tensor, log_s: Tensor, mix: float) -> Terms:
    """D = KL(s ‖ m), m = (1-λ)t + λs."""
    s = log_s.exp()
    log_m = _mixture(log_t, log_s, 1 - mix)
    terms = _times(s, log_s - log_m)
    return terms, terms + _times(s, 1 - mix * (log_s - log_m).exp())


def _total_variation(log_t: Tensor, log_s: Tensor, mix: float) -> Terms:
    """D = ½ Σ |s - t|."""
    t, s = log_t.exp(), log_s.exp()
    return 0.5 * (s - t).abs(), 0.5 * s * (s - t).sign()


def _mixture(log_t: Tensor, log_s: Tensor, weight: float) -> Tensor:
    """log(weight · t + (1 - weight) · s)."""
    return torch.logaddexp(log_t + math.log(weight), log_s + math.log1p(-weight))


def _times(probabilities: Tensor, factors: Tensor) -> Tensor:
    """Products in which a probability of 0 wins over any factor, infinite and NaN ones too."""
    return torch.where(probabilities > 0, probabilities * factors, 0.0)


_DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor, float], Terms]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
}
