"""What is kept of a teacher's distribution: an exact head, an unbiased sampled tail, and a few exact numbers.

Logits go in, ``SoftLabels`` come out. A position's result depends on its own logits and seed alone, never on the rows
beside it. It costs a handful of passes over the vocabulary: the head is found through the maxima of blocks of ids and
the draws through their sums, so nothing is sorted that could not be kept. This module never loads a teacher and never
writes a file.
"""

import hashlib
import math
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.config import SelectionConfig
from storage.codec import SoftLabels
from storage.errors import TeacherError

_CPU_LOGITS, _DEVICE_LOGITS = 2**20, 2**26
"""Logits worked on at once: what stays in a CPU's cache, and what keeps an accelerator busy."""
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
    digest = hashlib.blake2b(digest_size=8)
    for part in (b"%d" % selection.seed, teacher, key):
        digest.update(len(part).to_bytes(8, "little") + part)
    start = int.from_bytes(digest.digest(), "little", signed=True)
    return _mix(positions.long() * _GOLDEN + start)


@torch.inference_mode()
def select(logits: Tensor, next_ids: Tensor, seeds: Tensor, selection: Selection, vocabulary_size: int) -> SoftLabels:
    """Soft labels of P positions.

    Args:
        logits: (P, W) of any float dtype, on any device; columns from ``vocabulary_size`` on are padding.
        next_ids: (P,) the token that follows each position.
        seeds: (P,) from ``position_seeds``.
        vocabulary_size: the teacher's real ids.

    Raises:
        NotADistributionError: if a position's logits hold NaN or +inf, or are all -inf.
    """
    P, device = len(logits), logits.device
    logits, next_ids, seeds = logits[:, :vocabulary_size], next_ids.to(device).long(), seeds.to(device)
    block = _block_size(selection, vocabulary_size)
    width = -(-vocabulary_size // block) * block
    rows = max(1, min(P, (_CPU_LOGITS if device.type == "cpu" else _DEVICE_LOGITS) // width))
    work = torch.full((2, rows, width), _IMPOSSIBLE, device=device)
    chunks = []
    for start in range(0, max(P, 1), rows):
        part = slice(start, min(start + rows, P))
        try:
            chunks.append(_select_chunk(logits[part], next_ids[part], seeds[part], selection, block, work))
        except NotADistributionError as error:
            raise NotADistributionError([start + row for row in error.rows]) from None
    joined = {name: torch.cat([chunk[name] for chunk in chunks], dim=-1) for name in chunks[0]}
    return SoftLabels(**{name: values.cpu().numpy() for name, values in joined.items()})


def _block_size(selection: Selection, vocabulary_size: int) -> int:
    """Ids of a block: balances finding the right blocks among all with looking through the ones found."""
    sought = max(selection.max_k + 1, selection.draws)
    return 2 ** max(0, round(math.log2(vocabulary_size / sought) / 2))


def _select_chunk(
    logits: Tensor, next_ids: Tensor, seeds: Tensor, selection: Selection, block: int, work: Tensor
) -> dict[str, Tensor]:
    """The fields of ``SoftLabels`` for R rows; ``work``, (2, at least R, width) float32, is overwritten."""
    scores, shares = work[:, : len(logits)]
    scores[:, : logits.shape[1]].copy_(logits).clamp_(min=_IMPOSSIBLE)
    values, ids = _highest(scores, block, selection.max_k + 1)
    # Whatever the head will be, all beyond the first max_k ids is tail. It is summed relative to its own highest
    # logit, the next in the ranking, so that a tail of mass 1e-12 is as exact as one of 0.5.
    top, top_ids, peak, peak_ids = values[:, :-1], ids[:, :-1], values[:, -1], ids[:, -1:]
    scores.scatter_(1, top_ids, _IMPOSSIBLE)
    rests = {}
    for T in sorted(selection.temperatures, key=lambda T: T == 1):  # 1 comes last: its shares are used below
        torch.softmax(scores if T == 1 else scores / T, dim=1, out=shares)
        block_shares = _blocks(shares, block).sum(1).double()
        total = block_shares.sum(1)  # not quite 1: softmax adds its terms one by one
        log_share = (shares.gather(1, peak_ids)[:, 0] / total).log()
        rests[T] = torch.where(peak.isfinite(), peak / T - log_share, -torch.inf)

    log_sum = torch.logaddexp(top.logsumexp(1), rests[1.0])
    logprobs = top - log_sum[:, None]
    kept = _head(logprobs, selection)
    inside, outside = top.masked_fill(~kept, -torch.inf), top.masked_fill(kept, -torch.inf)
    tails = {T: torch.logaddexp((outside / T).logsumexp(1), rest) for T, rest in rests.items()}
    masses = {T: tail - torch.logaddexp((inside / T).logsumexp(1), tail) for T, tail in tails.items()}

    weights = torch.cat(
        [
            (outside - tails[1.0][:, None]).exp(),
            block_shares * ((rests[1.0] - tails[1.0]).exp() / total)[:, None],
        ],
        dim=1,
    )
    draws = (selection.draws * masses[1.0].exp()).ceil()
    rows, drawn = _draw(seeds, draws, selection.draws, weights, top_ids, _blocks(shares, block))
    tail_counts, tail_ids, tail_draws, tail_logits = _distinct(rows, drawn, logits)

    rest_mean = shares.mul_(scores).sum(1) / total
    mean = (logprobs.exp() * top.clamp(min=_IMPOSSIBLE)).sum(1) + (rests[1.0] - log_sum).exp() * rest_mean
    return {
        "head_counts": kept.sum(1).int(),
        "head_ids": top_ids[kept].int(),
        "head_logprobs": logprobs[kept].float(),
        "tail_counts": tail_counts.int(),
        "tail_ids": tail_ids.int(),
        "tail_draws": tail_draws.int(),
        "tail_logprobs": (tail_logits - log_sum.repeat_interleave(tail_counts)).float(),
        "tail_log_masses": torch.stack([masses[T] for T in selection.temperatures]).float(),
        "entropies": (log_sum - mean).clamp(min=0).float(),
        "next_logprobs": (logits.gather(1, next_ids[:, None])[:, 0].double() - log_sum).float(),
    }


def _blocks(rows: Tensor, block: int) -> Tensor:
    """(R, width) seen as (R, block, blocks): block j holds the ids j, j + blocks, j + 2 blocks, ...

    Interleaved, because low ids are often the likely ones: like this they are spread over the blocks.
    """
    return rows.view(len(rows), block, rows.shape[1] // block)


def _highest(scores: Tensor, block: int, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` ids of each row in the order (logit descending, id ascending).

    Their logits reach the count-th highest block maximum: only blocks that reach it are looked through, and only
    ids that reach it are sorted, ties included.

    Returns:
        (R, count) float64 logits and (R, count) int64 ids; -inf and 0 where the row has fewer possible ids.

    Raises:
        NotADistributionError: with the rows of the chunk.
    """
    maxima = _blocks(scores, block).amax(1)
    R, blocks = maxima.shape
    peaks = maxima.amax(1)
    wrong = ~(peaks.isfinite() & (peaks > _IMPOSSIBLE))
    if wrong.any():
        raise NotADistributionError(wrong.nonzero()[:, 0].tolist())
    if count <= blocks:
        bound = maxima.topk(count, dim=1, sorted=False).values.amin(1)
    else:
        bound = torch.full_like(peaks, _IMPOSSIBLE)
    rows, columns = (maxima >= bound[:, None]).nonzero(as_tuple=True)
    members = _blocks(scores, block)[rows, :, columns]
    found, offsets = ((members >= bound[rows, None]) & (members > _IMPOSSIBLE)).nonzero(as_tuple=True)
    keys = _rank_keys(members[found, offsets], offsets * blocks + columns[found])
    ranked = _ranked(rows[found], keys, R, count)[:, :count]
    values, ids = _from_rank_keys(ranked)
    absent = ranked == _ABSENT
    return values.double().masked_fill(absent, -torch.inf), ids.masked_fill(absent, 0)


def _head(logprobs: Tensor, selection: Selection) -> Tensor:
    """(R, max_k) which of the highest ids are kept: the fewest that reach top_p, within min_k and max_k."""
    probabilities = logprobs.exp()
    before = probabilities.cumsum(1) - probabilities
    ranks = torch.arange(logprobs.shape[1], device=logprobs.device)
    wanted = (before < selection.top_p) | (ranks < selection.min_k)
    # Rounding may reach 1 too early, so 1 means every id.
    return (wanted if selection.top_p < 1 else torch.ones_like(wanted)) & logprobs.isfinite()


def _draw(
    seeds: Tensor, counts: Tensor, most: int, weights: Tensor, top_ids: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids drawn with replacement: first one of the highest ids or a block, then an id of that block.

    Args:
        counts: (R,) draws of each row, at most ``most``.
        weights: (R, max_k + blocks) float64, of the highest ids (0 for those in the head) and of the blocks.
        shares: (R, block, blocks) weights of the ids within their blocks.

    Returns:
        (N,) row and (N,) id of each draw, row after row.
    """
    steps = torch.arange(most, device=seeds.device).expand(len(seeds), most)
    bounds = weights.cumsum(1)
    picks = torch.searchsorted(bounds, _uniform(seeds[:, None], 2 * steps) * bounds[:, -1:], right=True)
    rows, steps = (steps < counts[:, None]).nonzero(as_tuple=True)
    picks = picks[rows, steps]
    singles, blocks = top_ids.shape[1], shares.shape[2]
    columns = (picks - singles).clamp(min=0)
    bounds = shares[rows, :, columns].double().cumsum(1)
    aims = _uniform(seeds[rows], 2 * steps + 1)[:, None] * bounds[:, -1:]
    ids = torch.searchsorted(bounds, aims, right=True)[:, 0] * blocks + columns
    if singles:
        ids = torch.where(picks < singles, top_ids[rows, picks.clamp(max=singles - 1)], ids)
    return rows, ids


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


_GOLDEN, _FIRST, _SECOND = (
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""splitmix64's constants, as the int64 with the same bits."""


def _mix(states: Tensor) -> Tensor:
    """splitmix64's finaliser, on int64 that wrap: the same bits on every device.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        # >> copies the sign; the mask makes it the shift of an unsigned number.
        states = (states ^ ((states >> shift) & (2 ** (64 - shift) - 1))) * factor
    return states


def _uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """float64 strictly between 0 and 1: each seed's stream at a counter."""
    bits = (_mix(seeds + (counters + 1) * _GOLDEN) >> 12) & (2**52 - 1)
    return (bits.double() + 0.5) * 2.0**-52
