"""Measures on a sample what a capture costs: the teacher's time, bytes on disk by selection, and the time of copying.

A few rows are written to a temporary table, as a capture would write them; its columns are measured and scaled up.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.config.capture import ShardsConfig
from softlabel.pipeline.estimation.sample import Sample, Weighted
from softlabel.pipeline.selection.fidelity import Doubles, collisions
from softlabel.pipeline.selection.select import select
from softlabel.pipeline.selection.selection import Selection
from softlabel.pipeline.teachers.queries import Queries
from softlabel.pipeline.teachers.teacher import Teacher, each_batch
from softlabel.storage.clustering import SAMPLE, fit
from softlabel.storage.identity import TeacherIdentity
from softlabel.storage.labels import SoftLabels
from softlabel.storage.schema import SEQUENCE, SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import column_bytes
from softlabel.storage.writer import ShardWriter


@dataclass(frozen=True)
class SampleTable:
    """A temporary table with the rows of a sample."""

    table: Table
    rows: pa.Table
    columns: dict[str, int]
    """Bytes of each column."""
    bytes: int
    """Total size, footers included."""

    @classmethod
    def write(cls, folder: Path, job: CaptureJob, rows: pa.Table, labels: SoftLabels) -> "SampleTable":
        """Write the rows and their soft labels as a capture would."""
        carried = pa.schema([column for column in rows.schema if column.name not in SEQUENCE.names])
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir(parents=True)
        table = Table.create(str(folder / "table"), job.identity, carried, labels, tokenizer)
        with ShardWriter(table, job.settings.shards.row_group_sequences) as writer:
            writer.append(rows, labels)
            size = writer.commit({"operation": "estimate"}).bytes
        table = table.newest()
        return cls(table, rows, column_bytes(table), size)

    def estimated_bytes(self, sample: Sample, shards: ShardsConfig) -> int:
        """Bytes of all pending rows.

        The size of soft labels is proportional to the positions, that of ids and masks to the tokens, that of the other
        columns to the sequences, and that of footers to the row groups.
        """
        units = dict.fromkeys(SOFT_LABELS.names, "positions") | dict.fromkeys(("token_ids", "loss_mask"), "tokens")
        pending = (sample.sequences, sample.copies)
        total = 0.0
        for name, size in self.columns.items():
            unit = units.get(name)
            total += size * sum(part.total(unit) for part in pending) / self._total(unit)
        groups = sum(_row_groups(part, shards) for part in pending)
        footers = self.bytes - sum(self.columns.values())
        return round(total + footers * groups / -(-len(self.rows) // shards.row_group_sequences))

    def copy_seconds(self, sample: Sample) -> float:
        """Seconds to copy soft labels to all pending copies, at the rate measured on these rows.

        The commit is not timed: there is one per shard, and these rows are few.
        """
        if not sample.copies.total():
            return 0.0
        index = self.rows.schema.get_field_index("document_id")
        copy_ids = pa.array([f"copy of {name}" for name in self.rows.column("document_id").to_pylist()])
        with ShardWriter(self.table, len(self.rows)) as writer:
            started = time.perf_counter()
            writer.append_copies(self.rows.set_column(index, self.rows.schema.field(index), copy_ids))
            seconds = time.perf_counter() - started
        return seconds * sample.copies.total("positions") / self._total("positions")

    def _total(self, column: str | None) -> int:
        return pc.sum(self.rows.column(column)).as_py() if column else len(self.rows)


def numbering_seconds(labels: SoftLabels, positions: int, vocabulary: int) -> float:
    """Seconds that a new table of so many positions takes to number its ids.

    Args:
        labels: soft labels of a sample; repeated, because fewer would be numbered in another way.
        positions: that the table gets at first.
        vocabulary: V, number of token ids.
    """
    repeated = SoftLabels.concatenate([labels] * -(-min(positions, SAMPLE) // labels.positions))
    started = time.perf_counter()
    fit(repeated, vocabulary)
    return time.perf_counter() - started


def bytes_of_copies(sample: Sample, location: str) -> int:
    """Bytes of the pending copies, by the mean size of the table's rows; for when all pending sequences are copies."""
    copies = sample.copies.total()
    shards = Table.open(location).shards() if copies and Table.exists(location) else ()
    return round(copies * sum(shard.bytes for shard in shards) / max(1, sum(shard.rows for shard in shards)))


