"""What is kept of a teacher's distribution: an exact head, an unbiased sampled tail, and a few exact numbers.

Logits go in, ``SoftLabels`` come out. A position's result depends on its own logits and seed alone, never on the rows
beside it. It costs a handful of passes over the vocabulary: the head is found through the maxima of blocks of ids and
the draws through their sums, so nothing is sorted that could not be kept. This module never loads a teacher and never
writes a file.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline import counters
from pipeline.config import SelectionConfig
from storage.codec import SoftLabels
from storage.errors import TeacherError

_CPU_LOGITS, _DEVICE_LOGITS = 2**22, 2**27
"""Logits scanned at once: few enough for a CPU's cache and many for its threads, and what keeps an accelerator busy."""
_ROWS = 512
"""Positions that share what comes after the scan: many small steps, cheap if they are few."""
_IMPOSSIBLE = -1e30
"""Stands for the logit -inf, of probability 0; finite, so that 0 times it is 0."""
_ABSENT = -(2**63)
"""Below every rank key."""


@dataclass(frozen=True)
class Selection:
    """A selection with every default resolved: the part of the settings that decides a table's numbers."""

    top_p: float
    min_k: int
    max_k: int
    draws: int
    temperatures: tuple[float, ...]
    """1 is the first."""
    seed: int

    @classmethod
    def of(cls, config: SelectionConfig) -> Self:
        """Resolve the settings; top_k is short for top_p 1, min_k = max_k = top_k, draws 0."""
        chosen = {field.name: getattr(config, field.name) for field in fields(cls)}
        if config.top_k is not None:
            chosen |= {"top_p": 1.0, "min_k": config.top_k, "max_k": config.top_k, "draws": 0}
        return cls(**chosen)


class NotADistributionError(TeacherError):
    """Logits with NaN or +inf, or all -inf; ``rows`` are their positions in the call."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(
            "the teacher's logits are no distribution",
            expected="finite logits, or -inf for an id of probability 0",
            found="NaN, +inf, or nothing but -inf",
            where=f"positions {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''} of the batch",
            do="try teacher.dtype float32 or teacher.attention eager; if that does not help, the weights are broken",
        )
        self.rows = rows


def position_seeds(selection: Selection, teacher: bytes, key: bytes, positions: Tensor) -> Tensor:
    """Seeds for the draws at a sequence's positions.

    Args:
        teacher: hash of the teacher's files.
        key: of the row.
        positions: (N,) indexes of the captured positions in the sequence.

    Returns:
        (N,) int64.
    """
    return counters.bits(counters.seed(b"%d" % selection.seed, teacher, key), positions)


@torch.inference_mode()
def select(logits: Tensor, next_ids: Tensor, seeds: Tensor, selection: Selection, vocabulary_size: int) -> SoftLabels:
    """Soft labels of P positions.

    Args:
        logits: (P, W) of any float dtype, on any device; columns from ``vocabulary_size`` on are padding.
        next_ids: (P,) the token that follows each position; -1 where that is not known, and its log-probability NaN.
        seeds: (P,) from ``position_seeds``.
        vocabulary_size: the teacher's real ids.

    Raises:
        NotADistributionError: if a position's logits hold NaN or +inf, or are all -inf.
    """
    device = logits.device
    logits, next_ids, seeds = logits[:, :vocabulary_size], next_ids.to(device).long(), seeds.to(device)
    block = _block_size(selection, vocabulary_size)
    width = -(-vocabulary_size // block) * block
    cached = max(1, min(_ROWS, len(logits), (_CPU_LOGITS if device.type == "cpu" else _DEVICE_LOGITS) // width))
    work = torch.empty((2, cached, width), device=device)
    parts = []
    for start in range(0, max(1, len(logits)), _ROWS):
        rows = slice(start, start + _ROWS)
        scans = [_scan(chunk, selection, block, work) for chunk in torch.split(logits[rows], cached)]
        scan = _Scan(*map(torch.cat, zip(*scans, strict=True)))
        wrong = ~(scan.maxima.isfinite() & (scan.maxima > _IMPOSSIBLE))
        if wrong.any():
            raise NotADistributionError((wrong.nonzero()[:, 0] + start).tolist())
        parts.append(_labels(logits[rows], next_ids[rows], seeds[rows], scan, selection))
    joined = {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}
    return SoftLabels(**{name: values.cpu().numpy() for name, values in joined.items()})


def _singled_out(selection: Selection) -> int:
    """Highest ids that are known one by one: enough for any head, and for most draws not to search a block."""
    return max(selection.max_k, min(selection.draws, 64))


def _block_size(selection: Selection, vocabulary_size: int) -> int:
    """Ids of a block: 64, or fewer where there would be too few blocks to tell the head's from the others."""
    size = 64
    while size > 1 and vocabulary_size < 4 * size * _singled_out(selection):
        size //= 2
    return size


