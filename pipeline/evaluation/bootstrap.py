"""Errors of means over documents, and of differences between students, by the Poisson bootstrap.

Positions of one document resemble each other, so documents are what an evaluation samples. A replicate counts each
document as often as a Poisson variable says, which depends only on the document's id and the replicate's number. So
documents can come in any order and in parts, students share the replicates and are compared over the same documents,
and the memory does not grow with the documents. Knows no model and no metric.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, factorial, isfinite, sqrt
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.pipeline.selection import counter_rng

REPLICATES = 500
"""Replicates, whose spread gives an error to within about 3 %."""
FEWEST = 5
"""With fewer documents than this, nothing is said about errors."""
_LEVEL = 0.95
_POISSON = np.cumsum([exp(-1) / factorial(count) for count in range(16)])

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean, with its standard error and its 95 % interval over documents."""

    mean: float
    error: float | None
    """None for too few documents, like the interval."""
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Difference(Estimate):
    """How much larger one student's mean is than another's, over the same documents."""

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def seed_of(document: str) -> int:
    """The number that stands for a document, from its id."""
    return counter_rng.seed(b"softlabel bootstrap", document.encode())


def effective(sizes: NDArray[np.int64]) -> float:
    """Number of documents of equal size that would give errors as large as documents of these sizes, (n,)."""
    return float(sizes.sum()) ** 2 / float(np.square(sizes.astype(np.float64)).sum()) if len(sizes) else 0.0


def worth(positions: Floats) -> float:
    """The same, from (1 + REPLICATES,) counts of positions: their variance is the sum of the squared sizes."""
    variance = float(positions[1:].var())
    return float(positions[0]) ** 2 / variance if variance else 0.0


class Sums:
    """Sums of several quantities over positions: once as they are, and once for each replicate.

    Args:
        shapes: by name, the number of cells that are summed.
    """

    def __init__(self, shapes: Mapping[str, int]) -> None:
        self.values: dict[str, Floats] = {name: np.zeros((1 + REPLICATES, cells)) for name, cells in shapes.items()}
        """(1 + REPLICATES, cells) of each name; the first row is the sum as it is."""

    def add(self, documents: NDArray[np.int64], parts: Mapping[str, Floats]) -> None:
        """Add the sums over some positions of D distinct documents.

        Args:
            documents: (D,) ``seed_of`` of each.
            parts: by name, (D, cells).
        """
        weights = _weights(documents)
        with np.errstate(invalid="ignore"):  # an infinite loss that a replicate does not count makes it NaN
            for name, part in parts.items():
                used = part.any(0)
                self.values[name][:, used] += weights @ part[:, used]


def _weights(documents: NDArray[np.int64]) -> Floats:
    """(1 + REPLICATES, D) how often each document counts."""
    uniform = counter_rng.uniform(torch.from_numpy(documents), torch.arange(REPLICATES)[:, None]).numpy()
    return np.concatenate([np.ones((1, len(documents))), np.searchsorted(_POISSON, uniform).astype(np.float64)])


def estimate(values: Floats, documents: float) -> Estimate:
    """The estimate behind (1 + REPLICATES,) values: that of the whole, and those of the replicates.

    Args:
        values: not finite where a replicate has nothing to measure.
        documents: ``effective`` number of documents.
    """
    replicates = values[1:][np.isfinite(values[1:])]
    if len(replicates) < REPLICATES // 2 or documents <= 1:
        return Estimate(float(values[0]), None, None)
    return around(float(values[0]), float(replicates.std(ddof=1)) * sqrt(documents / (documents - 1)), documents)


def difference(values: Floats, others: Floats, documents: float) -> Difference:
    """How much larger the first values are, for two students measured on the same documents."""
    with np.errstate(invalid="ignore"):
        found = estimate(values - others, documents)
    return Difference(found.mean, found.error, found.interval)


def around(mean: float, error: float, documents: float) -> Estimate:
    """A mean with its standard error over documents, and the interval that follows from it."""
    if documents < FEWEST or not isfinite(mean):
        return Estimate(mean, None, None)
    reach = _student_t(documents - 1) * error
    return Estimate(mean, error, (mean - reach, mean + reach))


def _student_t(freedom: float) -> float:
    """The factor of a standard error for a 95 % interval, from the normal distribution's by Cornish and Fisher."""
    z = NormalDist().inv_cdf((1 + _LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
