"""Measure what a selection loses: how far the stored targets are from the teacher's distributions.

Most of it can be computed from the soft labels alone, since they have the exact entropy and tail mass.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from softlabel.storage.labels import SoftLabels

Doubles = NDArray[np.float64]


def kept_mass(labels: SoftLabels) -> Doubles:
    """(P,) probability of the head."""
    mass: Doubles = -np.expm1(labels.tail_log_masses[0].astype(np.float64))
    return mass


def bucket_kl(labels: SoftLabels, vocabulary: int) -> Doubles:
    """(P,) KL(p || t) in nats, where t has p's head, and the tail's mass r spread evenly over all other ids.

    This is r log(V - k) minus the tail's part of the entropy, H(p) - H(head and bucket): the information about p that
    the head and r do not give.

    Args:
        labels: soft labels of P positions.
        vocabulary: size of the vocabulary, V.
    """
    log_r = labels.tail_log_masses[0].astype(np.float64)
    r = np.exp(log_r)
    rows = np.repeat(np.arange(labels.positions), labels.head_counts)
    logprobs = labels.head_logprobs.astype(np.float64)
    head = np.bincount(rows, np.exp(logprobs) * np.where(np.isfinite(logprobs), logprobs, 0), labels.positions)
    bucketed = -head - r * np.where(r > 0, log_r, 0)
    others = np.log(np.maximum(vocabulary - labels.head_counts, 1))
    lost: Doubles = np.maximum(r * others - (labels.entropies - bucketed), 0)
    return lost


def collisions(logits: Tensor) -> Tensor:
    """(P,) sum of p² over the vocabulary: the probability that two draws are the same.

    Args:
        logits: (P, V) float32.
    """
    return ((2 * logits).logsumexp(1) - 2 * logits.logsumexp(1)).exp()


def squared_error(labels: SoftLabels, collisions: Doubles, draws: int) -> Doubles:
    """(P,) expected squared distance of head and sampled tail from p, their mean: with M = ceil(draws r) draws of
    weight r / M each, it is (r² - sum of p² over the tail) / M.

    Args:
        labels: soft labels of P positions.
        collisions: (P,) ``collisions`` of the same positions.
        draws: the selection's number of draws, above 0.
    """
    r = np.exp(labels.tail_log_masses[0].astype(np.float64))
    rows = np.repeat(np.arange(labels.positions), labels.head_counts)
    tail = collisions - np.bincount(rows, np.exp(2.0 * labels.head_logprobs), labels.positions)
    error: Doubles = np.maximum(r**2 - np.maximum(tail, 0), 0) / np.maximum(np.ceil(draws * r), 1)
    return error
