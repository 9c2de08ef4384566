"""A student compared with its teacher at single positions: unbiased estimates, and bounds that certainly hold.

A table keeps the teacher's probabilities of the ids in the head, rounded, and the mass r of all others, of which it has
M draws. Every divergence here is a sum over the vocabulary of terms d(t, s) that are never negative, convex, and 0
where teacher and student agree; and d(ct, cs) = c d(t, s). From this follow, for the ids outside the head,

- a lower bound: the term of the two masses, d(r, ρ), where ρ is the student's mass outside the head;
- an unbiased estimate: r times the mean of d(1, u) over the draws, with u = s/t of each. For a slope c, it is also
  cρ plus r times the mean of d(1, u) - cu, which hardly varies among the draws if c is the slope of d for large u.

Pure functions of tensors: nothing here knows a model, a table, or how positions are summed up.
"""

from dataclasses import dataclass
from math import exp, log

import torch
from torch import Tensor

from softlabel.pipeline.loss.divergence import LOG_ZERO, divergence_terms
from softlabel.pipeline.loss.targets import Draws, SparseTargets

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation")
"""The divergences that are measured; the last one is 1 minus the rate at which a draft of the student is accepted."""
TOP = 5
"""Number of the most likely ids that are compared."""
CODE_ERROR = 1 / 64 + 1e-5
"""Nats by which the stored probability of an id in the head may differ from the teacher's, in float32."""
_LARGE_SLOPES = {"forward_kl": 1.0, "jsd": log(2) / 2, "total_variation": 0.5}
"""Slope of d(1, u) for large u; that of reverse KL has no limit, so the slope at u = ρ/r takes its place."""


@dataclass(frozen=True)
class Known:
    """What a table knows of the teacher's distribution at n positions."""

    head: SparseTargets
    """The exact part, with one bucket for the rest: ids in the order of their probability."""
    draws: Draws
    mass_error: float
    """Nats by which the stored mass outside the head may differ from the teacher's."""

    def __getitem__(self, positions: slice) -> "Known":
        """What is known at some of the positions."""
        return Known(self.head[positions], self.draws[positions], self.mass_error)

    @property
    def kept(self) -> Tensor:
        """(n, K) bool: which entries of the head are ids, and not padding."""
        return self.head.logprobs > -torch.inf


def compare(logprobs: Tensor, known: Known, next_ids: Tensor) -> dict[str, Tensor]:
    """Compare a student's whole distributions with what is known of the teacher's.

    Args:
        logprobs: (n, V) float: the student's log-probabilities, in nats; overwritten.
        known: the teacher at the same positions.
        next_ids: (n,) the tokens that follow.

    Returns:
        (n,) float64 by name. For each divergence, in nats (total variation: a probability): its estimate; certain
        bounds ``_low`` and ``_high`` (inf where there is none); and ``_variance``, that of the estimate over the draws.
        ``unsampled`` is 1 where the estimate is only a lower bound, because mass is left and nothing was drawn.
        The others are ``cross_entropy`` with the next token; agreement (NaN where it is not known); and calibration.
    """
    top_logprobs, argmax = logprobs.max(1)
    result = {"cross_entropy": -logprobs.gather(1, next_ids[:, None])[:, 0].double()}
    result |= _agreement(logprobs, argmax, known)
    result |= {"confidence": top_logprobs.double().exp(), "correct": (argmax == next_ids).double()}
    result |= _teacher_of(argmax, known)
    result |= _teacher_confidence(known, next_ids)
    result |= _divergences(logprobs, known)
    return result


def _divergences(logprobs: Tensor, known: Known) -> dict[str, Tensor]:
    kept, log_r = known.kept, known.head.log_rest.double()
    log_t = known.head.logprobs.double().clamp(min=LOG_ZERO)
    log_s = logprobs.gather(1, known.head.ids).double()
    draws = known.draws
    log_u = logprobs.gather(1, draws.ids).double() - draws.logprobs.double().clamp(min=LOG_ZERO)
    log_s_min = logprobs.amin(1).double()
    # Added, not assigned: padding entries all point to id 0, which may be in the head or in the rest.
    logprobs.scatter_add_(1, known.head.ids, torch.where(kept, -torch.inf, 0.0).to(logprobs.dtype))
    log_rho = logprobs.logsumexp(1).double()
    r, rho = log_r.exp(), log_rho.exp()
    near = torch.minimum(torch.maximum(log_s, log_t - CODE_ERROR), log_t + CODE_ERROR)
    margin = known.mass_error
    near_r = torch.minimum(torch.maximum(log_rho, log_r - margin), log_r + margin)
    shares = draws.counts / draws.counts.sum(1, keepdim=True).clamp(min=1)
    drawn = draws.counts.sum(1) > 0
    result = {"unsampled": (~drawn & (r > 0)).double()}
    for name in DIVERGENCES:
        bucket = _terms(name, log_r, log_rho)
        limit = _LARGE_SLOPES.get(name)
        slope = torch.full_like(r, limit) if limit is not None else (log_rho - log_r).nan_to_num(0.0, 0.0, 0.0)
        rest = _terms(name, torch.zeros_like(log_u), log_u) - slope[:, None] * log_u.exp()
        mean = torch.where(draws.counts > 0, shares * rest, 0.0).sum(1)
        tail = torch.where(drawn, slope * rho + r * mean, bucket)
        at_bucket = (bucket - slope * rho) / r  # the same function of the two masses
        result[name] = torch.where(kept, _terms(name, log_t, log_s), 0.0).sum(1) + tail
        result[f"{name}_variance"] = r.square() * _variance(rest, draws.counts, mean, at_bucket)
        lowest = torch.where(kept, _terms(name, near, log_s), 0.0).sum(1)
        ends = [_terms(name, log_t + error, log_s) for error in (-CODE_ERROR, CODE_ERROR)]
        highest = torch.where(kept, torch.maximum(*ends), 0.0).sum(1)
        result[f"{name}_low"] = lowest + _terms(name, near_r, log_rho)
        result[f"{name}_high"] = highest + _most(name, log_r + margin, log_rho, log_s_min, _log_t_max(known))
    return result


