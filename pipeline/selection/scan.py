"""Results of the selection's pass over the vocabulary, and of draws from it.

``scan_torch`` computes both on any device; ``scan_cpu`` does on a CPU, where it is several times faster.
"""

from typing import NamedTuple

from torch import Tensor

BLOCK = 64
"""Number of ids in a block. The head is found with the blocks' maxima, the draws with their sums.

numba caches by the content of ``scan_kernels.py`` only: after a change of a number here, change that file, too.
"""
LEAST = -5e29
"""A lower logit means probability 0, like -inf: models also mask ids with their dtype's lowest number."""
BELOW_1 = 1 - 2.0**-53
"""The highest float64 below 1."""


class Scan(NamedTuple):
    """Result of the passes over the vocabulary for R rows: the S highest ids one by one, and sums over the rest.

    The head never has more than S ids, so the rest is always tail. It is summed relative to its own highest logit (the
    one after the first S), so that a tail of mass 1e-12 is as exact as one of 0.5.
    """

    maxima: Tensor
    """(R,) float32; NaN if the row has a NaN, -inf if no id is possible. If not finite, ignore all other fields."""
    values: Tensor
    """(R, S + 1) float64, the highest logits; -inf where the row has fewer possible ids."""
    ids: Tensor
    """(R, S + 1) int64, ids of these logits; 0 where there is none."""
    rests: Tensor
    """(R, T) float64, log of the rest's sum of exp(logit / temperature)."""
    rest_means: Tensor
    """(R,) float64, mean logit of the rest's distribution at T=1."""
    block_bounds: Tensor
    """(R, blocks) float64, sum of exp(logit - the rest's highest) over the rest up to the end of each block."""


class Draws(NamedTuple):
    """Draws of R rows: N distinct ids, row by row, and within a row by descending logit."""

    counts: Tensor
    """(R,) int64, number of distinct ids in each row."""
    ids: Tensor
    """(N,) int64."""
    draws: Tensor
    """(N,) int64, how often each id was drawn."""
    logits: Tensor
    """(N,) float64."""