class _Scan(NamedTuple):
    """What the passes over the vocabulary give for R rows: the S highest ids singled out, and the rest in sums."""

    maxima: Tensor
    """(R,) float32."""
    values: Tensor
    """(R, S + 1) float64, the highest logits; -inf where the row has fewer possible ids."""
    ids: Tensor
    """(R, S + 1) int64, theirs; 0 where there is none."""
    rests: Tensor
    """(R, T) float64, log of the rest's sum of exp(logit / temperature)."""
    rest_means: Tensor
    """(R,) float64, mean logit of the rest's distribution at T=1."""
    block_shares: Tensor
    """(R, blocks) float32, each block's share of the rest at T=1."""


def _scan(logits: Tensor, selection: Selection, block: int, work: Tensor) -> _Scan:
    """Work through the vocabulary of R rows; ``work``, (2, at least R, width) float32, is overwritten."""
    scores, spare = work[:, : len(logits)]
    scores[:, : logits.shape[1]] = logits
    scores[:, logits.shape[1] :] = _IMPOSSIBLE
    cut = len(scores), scores.shape[1] // block, block
    maxima = scores.view(cut).amax(2)
    values, ids = _highest(scores, maxima, _singled_out(selection) + 1)
    # Whatever the head will be, all beyond the first S ids is tail. It is summed relative to its own highest
    # logit, the next in the ranking, so that a tail of mass 1e-12 is as exact as one of 0.5.
    scores.scatter_(1, ids[:, :-1], _IMPOSSIBLE)
    peaks, rests = values[:, -1], list[Tensor]()
    scores -= (highest := peaks.clamp(min=_IMPOSSIBLE))[:, None].float()
    for T in reversed(selection.temperatures):  # 1 comes last: its weights are used below
        weights = torch.exp(scores if T == 1 else scores / T, out=spare)
        total = (block_weights := weights.view(cut).sum(2)).double().sum(1)
        rests.insert(0, peaks / T + total.log())
    means = weights.mul_(scores).sum(1)
    if means.isnan().any():  # where there is a logit -inf, of which there is 0 times
        means = torch.where(means.isnan(), weights.nansum(1), means)
    shares = block_weights / total[:, None].float()
    return _Scan(maxima.amax(1), values, ids, torch.stack(rests, 1), highest + means / total, shares)


