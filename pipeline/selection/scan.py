"""What the selection learns of a vocabulary in one pass, and what a draw from it gives.

``scan_torch`` makes both on any device, ``scan_cpu`` on a CPU, where it is several times faster.
"""

from typing import NamedTuple

from torch import Tensor

BLOCK = 64
"""Ids of a block. The head is found through the blocks' maxima, the draws through their sums.

numba's cache goes by ``scan_kernels.py`` alone: whoever changes a number here makes a change there, too.
"""
LEAST = -5e29
"""A lower logit stands for probability 0, as -inf does: models mask ids with their dtype's lowest number, too."""
BELOW_1 = 1 - 2.0**-53
"""The highest float64 below 1."""


class Scan(NamedTuple):
    """What the passes over the vocabulary give for R rows: the S highest ids singled out, and the rest in sums.

    Whatever the head will be, all beyond the first S ids is tail. It is summed relative to its own highest logit, the
    next in the ranking, so that a tail of mass 1e-12 is as exact as one of 0.5.
    """

    maxima: Tensor
    """(R,) float32; NaN if the row holds one, -inf if no id is possible. If not finite, all else means nothing."""
    values: Tensor
    """(R, S + 1) float64, the highest logits; -inf where the row has fewer possible ids."""
    ids: Tensor
    """(R, S + 1) int64, theirs; 0 where there is none."""
    rests: Tensor
    """(R, T) float64, log of the rest's sum of exp(logit / temperature)."""
    rest_means: Tensor
    """(R,) float64, mean logit of the rest's distribution at T=1."""
    block_bounds: Tensor
    """(R, blocks) float64, sum of exp(logit - the rest's highest) over the rest up to the end of each block."""


class Draws(NamedTuple):
    """What was drawn in R rows, N distinct ids, row after row, in each row by the logits, descending."""

    counts: Tensor
    """(R,) int64, distinct ids of each row."""
    ids: Tensor
    """(N,) int64."""
    draws: Tensor
    """(N,) int64, how often each was drawn."""
    logits: Tensor
    """(N,) float64."""
