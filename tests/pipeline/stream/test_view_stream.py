"""The stream over views: how often each sequence comes, over topologies and restarts, and what is held out."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.pipeline.config.train import StreamConfig
from softlabel.pipeline.loss.averaging import AveragedTargets
from softlabel.pipeline.stream import dataset
from softlabel.pipeline.stream.dataset import SoftLabelDataset
from softlabel.pipeline.stream.holdout import Holdout
from softlabel.pipeline.students.record import Cursor
from softlabel.storage.errors import TableError, UsageError
from softlabel.storage.reader import read
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.views.mixing import make_view
from softlabel.storage.views.view import View
from softlabel.storage.writer import ShardWriter
from tests.pipeline.streams import make_table, random_labels, reference, unpacked

EPOCHS = 4
"""Enough epochs for a weight of 0.25 to give a whole number."""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The first has the rows of the second, and 23 more to train on and 13 held out."""
    folder = tmp_path_factory.mktemp("tables")
    for name in "ab":
        (folder / name).mkdir()
    return [make_table(folder / "a").location, make_table(folder / "b", shards=2).location]


@pytest.fixture(scope="module")
def weighted(tables: list[str], tmp_path_factory: pytest.TempPathFactory) -> View:
    return make_view(str(tmp_path_factory.mktemp("view") / "v"), tables, (2.0, 0.25), "concatenate")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "WINDOW_TOKENS", 400)


def names(batches) -> Counter:
    return Counter(row["next_logprobs"] for batch in batches for row in unpacked(batch))


def stream(**fields: int) -> StreamConfig:
    return StreamConfig(**{"max_length": 64, "batch_size": 8, "micro_batch_size": 4, "seed": 5, **fields})


def steps(
    view: View, start: Cursor, last: int | None, world_size: int, micro_batch_size: int
) -> tuple[list[Counter], Cursor]:
    """Global batches from a cursor to a step, over some ranks, and the cursor there."""
    parts = [
        SoftLabelDataset(
            view, stream(micro_batch_size=micro_batch_size), rank=r, world_size=world_size, start=start, epochs=2
        )
        for r in range(world_size)
    ]
    last = min(parts[0].total_steps, last or parts[0].total_steps)
    streams = [iter(part) for part in parts]
    found = [
        names(next(batches) for _ in range(parts[0].accumulation) for batches in streams)
        for _ in range(start.step, last)
    ]
    return found, parts[0].state(last)


def test_each_sequence_comes_as_often_as_its_weight_says(weighted: View):
    """With weights 2 and 0.25 over four epochs: 8 times, and once more for sequences that both tables have."""
    found = names(SoftLabelDataset(weighted, stream(), epochs=EPOCHS))
    first, second = ({row["next_logprobs"] for row in reference(table)} for table in weighted.tables)
    assert found == {name: 9 if name in second else 8 for name in first}
    assert second < first


@settings(max_examples=4)
@given(st.lists(st.tuples(st.integers(1, 25), st.integers(1, 4), st.integers(1, 8)), max_size=4))
def test_topologies_and_restarts_do_not_change_the_stream(weighted: View, phases):
    """Each phase runs some steps on some ranks with micro-batches of its own; the last one runs to the end."""
    whole, end = steps(weighted, Cursor(), None, 1, 8)
    found, cursor = [], Cursor()
    for count, world_size, micro_batch_size in phases:
        part, cursor = steps(weighted, cursor, cursor.step + count, world_size, micro_batch_size)
        found += part
    part, cursor = steps(weighted, cursor, None, 2, 3)
    assert (found + part, cursor) == (whole, end)


