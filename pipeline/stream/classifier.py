"""Labelled documents of a table as batches: in the order that a student is trained on, or in the table's own.

The documents of a split are held in memory, with their distributions over the student's labels; a student of a
language model streams instead (``pipeline.stream.dataset``). Knows no model and no loss.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from softlabel.pipeline.config.train import StreamConfig
from softlabel.pipeline.models.padding import padded
from softlabel.pipeline.stream.epoch_plan import Cursor, Ints, accumulation, plan_epoch, share
from softlabel.pipeline.students.labels import LabelMap
from softlabel.storage.codec import decode
from softlabel.storage.errors import TableError
from softlabel.storage.reader import batches, index
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table


@dataclass(frozen=True)
class Documents:
    """N documents of a table, and what their teacher says of each."""

    tokens: list[NDArray[np.int32]]
    """Token ids, each (length,)."""
    labels: NDArray[np.int64]
    """(N,) id of the student's label; -1 where there is none."""
    logprobs: NDArray[np.float32]
    """(N, labels) the teacher's distribution over the student's labels, nats; NaN where it is left out whole."""
    unmapped: NDArray[np.float64]
    """(N,) mass of the teacher's distribution that is left out."""
    left_out: int
    """Further documents of the eval split whose text also occurs in the train split."""

    @classmethod
    def read(cls, table: Table, split: str, labels: LabelMap) -> Self:
        """The documents of a split; of eval, those alone that do not also occur in train.

        Raises:
            TableError: if there are none.
            UsageError: if documents have labels that nobody knows.
        """
        seen = pa.array([], pa.binary())
        if split == "eval":
            keys = index(table, ["key"])
            seen = keys.filter(pc.not_equal(keys.column("split"), "eval")).column("key").unique()
        tokens, names, logprobs, unmapped = [], [], [np.zeros((0, len(labels.names)), np.float32)], [np.zeros(0)]
        left_out = 0
        for _, group in batches(table, ["key", "label", "token_ids", *SOFT_LABELS.names], split):
            rows = group.filter(pc.invert(pc.is_in(group.column("key"), seen)))
            left_out += len(group) - len(rows)
            merged, rest = labels.merge(_dense(rows, table))
            tokens += [row.values.to_numpy() for row in rows.column("token_ids")]
            names += rows.column("label").to_pylist()
            logprobs.append(merged)
            unmapped.append(rest)
        if not tokens:
            raise TableError(
                f"the table has no documents in its {split} split"
                + (" that are not also in its train split" if left_out else ""),
                expected="at least one document",
                found=f"none in version {table.version}" + (f" ({left_out} also in train)" if left_out else ""),
                where=table.location,
                do="capture more documents; shards.eval_fraction sets the share of them that goes to eval",
            )
        return cls(tokens, labels.ids(names), np.concatenate(logprobs), np.concatenate(unmapped), left_out)

    def batch(self, numbers: Sequence[int], pad: int, global_positions: int) -> "ClassBatch":
        """Some of the documents side by side; none, and it is one row of padding that says nothing."""
        tokens = [self.tokens[number] for number in numbers] or [np.full(1, pad, np.int32)]
        inputs = padded(tokens, pad)
        chosen = np.array(numbers, np.int64)
        return ClassBatch(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=torch.from_numpy(self.labels[chosen]),
            logprobs=torch.from_numpy(self.logprobs[chosen]),
            global_positions=global_positions,
        )

    def batches(self, pad: int, batch_tokens: int) -> Iterator["ClassBatch"]:
        """Every document once, in the table's order; ``batch_tokens``, padding included, or one document, at a time."""
        numbers: list[int] = []
        longest = 0
        for number, ids in enumerate(self.tokens):
            longest = max(longest, len(ids))
            if numbers and longest * (len(numbers) + 1) > batch_tokens:
                yield self.batch(numbers, pad, len(numbers))
                numbers, longest = [], len(ids)
            numbers.append(number)
        yield self.batch(numbers, pad, len(numbers))


