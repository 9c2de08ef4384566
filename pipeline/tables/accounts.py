"""What a table stores about a sequence, and what its teacher answers for the same sequence when it runs again.

Both are ``Answers`` about the same ids, so that they can be compared value by value. Nothing is judged here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.pipeline.teachers.kind import kind_of
from softlabel.pipeline.teachers.queries import Queries
from softlabel.pipeline.teachers.teacher import Teacher, each_batch
from softlabel.storage.codec import decode
from softlabel.storage.labels import SoftLabels
from softlabel.storage.table import Table

_LOWEST = -500.0
"""Log-probabilities below this count as 0; the table's codes end there."""

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What the table stores, or the teacher answers, about one sequence with P captured positions. All in nats."""

    logprobs: Doubles
    """Of all ids that the table stores, first the heads, then the tails."""
    masses: Doubles
    """(P x T) log-mass outside the table's head, for each temperature."""
    entropies: Doubles
    """(P,)"""
    next_logprobs: Doubles
    """(P,) log-probability of the actual next token; 0 where that is not known."""
    top: Indices
    """(P,) the likeliest id; -1 where the table stores no head."""

    def differences(self, other: "Answers") -> list[Doubles]:
        """Absolute differences of the values of each field, except ``top``."""
        pairs = zip(astuple(self)[:-1], astuple(other)[:-1], strict=True)
        return [np.abs(np.maximum(a, _LOWEST) - np.maximum(b, _LOWEST)) for a, b in pairs]


class SampledSequences:
    """Rows of a table, numbered from 0, and the teacher to run over them.

    Args:
        table: that the rows are from.
        rows: with the columns key, token_ids, loss_mask, label and the soft labels.
        teacher: that made the table.
    """

    def __init__(self, table: Table, rows: pa.Table, teacher: Teacher) -> None:
        self._teacher, self._temperatures = teacher, table.temperatures
        self._queries = Queries(rows, kind_of(table.identity.classes))
        self._labels = [_with_known_tails(decode(rows.slice(i, 1), table.numbering)) for i in range(len(rows))]
        self.tokens = np.array([len(tokens) for tokens in self._queries.tokens])
        """(R,) length of each sequence."""
        self.labels = SoftLabels.concatenate(self._labels)
        """Soft labels of all sequences, one after the other."""

    def stored_answers(self, i: int) -> Answers:
        """What the table stores about sequence i."""
        labels = self._labels[i]
        top = np.full(labels.positions, -1)
        starts = np.cumsum(labels.head_counts) - labels.head_counts
        filled = labels.head_counts > 0
        top[filled] = labels.head_ids[starts[filled]]
        values = (np.append(labels.head_logprobs, labels.tail_logprobs), labels.tail_log_masses.T.ravel())
        return _answers(*values, labels.entropies, labels.next_logprobs, top)

    def token_indices(self, i: int) -> list[Indices]:
        """For each field of the answers about sequence i, the token of each value, counted from 0."""
        labels, positions = self._labels[i], self._queries.positions[i].astype(np.int64)
        stored = np.append(np.repeat(positions, labels.head_counts), np.repeat(positions, labels.tail_counts))
        return [stored, np.repeat(positions, len(self._temperatures)), positions, positions]

    def teacher_answers(self, group: Indices, batch_tokens: int) -> Iterator[dict[int, Answers]]:
        """Run the teacher over a group of sequences, and yield its answers by sequence number, batch by batch."""

        def answer(batch: Indices, chunks: Iterator[Tensor]) -> dict[int, Answers]:
            numbers = group[batch]
            labels = [self._labels[i] for i in numbers]
            next_ids = self._queries.next_ids(numbers)
            answers = _answer_batch(chunks, SoftLabels.concatenate(labels), next_ids, self._temperatures)
            heads, tails, positions = (
                np.cumsum([0, *(len(values) for values in column)])
                for column in zip(*((part.head_ids, part.tail_ids, part.head_counts) for part in labels), strict=True)
            )
            return {
                int(i): _answers(
                    np.append(answers.heads[heads[n] : heads[n + 1]], answers.tails[tails[n] : tails[n + 1]]),
                    *(values[positions[n] : positions[n + 1]].ravel() for values in answers.by_position),
                )
                for n, i in enumerate(numbers)
            }

        tokens, positions = [self._queries.tokens[i] for i in group], [self._queries.positions[i] for i in group]
        yield from each_batch(self._teacher, tokens, positions, answer, batch_tokens)


def _with_known_tails(labels: SoftLabels) -> SoftLabels:
    """Soft labels without the draws of a row that does not store their log-probabilities."""
    known = ~np.isnan(labels.tail_logprobs)
    if known.all():
        return labels
    tails = {name: getattr(labels, name)[known] for name in ("tail_ids", "tail_draws", "tail_logprobs")}
    at = np.repeat(np.arange(labels.positions), labels.tail_counts)[known]
    return replace(labels, tail_counts=np.bincount(at, minlength=labels.positions).astype(np.int32), **tails)


@dataclass(frozen=True)
class _BatchAnswers:
    """What the teacher answers about a batch of sequences with P captured positions in all."""

    heads: Doubles
    """Log-probabilities of the ids in the stored heads."""
    tails: Doubles
    """Log-probabilities of the ids in the stored tails."""
    by_position: list[NDArray[np.generic]]
    """Masses, entropies, the next token's log-probability and the likeliest id, each (P, ...)."""


def _answer_batch(
    chunks: Iterator[Tensor], labels: SoftLabels, next_ids: Tensor, temperatures: Sequence[float]
) -> _BatchAnswers:
    head_rows = np.repeat(np.arange(labels.positions), labels.head_counts)
    tail_rows = np.repeat(np.arange(labels.positions), labels.tail_counts)
    parts: list[list[Tensor]] = []
    start = 0
    for logits in (chunk.float() for chunk in chunks):
        end, device = start + len(logits), logits.device
        (heads, head_ids), (tails, tail_ids) = (
            (torch.from_numpy(rows[part] - start).to(device), torch.from_numpy(ids[part]).long().to(device))
            for rows, ids in ((head_rows, labels.head_ids), (tail_rows, labels.tail_ids))
            for part in [slice(*np.searchsorted(rows, [start, end]))]
        )
        logprobs = logits.log_softmax(1)
        masses = []
        for T in temperatures:
            scaled = logits / T
            total = scaled.logsumexp(1)
            scaled[heads, head_ids] = -torch.inf
            masses.append(scaled.logsumexp(1) - total)
        next_id = next_ids[start:end].to(device).long()
        next_logprobs = logprobs.gather(1, next_id.clamp(min=0)[:, None])[:, 0].masked_fill(next_id < 0, torch.nan)
        by_position = [
            torch.stack(masses, 1),
            torch.special.entr(logprobs.exp()).sum(1),
            next_logprobs,
            logits.argmax(1),
        ]
        parts.append([part.cpu() for part in (logprobs[heads, head_ids], logprobs[tails, tail_ids], *by_position)])
        start = end
    all_heads, all_tails, *all_by_position = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return _BatchAnswers(all_heads, all_tails, all_by_position)


def _answers(
    logprobs: NDArray[np.generic],
    masses: NDArray[np.generic],
    entropies: NDArray[np.generic],
    next_logprobs: NDArray[np.generic],
    top: NDArray[np.generic],
) -> Answers:
    next_values = next_logprobs.astype(np.float64)
    return Answers(
        logprobs.astype(np.float64),
        masses.astype(np.float64),
        entropies.astype(np.float64),
        np.where(np.isnan(next_values), 0.0, next_values),
        top.astype(np.int64),
    )
