"""The passes over the vocabulary in torch, on any device.

Ids are ordered by descending logit, and by ascending id for equal logits, an order that torch's own sorts do not
guarantee.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from softlabel.pipeline.selection.scan import BELOW_1, BLOCK, LEAST, Draws, Scan

ABSENT = -(2**63)
"""Lower than every rank key."""


def rank_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 that compare by float32 value, then by lower id, and contain both, so that one sort orders both."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0, because -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - ids)


def from_rank_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The values and ids of rank keys."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def ranked(rows: Tensor, keys: Tensor, R: int, least: int) -> Tensor:
    """Keys, given row by row, as a table (R, longest row or ``least``): each row descending, padded with ABSENT."""
    counts = torch.bincount(rows, minlength=R)
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    table = torch.full((R, max([least, *counts.tolist()])), ABSENT, device=rows.device)
    table[rows, slots] = keys
    return table.sort(dim=1, descending=True).values


_IMPOSSIBLE = -1e30
"""Logit of an id that does not exist; below ``LEAST``, but finite, so that 0 times it is 0."""


def scan(logits: Tensor, singles: int, temperatures: tuple[float, ...]) -> Scan:
    """Scan the vocabulary of R rows.

    Args:
        logits: (R, V) of any float dtype.
        singles: S, the number of highest ids to return one by one.
        temperatures: the first is 1.
    """
    R, V = logits.shape
    blocks = -(-V // BLOCK)
    scores = torch.full((R, blocks * BLOCK), _IMPOSSIBLE, device=logits.device)
    scores[:, :V] = logits
    cut = R, blocks, BLOCK
    maxima = scores.view(cut).amax(2)
    values, ids = _highest(scores, maxima, singles + 1)
    scores.scatter_(1, ids[:, :-1], _IMPOSSIBLE)
    peaks, rests = values[:, -1], list[Tensor]()
    scores -= (highest := peaks.clamp(min=_IMPOSSIBLE))[:, None].float()
    weights = torch.empty_like(scores)
    for T in reversed(temperatures):  # 1 comes last, as its weights are used below
        torch.exp(scores if T == 1 else scores / T, out=weights)
        block_bounds = weights.view(cut).sum(2).double().cumsum(1)
        total = block_bounds[:, -1]
        rests.insert(0, peaks / T + total.log())
    means = weights.mul_(scores).sum(1)
    if means.isnan().any():  # where a logit is -inf, its product with 0 is NaN
        means = torch.where(means.isnan(), weights.nansum(1), means)
    highest_of_all = maxima.amax(1)
    highest_of_all[highest_of_all < LEAST] = -torch.inf
    return Scan(highest_of_all, values, ids, torch.stack(rests, 1), highest + means / total, block_bounds)


def _highest(scores: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` ids of each row in the order (logit descending, id ascending), as in ``Scan``.

    Their logits are at least the count-th highest block maximum: other blocks are skipped, and only ids that reach it
    (ties included) are sorted.
    """
    R, blocks = maxima.shape
    bound = torch.full_like(scores[:, 0], LEAST)
    if count <= blocks:
        bound = maxima.topk(count, dim=1, sorted=False).values.amin(1).clamp_(min=LEAST)
    rows, columns = (maxima >= bound[:, None]).nonzero(as_tuple=True)
    members = scores.view(R * blocks, BLOCK).index_select(0, rows * blocks + columns)
    found, offsets = (members >= bound[rows, None]).nonzero(as_tuple=True)
    keys = rank_keys(members[found, offsets], columns[found] * BLOCK + offsets)
    best = ranked(rows[found], keys, R, count)[:, :count]
    values, ids = from_rank_keys(best)
    absent = best == ABSENT
    return values.double().masked_fill(absent, -torch.inf), ids.masked_fill(absent, 0)


def draw(logits: Tensor, scan: Scan, outside: Tensor, counts: Tensor, uniforms: Tensor) -> Draws:
    """Draw ids from the tails of R rows, with replacement: one of the highest ids or a block, then an id of the block.

    Args:
        logits: (R, V), the scanned logits.
        scan: result of ``scan``.
        outside: (R, S) float64, the highest logits, -inf for those in the head.
        counts: (R,) int64, number of draws in each row.
        uniforms: (R, D, 2) float64 in [0, 1), for at most D draws with two choices each.
    """
    peaks = scan.values[:, -1:]
    highest = torch.maximum(peaks, outside.amax(1, keepdim=True))
    bounds = (outside - highest).exp().cumsum(1)
    singles, rest = bounds[:, -1:], (peaks - highest).exp() * scan.block_bounds[:, -1:]
    targets = uniforms[:, :, 0] * (singles + rest)
    picks = torch.searchsorted(bounds, targets, right=True)
    shares = ((targets - singles) / rest).clamp(max=BELOW_1)
    blocks = torch.searchsorted(scan.block_bounds, shares * scan.block_bounds[:, -1:], right=True)
    steps = torch.arange(uniforms.shape[1], device=counts.device)
    rows, steps = (steps < counts[:, None]).nonzero(as_tuple=True)
    picks = picks[rows, steps]
    ids = scan.ids[rows, picks]
    deep = (picks == outside.shape[1]).nonzero()[:, 0]
    of_rest, steps = rows[deep], steps[deep]
    ids[deep] = _draw_in_blocks(logits, scan, of_rest, blocks[of_rest, steps], uniforms[of_rest, steps, 1])
    return _distinct(rows, ids, logits)


def _draw_in_blocks(logits: Tensor, scan: Scan, rows: Tensor, blocks: Tensor, uniforms: Tensor) -> Tensor:
    """(N,) ids of the rest, drawn from (N,) blocks in (N,) rows with (N,) uniform numbers."""
    vocabulary_size = logits.shape[1]
    ids = blocks[:, None] * BLOCK + torch.arange(BLOCK, device=rows.device)
    members = logits[rows[:, None], ids.clamp(max=vocabulary_size - 1)].float()
    peaks, peak_ids = scan.values[rows, -1:].float(), scan.ids[rows, -1:]
    of_rest = (members < peaks) | ((members == peaks) & (ids >= peak_ids))
    weights = (members - peaks).exp().where(of_rest & (ids < vocabulary_size), 0)
    bounds = weights.double().cumsum(1)
    return blocks * BLOCK + torch.searchsorted(bounds, uniforms[:, None] * bounds[:, -1:], right=True)[:, 0]


def _distinct(rows: Tensor, ids: Tensor, logits: Tensor) -> Draws:
    """Count the (N,) draws, given row by row."""
    table = ranked(rows, rank_keys(logits[rows, ids].float(), ids), len(logits), 1)
    drawn = table != ABSENT
    first = drawn & (table != pad(table, (1, 0), value=ABSENT)[:, :-1])
    starts = first[drawn].nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_full((min(1, len(starts)),), len(rows))])
    values, distinct = from_rank_keys(table[first])
    return Draws(first.sum(1), distinct, ends - starts, values.double())
