"""Batches of a classifier's documents: shuffled for training, or in the table's order.

All documents of a split are held in memory, with their distributions over the student's labels; language models stream
instead (``pipeline.stream.dataset``). Knows no model and no loss.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from softlabel.pipeline.config.train import StreamConfig
from softlabel.pipeline.models.padding import padded
from softlabel.pipeline.stream.by_column import largest_values, numbers, require_columns
from softlabel.pipeline.stream.epoch_plan import Ints, accumulation, plan_epoch, share
from softlabel.pipeline.students.labels import LabelMap
from softlabel.pipeline.students.record import Cursor
from softlabel.storage.codec import decode
from softlabel.storage.errors import TableError
from softlabel.storage.reader import batches, index
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table


@dataclass(frozen=True)
class LabelledDocuments:
    """N documents of a table, and the teacher's distribution for each."""

    tokens: list[NDArray[np.int32]]
    """Token ids, each (length,)."""
    labels: NDArray[np.int64]
    """(N,) id of the student's label; -1 where there is none."""
    logprobs: NDArray[np.float32]
    """(N, labels) the teacher's log-probabilities of the student's labels, nats; NaN where all its mass is left out."""
    unmapped: NDArray[np.float64]
    """(N,) mass of the teacher's distribution on classes without a label."""
    left_out: int
    """Number of documents of the eval split that were left out because they also occur in the train split."""
    values: Mapping[str, tuple[str, ...]]
    """By column to group by: its values, those of the most documents first."""
    groups: Mapping[str, Ints]
    """By column: (N,) number of each document's value."""

    @classmethod
    def read(cls, table: Table, split: str, labels: LabelMap, by: Sequence[str] = ()) -> Self:
        """Read the documents of a split; eval documents that also occur in train are left out.

        Args:
            table: table of a classifier.
            split: train or eval.
            labels: the student's labels.
            by: carried columns, by whose values results will be grouped.

        Raises:
            TableError: if there are none.
            UsageError: if documents have labels that are neither the student's nor the teacher's, or the table has no
                such column.
        """
        require_columns(table, by)
        seen = pa.array([], pa.binary())
        if split == "eval":
            keys = index(table, ["key"])
            seen = keys.filter(pc.not_equal(keys.column("split"), "eval")).column("key").unique()
        tokens, names, logprobs, unmapped = [], [], [np.zeros((0, len(labels.names)), np.float32)], [np.zeros(0)]
        left_out, carried = 0, []
        columns = list(dict.fromkeys(["key", "label", "token_ids", *SOFT_LABELS.names, *by]))
        for _, group in batches(table, columns, split):
            rows = group.filter(pc.invert(pc.is_in(group.column("key"), seen)))
            left_out += len(group) - len(rows)
            merged, rest = labels.merge(_dense(rows, table))
            tokens += [row.values.to_numpy() for row in rows.column("token_ids")]
            names += rows.column("label").to_pylist()
            logprobs.append(merged)
            unmapped.append(rest)
            carried.append(rows.select(list(by)))
        if not tokens:
            raise TableError(
                f"the table has no documents in its {split} split"
                + (" that are not also in its train split" if left_out else ""),
                expected="at least one document",
                found=f"none in version {table.version}" + (f" ({left_out} also in train)" if left_out else ""),
                where=table.location,
                do="capture more documents; shards.eval_fraction sets the share of them that goes to eval",
            )
        rows = pa.concat_tables(carried)
        counted = pl.DataFrame(rows).with_columns(positions=1)
        values = {name: largest_values(counted, name) for name in by}
        return cls(
            tokens=tokens,
            labels=labels.ids(names),
            logprobs=np.concatenate(logprobs),
            unmapped=np.concatenate(unmapped),
            left_out=left_out,
            values=values,
            groups={name: numbers(rows, name, values[name]) for name in by},
        )

    def batch(self, numbers: Sequence[int], pad: int, global_positions: int) -> "ClassBatch":
        """A batch of some of the documents; without any, one row of padding without labels."""
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

    def batches(self, pad: int, batch_tokens: int, start: int = 0) -> Iterator["ClassBatch"]:
        """Every document from ``start`` on once, in the table's order, in batches.

        Args:
            pad: id of the padding token.
            batch_tokens: maximum tokens of a batch, including padding; a longer document is a batch of its own.
            start: number of documents to leave out.
        """
        chosen: list[int] = []
        longest = 0
        for number in range(start, len(self.tokens)):
            length = len(self.tokens[number])
            longest = max(longest, length)
            if chosen and longest * (len(chosen) + 1) > batch_tokens:
                yield self.batch(chosen, pad, len(chosen))
                chosen, longest = [], length
            chosen.append(number)
        if chosen:
            yield self.batch(chosen, pad, len(chosen))


@dataclass(frozen=True)
class ClassBatch:
    """Documents padded on the right, and the labels and distributions of the first N rows: of all rows or none."""

    input_ids: Tensor
    """(rows, L) int64."""
    attention_mask: Tensor
    """(rows, L) int64."""
    labels: Tensor
    """(N,) int64: id of the label; -1 where there is none."""
    logprobs: Tensor
    """(N, labels) float32: see ``LabelledDocuments.logprobs``."""
    global_positions: int
    """Documents of the whole optimizer step, over all ranks and micro-batches: the divisor of its loss."""

    @property
    def positions(self) -> Tensor:
        """(N,) the captured position of each document: that of its last token."""
        return self.attention_mask[: len(self.labels)].sum(1) - 1

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of a transformers model."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy to another device."""
        return replace(self, **{n: t.to(device, non_blocking=non_blocking) for n, t in self._tensors().items()})

    def pin_memory(self) -> Self:
        """Copy to page-locked memory; called by a DataLoader with ``pin_memory``."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class ClassDataset(IterableDataset[ClassBatch]):
    """One rank's share of a split's documents, from an optimizer step on.

    Every document comes exactly once per epoch, in an order that depends only on ``stream.seed`` and the epoch. A step
    takes the next ``stream.batch_size`` documents (fewer at an epoch's end) and deals them out to the ranks one by one;
    each rank yields ``accumulation`` batches of at most ``stream.micro_batch_size``, empty ones once it has no document
    left.

    Args:
        documents: documents of the split.
        stream: batch sizes and seed.
        pad: id of the padding token.
        rank: index of this rank.
        world_size: number of ranks.
        start: where to start: ``state`` of the run that is resumed.
        epochs: passes over the split, including those before ``start``.
        max_steps: optimizer steps instead of epochs, including those before ``start``.
    """

    def __init__(
        self,
        documents: LabelledDocuments,
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
        """Optimizer steps of the whole run, including those before ``start``."""

    @property
    def accumulation(self) -> int:
        """Number of batches that each rank yields per optimizer step."""
        return accumulation(self._stream.batch_size, self._world_size, self._stream.micro_batch_size)

    def state(self, step: int) -> Cursor:
        """Cursor of a run after a number of optimizer steps."""
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
    """A permutation of all documents, planned as rows of one document each in a single window."""
    lengths = np.ones(count, np.int32)
    return plan_epoch(lengths, np.arange(count + 1), 1, count, seed=seed, epoch=epoch).sequences


def _dense(rows: pa.Table, table: Table) -> NDArray[np.float32]:
    """(R, classes) log-probabilities in nats; -inf outside the head, where the probability is 0."""
    labels = decode(rows, table.numbering)
    dense = np.full((len(rows), table.identity.vocabulary), -np.inf, np.float32)
    dense[np.repeat(np.arange(len(rows)), labels.head_counts), labels.head_ids] = labels.head_logprobs
    return dense