def _row_groups(part: Weighted, config: ShardsConfig) -> int:
    """Row groups that these sequences will fill: each shard has one file per split."""
    size, held_out = config.row_group_sequences, config.eval_fraction
    shards = -(-part.total("positions") // config.positions)
    return shards * sum(math.ceil(share * part.total() / shards / size) for share in (held_out, 1 - held_out) if shards)


Indices = NDArray[np.int64]


@dataclass(frozen=True)
class TimedBatch:
    """A batch that the teacher was timed on."""

    labels: list[SoftLabels]
    """Soft labels by each of the selections."""
    collisions: Doubles
    """See ``fidelity.collisions``."""
    seconds: float
    """Time of the forward pass and the first selection."""
    flops: float
    """Floating-point operations of the forward pass, as torch counts them on the longest sequence."""


class Batches:
    """The sequences of a sample divided into batches as ``teacher.each_batch`` would, longest sequences first.

    Args:
        tokens: (R,) length of each sequence.
        weights: (R,) how many sequences each stands for.
        batch_tokens: tokens per forward pass, padding included.
    """

    def __init__(self, tokens: NDArray[np.int64], weights: Doubles, batch_tokens: int) -> None:
        order = np.argsort(-tokens, kind="stable")
        self.batches: list[Indices] = []
        while len(order):
            count = max(1, batch_tokens // int(tokens[order[0]]))
            self.batches.append(order[:count])
            order = order[count:]
        self.tokens = np.array([int(tokens[batch].sum()) for batch in self.batches])
        """Tokens of each batch."""
        self._pending_tokens = np.array([float((tokens * weights)[batch].sum()) for batch in self.batches])
        self._middles = self._pending_tokens.cumsum() - self._pending_tokens / 2

    def spread(self, count: int) -> Indices:
        """Numbers of at most ``count`` batches, each from the middle of an equal share of all tokens."""
        if count >= len(self.batches):
            return np.arange(len(self.batches))
        targets = (np.arange(count) + 0.5) / count * self._pending_tokens.sum()
        return np.unique(np.searchsorted(self._pending_tokens.cumsum(), targets))

    def estimated_total(self, timed: Indices, costs: Sequence[float]) -> float:
        """Cost of all pending sequences, given the costs of some batches: the cost per token is interpolated."""
        rates = np.array(costs) / self.tokens[timed]
        return float(self._pending_tokens @ np.interp(self._middles, self._middles[timed], rates))


def time_batch(
    teacher: Teacher,
    identity: TeacherIdentity,
    queries: Queries,
    batch: Indices,
    selections: Sequence[Selection],
    batch_tokens: int,
) -> TimedBatch:
    """Time the teacher on one batch.

    The first selection is timed with the forward pass. The others are not, nor are preparations that happen only once
    for sequences of this length.

    Raises:
        TeacherError: if the teacher's logits are not a distribution, or the device is too small for one sequence.
    """
    tokens, positions = [queries.tokens[i] for i in batch], [queries.positions[i] for i in batch]
    first = queries.next_ids(batch[:1]), queries.seeds(batch[:1], selections[0], identity)
    with FlopCounterMode(display=False) as counter:
        for logits in teacher.logits(tokens[:1], positions[:1]):
            select(logits[:1], first[0][:1], first[1][:1], selections[0], teacher.vocabulary)
    excluded = 0.0  # seconds

    def label(part: Indices, chunks: Iterator[torch.Tensor]) -> tuple[list[SoftLabels], Doubles]:
        nonlocal excluded
        next_ids = queries.next_ids(batch[part])
        seeds = [queries.seeds(batch[part], selection, identity) for selection in selections]
        by_selection: list[list[SoftLabels]] = [[] for _ in selections]
        collision_parts, start = [], 0
        for logits in chunks:
            rows = slice(start, start + len(logits))
            start += len(logits)
            for i, selection in enumerate(selections):
                since = time.perf_counter()
                by_selection[i].append(select(logits, next_ids[rows], seeds[i][rows], selection, teacher.vocabulary))
                excluded += time.perf_counter() - since if i else 0.0
            since = time.perf_counter()
            collision_parts.append(collisions(logits.float()).double().cpu().numpy())
            excluded += time.perf_counter() - since
        return [SoftLabels.concatenate(parts) for parts in by_selection], np.concatenate(collision_parts)

    started = time.perf_counter()
    results = list(each_batch(teacher, tokens, positions, label, batch_tokens))
    return TimedBatch(
        labels=[SoftLabels.concatenate(parts) for parts in zip(*(labels for labels, _ in results), strict=True)],
        collisions=np.concatenate([part for _, part in results]),
        seconds=time.perf_counter() - started - excluded,
        flops=counter.get_total_flops() * sum(map(len, tokens)) / len(tokens[0]),
    )
