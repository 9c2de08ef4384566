"""Select what is stored of a teacher's distribution: an exact head, an unbiased sampled tail, and a few exact numbers.

Turns logits into ``SoftLabels``. A position's result depends only on its own logits and seed, never on other rows. It
takes a few passes over the vocabulary: the head is found with the maxima of blocks of ids and the draws with their
sums, so only ids that might be stored are sorted. This module never loads a teacher or writes a file.
"""

from types import ModuleType

import torch
from torch import Tensor

from softlabel.pipeline.selection import counter_rng as counters
from softlabel.pipeline.selection import scan_torch
from softlabel.pipeline.selection.scan import LEAST, Draws, Scan
from softlabel.pipeline.selection.selection import Selection
from softlabel.storage.errors import TeacherError
from softlabel.storage.labels import SoftLabels

_ROWS = 512
"""Positions processed at a time."""
_SINGLES = 16
"""Least number of highest ids that are scanned one by one, so that the likeliest draws need no search in a block."""
_MANY = 2000
"""More highest ids than this are found faster by torch's sort, even on a CPU."""


class NotADistributionError(TeacherError):
    """Logits with NaN or +inf, or all -inf; ``rows`` are their indices in the call."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(
            "the teacher's logits do not give a probability distribution",
            expected="finite logits, or -inf for an id of probability 0",
            found="NaN, +inf or only -inf",
            where=f"positions {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''} of the batch",
            do="try teacher.dtype float32 or teacher.attn_implementation eager; if both fail, the weights are broken",
        )
        self.rows = rows


def position_seeds(selection: Selection, teacher: bytes, key: bytes, positions: Tensor) -> Tensor:
    """Seeds for the draws at a sequence's positions.

    Args:
        selection: its seed is used.
        teacher: hash of the teacher's identity.
        key: key of the row.
        positions: (N,) indices of the captured positions in the sequence.

    Returns:
        (N,) int64.
    """
    return counters.bits(counters.seed(b"%d" % selection.seed, teacher, key), positions)


@torch.inference_mode()
def select(logits: Tensor, next_ids: Tensor, seeds: Tensor, selection: Selection, vocabulary_size: int) -> SoftLabels:
    """Soft labels of P positions.

    Args:
        logits: (P, W) of any float dtype, on any device; columns from ``vocabulary_size`` on are padding.
        next_ids: (P,) the token that follows each position; -1 where it is not known, which gives log-probability NaN.
        seeds: (P,) from ``position_seeds``.
        selection: what to keep.
        vocabulary_size: number of the teacher's ids.

    Raises:
        NotADistributionError: if a position's logits have NaN or +inf, or are all -inf.
    """
    device = logits.device
    logits, next_ids, seeds = logits[:, :vocabulary_size], next_ids.to(device).long(), seeds.to(device)
    singles = max(selection.max_k, _SINGLES)
    parts = []
    for start in range(0, max(1, len(logits)), _ROWS):
        rows = slice(start, start + _ROWS)
        scan = _passes(device, singles).scan(logits[rows], singles, selection.temperatures)
        if (invalid := ~scan.maxima.isfinite()).any():
            raise NotADistributionError((invalid.nonzero()[:, 0] + start).tolist())
        parts.append(_labels(logits[rows], next_ids[rows], seeds[rows], scan, selection))
    joined = {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}
    return SoftLabels(**{name: values.cpu().numpy() for name, values in joined.items()})


def _passes(device: torch.device, singles: int) -> ModuleType:
    """The module to scan the vocabulary with, for a device and a number of highest ids."""
    if device.type != "cpu" or singles > _MANY:
        return scan_torch
    from softlabel.pipeline.selection import (
        scan_cpu,  # imported here: numba takes a third of a second to import, and only captures need it
    )

    return scan_cpu


def _labels(logits: Tensor, next_ids: Tensor, seeds: Tensor, scan: Scan, selection: Selection) -> dict[str, Tensor]:
    """The fields of ``SoftLabels`` for R rows."""
    top, top_ids, temperatures = scan.values[:, :-1], scan.ids[:, :-1], selection.temperatures
    rest = scan.rests[:, 0]
    log_sum = torch.logaddexp(top.logsumexp(1), rest)
    logprobs = top - log_sum[:, None]
    in_head = _head(logprobs, selection)
    inside, outside = top.masked_fill(~in_head, -torch.inf), top.masked_fill(in_head, -torch.inf)
    tails = [torch.logaddexp((outside / T).logsumexp(1), scan.rests[:, i]) for i, T in enumerate(temperatures)]
    log_masses = torch.stack(
        [tail - torch.logaddexp((inside / T).logsumexp(1), tail) for T, tail in zip(temperatures, tails, strict=True)]
    )
    tail = _draw(logits, seeds, scan, outside, log_masses[0], selection)
    next_logits = logits.gather(1, next_ids.clamp(min=0)[:, None])[:, 0].double()
    next_logprobs = next_logits.masked_fill(next_logits < LEAST, -torch.inf) - log_sum
    mean = (logprobs.exp() * top).nansum(1) + (rest - log_sum).exp() * scan.rest_means
    return {
        "head_counts": in_head.sum(1).int(),
        "head_ids": top_ids[in_head].int(),
        "head_logprobs": logprobs[in_head].float(),
        "tail_counts": tail.counts.int(),
        "tail_ids": tail.ids.int(),
        "tail_draws": tail.draws.int(),
        "tail_logprobs": (tail.logits - log_sum.repeat_interleave(tail.counts)).float(),
        "tail_log_masses": log_masses.float(),
        "entropies": (log_sum - mean).clamp(min=0).float(),
        "next_logprobs": next_logprobs.masked_fill(next_ids < 0, torch.nan).float(),
    }


def _head(logprobs: Tensor, selection: Selection) -> Tensor:
    """(R, S) which of the highest ids are in the head: the fewest that reach top_p, within min_k and max_k."""
    probabilities = logprobs.exp()
    before = probabilities.cumsum(1) - probabilities
    ranks = torch.arange(logprobs.shape[1], device=logprobs.device)
    reaching = (before < selection.top_p) | (selection.top_p == 1)  # rounding may reach 1 too soon
    return (reaching | (ranks < selection.min_k)) & (ranks < selection.max_k) & logprobs.isfinite()


def _draw(
    logits: Tensor, seeds: Tensor, scan: Scan, outside: Tensor, log_masses: Tensor, selection: Selection
) -> Draws:
    """Draws from the tails; their number is the tail's mass times ``selection.draws``, rounded up.

    Args:
        logits: (R, V).
        seeds: (R,).
        scan: the scan of these logits.
        outside: (R, S) the highest logits, -inf for those in the head.
        log_masses: (R,) log mass of the tail at T=1.
        selection: how many ids to draw.
    """
    if selection.draws == 0:
        return Draws(torch.zeros_like(seeds), seeds[:0], seeds[:0], log_masses[:0])
    counts = (selection.draws * log_masses.exp()).ceil().long()
    steps = torch.arange(2 * selection.draws, device=seeds.device)
    uniforms = counters.uniform(seeds[:, None], steps).view(len(seeds), selection.draws, 2)
    drawn: Draws = _passes(logits.device, outside.shape[1]).draw(logits, scan, outside, counts, uniforms)
    return drawn
