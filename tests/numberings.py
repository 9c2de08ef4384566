"""Numberings of token ids as they are in large tables: with clusters, lists, and numbers that are not in order."""

import numpy as np

from softlabel.storage.labels import SoftLabels
from softlabel.storage.numbering import Numbering


def random_numbering(vocabulary: int, seed: int = 0, clusters: int = 3, listed: int | None = None) -> Numbering:
    """A numbering of so many ids at random; by default, a fourth of the ids are in the list of each cluster."""
    rng = np.random.default_rng(seed)
    listed = vocabulary // 4 if listed is None else listed
    lists = np.array([rng.permutation(vocabulary)[:listed] for _ in range(clusters)], np.int32).reshape(clusters, -1)
    count = listed + vocabulary
    numbers = np.sort(rng.permutation(2 * count)[:count]).astype(np.int32)
    return Numbering(rng.permutation(vocabulary).astype(np.int32), lists, rng.permutation(numbers))


def by_id(labels: SoftLabels) -> SoftLabels:
    """The same soft labels with the ids of each tail in ascending order; their order means nothing."""
    order = np.lexsort((labels.tail_ids, np.repeat(np.arange(labels.positions), labels.tail_counts)))
    tails = {name: getattr(labels, name)[order] for name in ("tail_ids", "tail_draws", "tail_logprobs")}
    return SoftLabels(**{**vars(labels), **tails})
