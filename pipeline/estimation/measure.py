"""What a capture costs, measured on a sample: the teacher's time, each selection's labels, bytes on a disk, copying.

A few rows are written as a capture would, into a table of their own, whose columns are measured and scaled up.
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

from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.estimation.sample import Sample, Weighted
from softlabel.pipeline.selection.fidelity import Doubles, collisions
from softlabel.pipeline.selection.select import Selection, select
from softlabel.pipeline.teachers.queries import Queries
from softlabel.pipeline.teachers.teacher import Teacher, each_batch
from softlabel.storage.codec import SoftLabels
from softlabel.storage.identity import Identity, TeacherIdentity
from softlabel.storage.schema import SEQUENCE, SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import column_bytes
from softlabel.storage.writer import ShardWriter


@dataclass(frozen=True)
class Written:
    """Rows of a sample, in a table of their own."""

    table: Table
    rows: pa.Table
    columns: dict[str, int]
    """Bytes of each column."""
    bytes: int
    """Of all, footers included."""

    @classmethod
    def of(
        cls, folder: Path, capture: CaptureConfig, identity: Identity, rows: pa.Table, labels: SoftLabels
    ) -> "Written":
        """Write them."""
        carried = pa.schema([column for column in rows.schema if column.name not in SEQUENCE.names])
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir(parents=True)
        table = Table.create(str(folder / "table"), identity, carried, labels, tokenizer)
        with ShardWriter(table, capture.shards.row_group_sequences) as writer:
            writer.append(rows, labels)
            size = writer.commit({"operation": "estimate"}).bytes
        table = table.newest()
        return cls(table, rows, column_bytes(table), size)

    def over_all(self, sample: Sample, capture: CaptureConfig) -> int:
        """Bytes of all rows to come: soft labels go with the positions, ids and mask with the tokens, the other
        columns with the sequences, and the footer with the row groups."""
        grows = dict.fromkeys(SOFT_LABELS.names, "positions") | dict.fromkeys(("token_ids", "loss_mask"), "tokens")
        to_come = (sample.sequences, sample.copies)
        total = 0.0
        for name, size in self.columns.items():
            by = grows.get(name)
            total += size * sum(part.total(by) for part in to_come) / self._total(by)
        groups = sum(_row_groups(part, capture) for part in to_come)
        footers = self.bytes - sum(self.columns.values())
        return round(total + footers * groups / -(-len(self.rows) // capture.shards.row_group_sequences))

    def seconds_of_copies(self, sample: Sample) -> float:
        """How long it takes to give the copies to come their soft labels, at the rate of copying these rows.

        The commit is left out: there is one in a shard, and these rows are few.
        """
        if not sample.copies.total():
            return 0.0
        index = self.rows.schema.get_field_index("document_id")
        others = pa.array([f"copy of {name}" for name in self.rows.column("document_id").to_pylist()])
        with ShardWriter(self.table, len(self.rows)) as writer:
            started = time.perf_counter()
            writer.append_copies(self.rows.set_column(index, self.rows.schema.field(index), others))
            seconds = time.perf_counter() - started
        return seconds * sample.copies.total("positions") / self._total("positions")

    def _total(self, column: str | None) -> int:
        return pc.sum(self.rows.column(column)).as_py() if column else len(self.rows)


def bytes_of_copies(sample: Sample, capture: CaptureConfig) -> int:
    """Bytes of the copies to come, if the table has all that they are copied from: by what its rows take."""
    copies = sample.copies.total()
    shards = Table.open(capture.table).shards() if copies and Table.exists(capture.table) else ()
    return round(copies * sum(shard.bytes for shard in shards) / max(1, sum(shard.rows for shard in shards)))


def _row_groups(part: Weighted, capture: CaptureConfig) -> int:
    """Row groups of the files that these sequences come to lie in: a file for each split in each shard."""
    size, held_out = capture.shards.row_group_sequences, capture.shards.eval_fraction
    shards = -(-part.total("positions") // capture.shards.positions)
    return shards * sum(math.ceil(share * part.total() / shards / size) for share in (held_out, 1 - held_out) if shards)


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
    asked: Queries,
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
