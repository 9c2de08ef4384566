"""What rows take on a disk, and how long copying takes: a few are written as a capture would, into a table on trial.

What that table holds is measured column by column, and carried over to all rows that are to come.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import CaptureConfig
from pipeline.sampling import Sample, Weighted
from storage.codec import SoftLabels
from storage.inspection import column_bytes
from storage.provenance import Identity
from storage.schema import SEQUENCE, SOFT_LABELS
from storage.table import Table
from storage.writer import ShardWriter


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
