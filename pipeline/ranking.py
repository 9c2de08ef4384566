"""The order of ids by their logits: descending, and the lower id first where they are equal, which sorts leave open."""

import torch
from torch import Tensor

ABSENT = -(2**63)
"""Below every rank key."""


def rank_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 that compare as (float32 value, then the lower id), and hold both, so that one sort carries both."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0, because -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - ids)


def from_rank_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The values and ids that ``rank_keys`` was given."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def ranked(rows: Tensor, keys: Tensor, R: int, least: int) -> Tensor:
    """Keys, given row after row, as an (R, longest row or ``least``) table: each row descending, then ABSENT."""
    counts = torch.bincount(rows, minlength=R)
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    table = torch.full((R, max([least, *counts.tolist()])), ABSENT, device=rows.device)
    table[rows, slots] = keys
    return table.sort(dim=1, descending=True).values
