"""Asking a teacher again: what it says, this time, at the very ids that a table has kept.

The table's own account has the same form, so that any two accounts can be laid side by side. Nothing is judged here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.pipeline.teachers.queries import Queries
from softlabel.pipeline.teachers.teacher import Teacher, each_batch
from softlabel.storage.codec import SoftLabels, decode
from softlabel.storage.table import Table

_LOWEST = -500.0
"""Log-probabilities below this are as good as 0; codes end there."""

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Account:
    """What the teacher, or the table, says of one sequence with P captured positions. All in nats."""

    logprobs: Doubles
    """Of all ids that the table keeps, head and then tail."""
    masses: Doubles
    """(P x T) log-mass outside the table's head, for each temperature."""
    entropies: Doubles
    """(P,)"""
    next_logprobs: Doubles
    """(P,) of what really follows; 0 where that is not known."""
    top: Indices
    """(P,) the likeliest id; the table does not say it of a position without a head: -1."""

    def apart(self, other: "Account") -> list[Doubles]:
        """Absolute difference of each value, by field; top is left out."""
        pairs = zip(astuple(self)[:-1], astuple(other)[:-1], strict=True)
        return [np.abs(np.maximum(a, _LOWEST) - np.maximum(b, _LOWEST)) for a, b in pairs]


class Sequences:
    """Rows of a table, and a teacher to be asked about them.

    Args:
        table: that they are from.
        rows: with key, token_ids, loss_mask, label and the soft labels.
        teacher: that made it.
    """

    def __init__(self, table: Table, rows: pa.Table, teacher: Teacher) -> None:
        self._teacher, self._temperatures = teacher, table.temperatures
        self._asked = Queries(rows, table.identity.classes)
        self._labels = [decode(rows.slice(i, 1), table.vocabulary) for i in range(len(rows))]
        self.tokens = np.array([len(tokens) for tokens in self._asked.tokens])
        """(R,) of each."""
        self.labels = SoftLabels.concatenate(self._labels)
        """Of all, one after the other."""

    def stored(self, i: int) -> Account:
        """What the table says of a sequence."""
        labels = self._labels[i]
        top = np.full(labels.positions, -1)
        starts = np.cumsum(labels.head_counts) - labels.head_counts
        filled = labels.head_counts > 0
        top[filled] = labels.head_ids[starts[filled]]
        values = (np.append(labels.head_logprobs, labels.tail_logprobs), labels.tail_log_masses.T.ravel())
        return _account(*values, labels.entropies, labels.next_logprobs, top)

    def places(self, i: int) -> list[Indices]:
        """For each field of an account of a sequence, the token that each value is about, counted from 0."""
        labels, positions = self._labels[i], self._asked.positions[i].astype(np.int64)
        kept = np.append(np.repeat(positions, labels.head_counts), np.repeat(positions, labels.tail_counts))
        return [kept, np.repeat(positions, len(self._temperatures)), positions, positions]

    def ask(self, group: Indices, batch_tokens: int) -> Iterator[dict[int, Account]]:
        """What the teacher says of some sequences, a batch at a time, by their numbers."""

        def listen(batch: Indices, chunks: Iterator[Tensor]) -> dict[int, Account]:
            chosen = group[batch]
            labels = [self._labels[i] for i in chosen]
            said = _listen(chunks, SoftLabels.concatenate(labels), self._asked.next_ids(chosen), self._temperatures)
            heads, tails, positions = (
                np.cumsum([0, *(len(values) for values in column)])
                for column in zip(*((part.head_ids, part.tail_ids, part.head_counts) for part in labels), strict=True)
            )
            return {
                int(i): _account(
                    np.append(said.heads[heads[n] : heads[n + 1]], said.tails[tails[n] : tails[n + 1]]),
                    *(values[positions[n] : positions[n + 1]].ravel() for values in said.by_position),
                )
                for n, i in enumerate(chosen)
            }

        tokens, positions = [self._asked.tokens[i] for i in group], [self._asked.positions[i] for i in group]
        yield from each_batch(self._teacher, tokens, positions, listen, batch_tokens)


@dataclass(frozen=True)
class _Heard:
    """What the teacher says of a batch."""

    heads: Doubles
    tails: Doubles
    by_position: list[NDArray[np.generic]]
    """Masses, entropies, the next token's log-probability and the likeliest id, each (P, ...)."""


def _listen(chunks: Iterator[Tensor], labels: SoftLabels, next_ids: Tensor, temperatures: Sequence[float]) -> _Heard:
    head_rows = np.repeat(np.arange(labels.positions), labels.head_counts)
    tail_rows = np.repeat(np.arange(labels.positions), labels.tail_counts)
    parts: list[list[Tensor]] = []
    start = 0
    for logits in (chunk.float() for chunk in chunks):
        end, on = start + len(logits), logits.device
        (heads, head_ids), (tails, tail_ids) = (
            (torch.from_numpy(rows[part] - start).to(on), torch.from_numpy(ids[part]).long().to(on))
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
        following = next_ids[start:end].to(on).long()
        next_logprobs = logprobs.gather(1, following.clamp(min=0)[:, None])[:, 0].masked_fill(following < 0, torch.nan)
        entropies = torch.special.entr(logprobs.exp()).sum(1)
        said = [logprobs[heads, head_ids], logprobs[tails, tail_ids], torch.stack(masses, 1), entropies, next_logprobs]
        parts.append([part.cpu() for part in (*said, logits.argmax(1))])
        start = end
    kept_heads, kept_tails, *by_position = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return _Heard(kept_heads, kept_tails, by_position)


def _account(
    logprobs: NDArray[np.generic],
    masses: NDArray[np.generic],
    entropies: NDArray[np.generic],
    next_logprobs: NDArray[np.generic],
    top: NDArray[np.generic],
) -> Account:
    following = next_logprobs.astype(np.float64)
    return Account(
        logprobs.astype(np.float64),
        masses.astype(np.float64),
        entropies.astype(np.float64),
        np.where(np.isnan(following), 0.0, following),
        top.astype(np.int64),
    )