@dataclass(frozen=True)
class ClassBatch:
    """Documents side by side, padded on the right, and what is said of the first N of them, which are all or none."""

    input_ids: Tensor
    """(rows, L) int64."""
    attention_mask: Tensor
    """(rows, L) int64."""
    labels: Tensor
    """(N,) int64 id of the label; -1 where there is none."""
    logprobs: Tensor
    """(N, labels) float32: see ``Documents.logprobs``."""
    global_positions: int
    """Documents of the whole optimizer step, over all ranks and micro-batches: what its loss is divided by."""

    @property
    def positions(self) -> Tensor:
        """(N,) the captured position of each document: its last token's."""
        return self.attention_mask[: len(self.labels)].sum(1) - 1

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a transformers model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return replace(self, **{n: t.to(device, non_blocking=non_blocking) for n, t in self._tensors().items()})

    def pin_memory(self) -> Self:
        """The same in page-locked memory; a DataLoader with ``pin_memory`` calls it."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class ClassDataset(IterableDataset[ClassBatch]):
    """One rank's share of a split's documents, from an optimizer step on.

    Every document comes exactly once an epoch, in an order that ``stream.seed`` and the epoch alone decide. A step
    takes the next ``stream.batch_size`` documents (fewer at an epoch's end) and deals them out to the ranks one by one;
    each rank yields ``accumulation`` batches of ``stream.micro_batch_size`` at most, empty ones if it has no document
    left.

    Args:
        documents: of the split.
        stream: batch sizes and seed.
        pad: id of the padding.
        rank: which of the ranks this is.
        world_size: how many ranks share the documents.
        start: where to begin: what ``state`` said of the run that is resumed.
        epochs: passes over the split, those before ``start`` included.
        max_steps: optimizer steps instead, those before ``start`` included.
    """

    def __init__(
        self,
        documents: Documents,
        stream: StreamConfig,
        pad: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: Cursor | None = None,
        epochs: float = 1.0,
        max_steps: int | None = None,
    ) -> None:
        self._documents = documents
        self._stream = stream
        self._pad = pad
        self._rank = rank
        self._world_size = world_size
        self._start = start or Cursor()
        self._per_epoch = -(-len(documents.tokens) // stream.batch_size)
        self.total_steps = max_steps or math.ceil(epochs * self._per_epoch)
        """Optimizer steps of the whole run, those before ``start`` included."""

    @property
    def accumulation(self) -> int:
        """Batches that each rank yields an optimizer step."""
        return accumulation(self._stream.batch_size, self._world_size, self._stream.micro_batch_size)

    def state(self, step: int) -> Cursor:
        """Where a run is that has done so many optimizer steps."""
        epoch, done = divmod(max(step, 1) - 1, self._per_epoch)
        packs = min((done + 1) * self._stream.batch_size, len(self._documents.tokens))
        return Cursor(step, epoch, packs if step else 0)

    def __iter__(self) -> Iterator[ClassBatch]:
        size, micro_batch_size = self._stream.batch_size, self._stream.micro_batch_size
        for step in range(self._start.step, self.total_steps):
            epoch, place = divmod(step, self._per_epoch)
            if place == 0 or step == self._start.step:
                order = _order(len(self._documents.tokens), self._stream.seed, epoch)
            first, last = place * size, min((place + 1) * size, len(order))
            for micro in range(self.accumulation):
                mine = share(first, last, self._rank, self._world_size, micro_batch_size, micro)
                yield self._documents.batch(order[list(mine)].tolist(), self._pad, last - first)


def _order(count: int, seed: int, epoch: int) -> Ints:
    """A permutation of all documents: rows of one document each, all in one window."""
    lengths = np.ones(count, np.int32)
    return plan_epoch(lengths, np.arange(count + 1), 1, count, seed=seed, epoch=epoch).sequences


def _dense(rows: pa.Table, table: Table) -> NDArray[np.float32]:
    """(R, classes) log-probabilities in nats; -inf for what is not in the head: it has none."""
    labels = decode(rows, table.vocabulary)
    dense = np.full((len(rows), table.identity.vocabulary), -np.inf, np.float32)
    dense[np.repeat(np.arange(len(rows)), labels.head_counts), labels.head_ids] = labels.head_logprobs
    return dense