def test_an_average_streams_the_shared_sequences_with_each_tables_soft_labels(tables: list[str], tmp_path: Path):
    view = make_view(str(tmp_path / "v"), tables, (1.0, 3.0), "average")
    (batch,) = SoftLabelDataset(pickle.loads(pickle.dumps(view)), stream(batch_size=200, micro_batch_size=200))
    assert isinstance(batch.targets, AveragedTargets)
    assert batch.targets.weights == (0.25, 0.75)
    assert batch.sequences == len(reference(view.tables[1]))
    first, second = batch.targets.parts
    assert first.tail_log_masses.shape == (1, len(batch.positions))
    for name in ("head_counts", "head_ids", "tail_draws", "tail_log_masses", "next_logprobs"):
        assert torch.equal(getattr(first, name), getattr(second, name)), "these tables say the same"
    assert batch.to("cpu").targets.parts[1].head_ids.equal(second.head_ids)


def test_train_sequences_of_any_table_of_a_view_are_not_held_out(tables: list[str], tmp_path: Path, weighted: View):
    assert Holdout.of(weighted).sequences == 13
    source, folder = weighted.tables[0], tmp_path / "c"
    folder.mkdir()
    other = make_table(folder, shards=1)
    rows = read(source, source.shards("eval")[0]).slice(0, 5)
    sequences = rows.append_column("split", pa.array(["train"] * 5)).select(SEQUENCE.names).cast(SEQUENCE)
    with ShardWriter(other, row_group=8) as writer:
        positions = sum(sequences.column("positions").to_pylist())
        writer.append(sequences, random_labels(np.random.default_rng(1), positions))
        writer.commit({})
    view = make_view(str(tmp_path / "v"), [tables[0], other.location], (1.0, 1.0), "concatenate")
    assert (Holdout.of(view).sequences, Holdout.of(view).left_out) == (8, 5)
    shared = make_view(str(tmp_path / "shared"), [tables[0], tables[1]], (1.0, 1.0), "average")
    with pytest.raises(TableError, match="no sequences to evaluate students on"):
        Holdout.of(shared)


@pytest.mark.parametrize("change", ["another chunk", "another teacher's rows", "a longer document", "another id"])
@pytest.mark.parametrize("first", [True, False])
def test_documents_that_any_table_of_a_view_trains_on_are_not_held_out(
    tables: list[str], tmp_path: Path, change: str, first: bool
):
    """Not even if they were cut differently, so that no sequence is the same token for token."""
    source, folder = Table.open(tables[0]), tmp_path / "c"
    folder.mkdir()
    other = make_table(folder, shards=1)
    held = read(source, source.shards("eval")[0])
    rows = held.slice(0, 5).to_pylist()
    for number, row in enumerate(rows):
        row["key"], row["split"] = b"%016d" % number, "train"
        if change == "another chunk":
            row["chunk"], row["chunks"] = 3, 7
        if change == "a longer document":
            row["fingerprint"] = b"1" * 16
        if change == "another id":
            row["document_id"], row["chunk"], row["chunks"] = f"other {number}", 3, 7
    sequences = pa.Table.from_pylist(rows).select(SEQUENCE.names).cast(SEQUENCE)
    with ShardWriter(other, row_group=8) as writer:
        writer.append(sequences, random_labels(np.random.default_rng(1), sum(row["positions"] for row in rows)))
        writer.commit({})
    parts = [tables[0], other.location] if first else [other.location, tables[0]]
    found = Holdout.of(make_view(str(tmp_path / "v"), parts, (1.0, 1.0), "concatenate"))
    assert (found.sequences, found.left_out, found.left_out_documents) == (8, 0, 5)
    documents = [name for batch in found.batches(200, packing=True) for name in batch.documents]
    assert sorted(documents) == sorted(held.column("document_id").to_pylist()[5:])
    assert sum(len(batch.batch.positions) for batch in found.batches(200, packing=False)) == found.positions


def test_epochs_without_any_sequence_are_refused(tables: list[str], tmp_path: Path):
    view = make_view(str(tmp_path / "v"), tables, (1e-6, 1e-6), "concatenate")
    with pytest.raises(UsageError, match="at least one optimizer step"):
        SoftLabelDataset(view, stream())