def _highest(scores: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` ids of each row in the order (logit descending, id ascending), as in ``_Scan``.

    Their logits reach the count-th highest block maximum: only blocks that reach it are looked through, and only
    ids that reach it are sorted, ties included.
    """
    R, blocks = maxima.shape
    least = _IMPOSSIBLE / 2  # above the impossible, below every other logit
    bound = torch.full_like(scores[:, 0], least)
    if count <= blocks:
        bound = maxima.topk(count, dim=1, sorted=False).values.amin(1).clamp_(min=least)
    rows, columns = (maxima >= bound[:, None]).nonzero(as_tuple=True)
    members = scores.view(R * blocks, scores.shape[1] // blocks).index_select(0, rows * blocks + columns)
    found, offsets = (members >= bound[rows, None]).nonzero(as_tuple=True)
    keys = _rank_keys(members[found, offsets], columns[found] * members.shape[1] + offsets)
    ranked = _ranked(rows[found], keys, R, count)[:, :count]
    values, ids = _from_rank_keys(ranked)
    absent = ranked == _ABSENT
    return values.double().masked_fill(absent, -torch.inf), ids.masked_fill(absent, 0)


def _labels(logits: Tensor, next_ids: Tensor, seeds: Tensor, scan: _Scan, selection: Selection) -> dict[str, Tensor]:
    """The fields of ``SoftLabels`` for R rows."""
    top, top_ids, temperatures = scan.values[:, :-1], scan.ids[:, :-1], selection.temperatures
    rest = scan.rests[:, 0]
    log_sum = torch.logaddexp(top.logsumexp(1), rest)
    logprobs = top - log_sum[:, None]
    kept = _head(logprobs, selection)
    inside, outside = top.masked_fill(~kept, -torch.inf), top.masked_fill(kept, -torch.inf)
    tails = [torch.logaddexp((outside / T).logsumexp(1), scan.rests[:, i]) for i, T in enumerate(temperatures)]
    log_masses = torch.stack(
        [tail - torch.logaddexp((inside / T).logsumexp(1), tail) for T, tail in zip(temperatures, tails, strict=True)]
    )
    rows, drawn = _draw(logits, seeds, scan, outside, log_masses[0], selection)
    tail_counts, tail_ids, tail_draws, tail_logits = _distinct(rows, drawn, logits)
    next_logprobs = logits.gather(1, next_ids.clamp(min=0)[:, None])[:, 0].double() - log_sum
    mean = (logprobs.exp() * top.clamp(min=_IMPOSSIBLE)).sum(1) + (rest - log_sum).exp() * scan.rest_means
    return {
        "head_counts": kept.sum(1).int(),
        "head_ids": top_ids[kept].int(),
        "head_logprobs": logprobs[kept].float(),
        "tail_counts": tail_counts.int(),
        "tail_ids": tail_ids.int(),
        "tail_draws": tail_draws.int(),
        "tail_logprobs": (tail_logits - log_sum.repeat_interleave(tail_counts)).float(),
        "tail_log_masses": log_masses.float(),
        "entropies": (log_sum - mean).clamp(min=0).float(),
        "next_logprobs": next_logprobs.masked_fill(next_ids < 0, torch.nan).float(),
    }


def _head(logprobs: Tensor, selection: Selection) -> Tensor:
    """(R, S) which of the highest ids are kept: the fewest that reach top_p, within min_k and max_k."""
    probabilities = logprobs.exp()
    before = probabilities.cumsum(1) - probabilities
    ranks = torch.arange(logprobs.shape[1], device=logprobs.device)
    reaching = (before < selection.top_p) | (selection.top_p == 1)  # rounding may reach 1 too early
    return (reaching | (ranks < selection.min_k)) & (ranks < selection.max_k) & logprobs.isfinite()


def _draw(
    logits: Tensor, seeds: Tensor, scan: _Scan, outside: Tensor, log_masses: Tensor, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Ids drawn from the tail with replacement: first one of the highest ids or a block, then an id of that block.

    Args:
        outside: (R, S) the highest logits, -inf for those in the head.
        log_masses: (R,) of the tail, at T=1.

    Returns:
        (N,) row and (N,) id of each draw, row after row.
    """
    if selection.draws == 0:
        return seeds[:0], seeds[:0]
    singles = outside.shape[1]
    rest = scan.rests[:, :1]
    highest = torch.maximum(rest, outside.amax(1, keepdim=True))
    blocks = (rest - highest).exp() * scan.block_shares
    bounds = torch.cat([(outside - highest).exp(), blocks], dim=1).cumsum(1)
    steps = torch.arange(selection.draws, device=seeds.device).expand(len(seeds), -1)
    picks = torch.searchsorted(bounds, counters.uniform(seeds[:, None], 2 * steps) * bounds[:, -1:], right=True)
    rows, steps = (steps < (selection.draws * log_masses.exp()).ceil()[:, None]).nonzero(as_tuple=True)
    picks = picks[rows, steps]
    ids = scan.ids[rows, picks.clamp(max=singles)]
    deep = (picks >= singles).nonzero()[:, 0]
    uniforms, size = counters.uniform(seeds[rows[deep]], 2 * steps[deep] + 1), _block_size(selection, logits.shape[1])
    ids[deep] = _draw_in_block(logits, scan, rows[deep], picks[deep] - singles, uniforms, size)
    return rows, ids


def _draw_in_block(logits: Tensor, scan: _Scan, rows: Tensor, blocks: Tensor, uniforms: Tensor, size: int) -> Tensor:
    """(N,) ids of the rest, drawn by (N,) uniform numbers from (N,) blocks of ``size`` ids in (N,) rows."""
    vocabulary_size = logits.shape[1]
    ids = blocks[:, None] * size + torch.arange(size, device=rows.device)
    members = logits[rows[:, None], ids.clamp(max=vocabulary_size - 1)].float()
    peaks, peak_ids = scan.values[rows, -1:].float(), scan.ids[rows, -1:]
    of_rest = (members < peaks) | ((members == peaks) & (ids >= peak_ids))
    weights = (members - peaks).exp().where(of_rest & (ids < vocabulary_size), 0)
    bounds = weights.double().cumsum(1)
    return blocks * size + torch.searchsorted(bounds, uniforms[:, None] * bounds[:, -1:], right=True)[:, 0]


def _distinct(rows: Tensor, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The draws counted: (R,) distinct ids of each row; then of each, in the rows' order: id, draws, float64 logit."""
    ranked = _ranked(rows, _rank_keys(logits[rows, ids].float(), ids), len(logits), 1)
    drawn = ranked != _ABSENT
    first = drawn & (ranked != pad(ranked, (1, 0), value=_ABSENT)[:, :-1])
    starts = first[drawn].nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_full((min(1, len(starts)),), len(rows))])
    values, distinct = _from_rank_keys(ranked[first])
    return first.sum(1), distinct, ends - starts, values.double()


def _ranked(rows: Tensor, keys: Tensor, R: int, least: int) -> Tensor:
    """Keys, given row after row, as an (R, longest row or ``least``) table: each row descending, then _ABSENT."""
    counts = torch.bincount(rows, minlength=R)
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    table = torch.full((R, max([least, *counts.tolist()])), _ABSENT, device=rows.device)
    table[rows, slots] = keys
    return table.sort(dim=1, descending=True).values


def _rank_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 that compare as (float32 value, then the lower id), and hold both, so that one sort carries both."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0, because -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - ids)


def _from_rank_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The values and ids that ``_rank_keys`` was given."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)