def _terms(name: str, log_t: Tensor, log_s: Tensor) -> Tensor:
    """d(t, s): the terms of a divergence, plus or minus (s - t), whose sum over a vocabulary is 0."""
    terms = divergence_terms(name, log_t, log_s, mix=0.5)[0]
    if name == "forward_kl":
        return terms + (log_s.exp() - log_t.exp())
    return terms - (log_s.exp() - log_t.exp()) if name == "reverse_kl" else terms


def _most(name: str, log_r: Tensor, log_rho: Tensor, log_s_min: Tensor, log_t_max: Tensor) -> Tensor:
    """The largest possible sum of d(t, s) over the ids outside the head."""
    r, rho = log_r.exp(), log_rho.exp()
    if name == "jsd":
        return log(2) / 2 * (r + rho)
    if name == "total_variation":
        return (r + rho) / 2
    if name == "reverse_kl":
        return torch.where(rho > 0, torch.inf, r)
    return torch.where(r > 0, r * (log_t_max - log_s_min) - r + rho, rho)


def _log_t_max(known: Known) -> Tensor:
    """(n,) log of the largest probability that an id outside the head may have."""
    lowest = torch.where(known.kept, known.head.logprobs.double(), torch.inf)
    lowest = torch.cat([lowest, torch.full_like(known.head.log_rest, torch.inf).double()[:, None]], 1).amin(1)
    return torch.minimum(lowest + CODE_ERROR, known.head.log_rest.double() + known.mass_error)


def _variance(values: Tensor, counts: Tensor, mean: Tensor, at_bucket: Tensor) -> Tensor:
    """(n,) variance of a position's mean over its draws, estimated from them.

    A single draw does not tell its own variance: then the squared distance from the value at the ratio of the two
    masses takes its place, which is too large on average.
    """
    total = counts.sum(1)
    squares = torch.where(counts > 0, counts * (values - mean[:, None]).square(), 0.0).sum(1)
    several = squares / (total * (total - 1)).clamp(min=1)
    return torch.where(total > 1, several, torch.where(total > 0, (mean - at_bucket).square(), 0.0))


def _agreement(logprobs: Tensor, argmax: Tensor, known: Known) -> dict[str, Tensor]:
    """Whether the most likely id is the same; share of the TOP most likely that are, as far as the head tells."""
    width, kept = min(TOP, logprobs.shape[1]), known.kept
    first, is_first = known.head.ids[:, :width], kept[:, :width]
    mine = logprobs.topk(width, 1).indices
    same = ((mine[:, :, None] == first[:, None]) & is_first[:, None]).sum((1, 2)).double()
    missing = (width - is_first.sum(1)).double()
    agreement = ((argmax[:, None] == first[:, :1]) & is_first[:, :1]).sum(1).double()
    return {
        "agreement": agreement.masked_fill(~kept.any(1), torch.nan),
        "top": (same / width).masked_fill(missing > 0, torch.nan),
        "top_low": same / width,
        "top_high": (same + torch.minimum(missing, width - same)) / width,
    }


def _teacher_of(ids: Tensor, known: Known) -> dict[str, Tensor]:
    """The teacher's probability of an id at each position: an unbiased estimate, and certain bounds."""
    in_head = (known.head.ids == ids[:, None]) & known.kept
    exact = torch.where(in_head, known.head.logprobs.double().exp(), 0.0).sum(1)
    draws = known.draws
    hits = torch.where(draws.ids == ids[:, None], draws.counts, 0.0).sum(1)
    drawn = known.head.log_rest.double().exp() * hits / draws.counts.sum(1).clamp(min=1)
    inside = in_head.any(1)
    low = torch.where(inside, exact * exp(-CODE_ERROR), 0.0)
    high = torch.where(inside, exact * exp(CODE_ERROR), _log_t_max(known).exp())
    return {"teacher": exact + drawn, "teacher_low": low, "teacher_high": high.clamp(max=1.0)}


def _teacher_confidence(known: Known, next_ids: Tensor) -> dict[str, Tensor]:
    """The probability of the teacher's most likely id, and whether it follows; NaN without a head."""
    empty = ~known.kept.any(1)
    values = {
        "teacher_confidence": known.head.logprobs[:, :1].double().exp().sum(1),
        "teacher_correct": (known.head.ids[:, :1] == next_ids[:, None]).double().sum(1),
    }
    return {name: value.masked_fill(empty, torch.nan) for name, value in values.items()}
