"""A teacher's soft labels in memory, as plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SoftLabels:
    """A teacher's soft labels at P positions, as flat arrays: position after position, with a count for each.

    Log-probabilities are in nats, at temperature 1, over the teacher's vocabulary without padding. The ids of a head
    are ordered by (logit descending, id ascending). NaN stands for an unknown value.
    """

    head_counts: Ints
    """(P,) number of ids in the head, whose probabilities are stored."""
    head_ids: Ints
    """(sum of head_counts,)"""
    head_logprobs: Floats
    """(sum of head_counts,)"""
    tail_counts: Ints
    """(P,) number of distinct ids that were drawn from outside the head."""
    tail_ids: Ints
    """(sum of tail_counts,)"""
    tail_draws: Ints
    """(sum of tail_counts,) how often each was drawn."""
    tail_logprobs: Floats
    """(sum of tail_counts,) NaN where a table does not store them."""
    tail_log_masses: Floats
    """(T, P) log of the mass outside the head at each stored temperature; -inf if the head has all of it."""
    entropies: Floats
    """(P,) entropy of the whole distribution, in nats."""
    next_logprobs: Floats
    """(P,) log-probability of the token that follows in the document."""

    @property
    def positions(self) -> int:
        """P."""
        return len(self.head_counts)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Join soft labels. All parts with positions must have the same temperatures."""
        parts = [part for part in parts if part.positions] or parts[:1]
        joined = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts], axis=-1) for field in fields(cls)
        }
        return cls(**joined)
