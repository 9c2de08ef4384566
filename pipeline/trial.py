"""The teacher on trial: a few of the batches that a capture would make, timed, and labelled by several selections.

Batches are laid out by the share of all tokens that stands before them, the longest sequences first, so that what was
measured on a few of them can be carried over to the others. Nothing is written here.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from pipeline.fidelity import Doubles, collisions
from pipeline.questions import Questions
from pipeline.selection import Selection, select
from pipeline.teacher import Teacher, each_batch
from storage.codec import SoftLabels
from storage.provenance import TeacherIdentity

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """What came of one batch."""

    labels: list[SoftLabels]
    """By each of the selections."""
    collisions: Doubles
    """See ``fidelity.collisions``."""
    seconds: float
    """Of the forward pass and the first selection."""
    flops: float
    """Floating-point operations of the forward pass, as torch counts them on the longest sequence."""


class Layout:
    """The sequences of a sample in batches, as ``teacher.each_batch`` would make them.

    Args:
        tokens: (R,) length of each sequence.
        weights: (R,) how many sequences each stands for.
        batch_tokens: tokens of one forward pass, padding included.
    """

    def __init__(self, tokens: NDArray[np.int64], weights: Doubles, batch_tokens: int) -> None:
        order = np.argsort(-tokens, kind="stable")
        self.batches: list[Indices] = []
        while len(order):
            count = max(1, batch_tokens // int(tokens[order[0]]))
            self.batches.append(order[:count])
            order = order[count:]
        self.tokens = np.array([int(tokens[batch].sum()) for batch in self.batches])
        """Of each batch."""
        self._masses = np.array([float((tokens * weights)[batch].sum()) for batch in self.batches])
        self._middles = self._masses.cumsum() - self._masses / 2

    def spread(self, count: int) -> Indices:
        """Numbers of at most so many batches, each in the middle of an equal share of all tokens."""
        if count >= len(self.batches):
            return np.arange(len(self.batches))
        places = (np.arange(count) + 0.5) / count * self._masses.sum()
        return np.unique(np.searchsorted(self._masses.cumsum(), places))

    def over_all(self, batches: Indices, costs: Sequence[float]) -> float:
        """What all pending sequences cost, if some batches cost so much: each token what it costs in the nearest."""
        rates = np.array(costs) / self.tokens[batches]
        return float(self._masses @ np.interp(self._middles, self._middles[batches], rates))


def run(
    teacher: Teacher,
    identity: TeacherIdentity,
    asked: Questions,
    batch: Indices,
    selections: Sequence[Selection],
    batch_tokens: int,
) -> Run:
    """Run the teacher over one batch of a layout.

    The first selection is timed with the forward pass; the others are not, nor is whatever a first pass over
    sequences of this length, or a first selection, has to prepare.

    Raises:
        TeacherError: if the teacher says what no distribution is, or the device has no room for a single sequence.
    """
    tokens, positions = [asked.tokens[i] for i in batch], [asked.positions[i] for i in batch]
    first = asked.next_ids(batch[:1]), asked.seeds(batch[:1], selections[0], identity)
    with FlopCounterMode(display=False) as counter:
        for logits in teacher.logits(tokens[:1], positions[:1]):
            select(logits[:1], first[0][:1], first[1][:1], selections[0], teacher.vocabulary)
    besides = 0.0

    def label(part: Indices, chunks: Iterator[torch.Tensor]) -> tuple[list[SoftLabels], Doubles]:
        nonlocal besides
        next_ids = asked.next_ids(batch[part])
        seeds = [asked.seeds(batch[part], selection, identity) for selection in selections]
        found: list[list[SoftLabels]] = [[] for _ in selections]
        same, start = [], 0
        for logits in chunks:
            rows = slice(start, start + len(logits))
            start += len(logits)
            for i, selection in enumerate(selections):
                since = time.perf_counter()
                found[i].append(select(logits, next_ids[rows], seeds[i][rows], selection, teacher.vocabulary))
                besides += time.perf_counter() - since if i else 0.0
            since = time.perf_counter()
            same.append(collisions(logits.float()).double().cpu().numpy())
            besides += time.perf_counter() - since
        return [SoftLabels.concatenate(parts) for parts in found], np.concatenate(same)

    started = time.perf_counter()
    results = list(each_batch(teacher, tokens, positions, label, batch_tokens))
    return Run(
        labels=[SoftLabels.concatenate(parts) for parts in zip(*(labels for labels, _ in results), strict=True)],
        collisions=np.concatenate([same for _, same in results]),
        seconds=time.perf_counter() - started - besides,
        flops=counter.get_total_flops() * sum(map(len, tokens)) / len(tokens[0]),
    )
