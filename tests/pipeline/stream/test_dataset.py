"""The stream against a plain reading of the same table, over topologies, restarts and workers."""

import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from softlabel.pipeline.config.train import LossConfig, StreamConfig
from softlabel.pipeline.loss.targets import TokenIds, decode_targets
from softlabel.pipeline.stream import dataset
from softlabel.pipeline.stream.batch import Sequences
from softlabel.pipeline.stream.dataset import SoftLabelDataset
from softlabel.pipeline.students.record import Cursor
from softlabel.storage import codec
from softlabel.storage.errors import IntegrityError, UsageError
from softlabel.storage.reader import read
from softlabel.storage.table import Table
from tests.pipeline.streams import LONGEST, TEMPERATURES, make_table, reference, unpacked

# A fork server: children forked from a process that has run a Prefect flow crash on exit because of its threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["softlabel.pipeline.stream.dataset"])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return make_table(tmp_path_factory.mktemp("stream"))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of a few row groups, so that this small table has several."""
    monkeypatch.setattr(dataset, "WINDOW_TOKENS", 400)


def names(rows: list[dict]) -> Counter:
    return Counter(row["next_logprobs"] for row in rows)


def stream(**fields: int) -> StreamConfig:
    return StreamConfig(**{"max_length": 64, "batch_size": 6, "micro_batch_size": 2, "seed": 5, **fields})


@pytest.mark.parametrize("packing", [True, False])
def test_each_captured_token_is_predicted_by_the_state_before_it(table, packing):
    """Each sequence equals a plain reading of the table, with the state before a token predicting it."""
    batches = list(SoftLabelDataset(table, stream(packing=packing)))
    found = [row for batch in batches for row in unpacked(batch)]
    by_name = {row["next_logprobs"]: row for row in found}
    expected = reference(table)
    assert len(found) == len(by_name) == len(expected) == 90
    for row in expected:
        assert by_name[row["next_logprobs"]] == row
    if not packing:
        assert all(batch.sequences == len(batch.input_ids) for batch in batches)
        assert all(batch.input_ids.shape[1] == max(len(row["ids"]) for row in unpacked(batch)) for batch in batches)


def test_decoded_targets_equal_the_tables_soft_labels(table):
    (batch,) = SoftLabelDataset(table, stream(batch_size=100, micro_batch_size=100), split="eval", shuffle=False)
    (shard,) = table.shards("eval")
    rows = read(table, shard)
    order_of = {tuple(values): i for i, values in enumerate(rows.column("next_logprobs").to_pylist())}
    labels = codec.decode(rows.take([order_of[row["next_logprobs"]] for row in unpacked(batch)]), table.numbering)
    targets = decode_targets(batch.targets, TokenIds(table.numbering), TEMPERATURES, LossConfig(target="bucket"))
    found = targets.logprobs.isfinite()
    assert targets.ids[found].tolist() == labels.head_ids.tolist()
    np.testing.assert_allclose(targets.logprobs[found], labels.head_logprobs, atol=1e-5)
    np.testing.assert_array_equal(batch.targets.tail_log_masses, labels.tail_log_masses)
    np.testing.assert_array_equal(batch.targets.tail_draws, labels.tail_draws)


@settings(max_examples=25)
@given(st.data())
def test_targets_stay_with_their_sequences_over_restarts_and_topologies(table, data):
    """Restarts with other world sizes and micro-batches give the same steps, over one and a half epochs."""
    packing = data.draw(st.booleans(), "packing")
    expected = {row["next_logprobs"]: row for row in reference(table)}
    cursor, epochs, seen = Cursor(), {0: Counter(), 1: Counter()}, []
    finished = False
    while not finished:
        world_size = data.draw(st.integers(1, 5), "world_size")
        micro_batch_size = data.draw(st.integers(1, 4), "micro_batch_size")
        kill = data.draw(st.integers(1, 20), "steps until killed")
        parts = [
            SoftLabelDataset(
                table,
                stream(micro_batch_size=micro_batch_size, packing=packing),
                rank=rank,
                world_size=world_size,
                start=cursor,
                epochs=1.5,
            )
            for rank in range(world_size)
        ]
        last = min(parts[0].total_steps, cursor.step + kill)
        streams = [iter(part) for part in parts]
        for step in range(cursor.step, last):
            batches = [next(batches) for _ in range(parts[0].accumulation) for batches in streams]
            rows = [row for batch in batches for row in unpacked(batch)]
            assert {batch.global_positions for batch in batches} == {sum(len(row["next"]) for row in rows)}
            assert all(len(batch.input_ids) <= micro_batch_size for batch in batches)
            assert all(row == expected[row["next_logprobs"]] for row in rows), "each sequence with its own soft labels"
            epochs[parts[0].state(step + 1).epoch] += names(rows)
            seen.append(names(rows))
        cursor = parts[0].state(last)
        finished = last == parts[0].total_steps
        if finished:
            assert all(next(batches, None) is None for batches in streams)
    assert epochs[0] == names(reference(table)), "each sequence once"
    assert set(epochs[1].values()) == {1}
    assert seen == whole(table, packing), "the same global batches as without any interruption"


def whole(table: Table, packing: bool = True) -> list[Counter]:
    """The global batches of an uninterrupted run on one rank."""
    steps = SoftLabelDataset(table, stream(micro_batch_size=6, packing=packing), epochs=1.5)
    assert steps.accumulation == 1
    return [names(unpacked(batch)) for batch in steps]


def test_a_resumed_run_does_not_read_finished_windows(table, monkeypatch):
    groups: list[int] = []
    monkeypatch.setattr(dataset, "Sequences", lambda parts: groups.extend(map(len, parts)) or Sequences(parts))
    plain = SoftLabelDataset(table, stream())
    end = SoftLabelDataset(table, stream(), start=plain.state(plain.total_steps - 1))
    assert sum(batch.sequences for batch in end) <= sum(groups) < 40 < sum(batch.sequences for batch in plain)


def test_a_run_can_be_resumed_with_another_batch_size(table):
    before = SoftLabelDataset(table, stream(batch_size=4, micro_batch_size=4))
    seen = sum((names(unpacked(batch)) for batch, _ in zip(before, range(3), strict=False)), Counter())
    after = SoftLabelDataset(table, stream(batch_size=6, micro_batch_size=6), start=before.state(3))
    seen += sum((names(unpacked(batch)) for batch in after), Counter())
    assert seen == names(reference(table))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_does_not_change_the_batches(table, workers):
    rows = SoftLabelDataset(table, stream(), rank=1, world_size=2, epochs=2)
    loaded = DataLoader(
        rows, batch_size=None, num_workers=workers, prefetch_factor=2, multiprocessing_context=PROCESSES
    )
    for found, expected in zip(loaded, rows, strict=True):
        assert found.input_ids.equal(expected.input_ids)
        assert found.positions.equal(expected.positions)
        assert found.targets.head_codes.equal(expected.targets.head_codes)


def test_batches_and_the_dataset_can_be_pickled_to_a_spawned_worker(table):
    rows = pickle.loads(pickle.dumps(SoftLabelDataset(table, stream())))
    batch = next(iter(rows))
    assert batch.to("cpu").input_ids.equal(batch.input_ids)
    assert batch.to("cpu").targets.positions == batch.targets.positions


def test_ranks_without_rows_get_padding_so_that_all_make_equally_many_passes(table):
    parts = [SoftLabelDataset(table, stream(batch_size=5, micro_batch_size=1), rank=r, world_size=3) for r in range(3)]
    batches = [list(part) for part in parts]
    assert len({len(part) for part in batches}) == 1
    empty = [batch for part in batches for batch in part if not batch.sequences]
    assert empty, "5 packs for 3 ranks leave one without"
    for batch in empty:
        assert batch.input_ids.shape == (1, 64)
        assert len(batch.positions) == batch.targets.positions == 0
        assert batch.global_positions > 0
        assert batch.targets.tail_log_masses.shape == (2, 0)
    padded = SoftLabelDataset(table, stream(micro_batch_size=1, packing=False), rank=6, world_size=7, max_steps=1)
    assert [batch.input_ids.shape for batch in padded] == [(1, 1)]


def test_the_order_within_a_global_batch_is_the_same_for_any_world_size(table):
    (alone,) = SoftLabelDataset(table, stream(batch_size=6, micro_batch_size=6), max_steps=1)
    parts = [
        list(SoftLabelDataset(table, stream(batch_size=6, micro_batch_size=1), rank=rank, world_size=2, max_steps=1))
        for rank in range(2)
    ]
    dealt = [part[micro].input_ids for micro in range(3) for part in parts]
    assert torch.cat(dealt).equal(alone.input_ids)


def test_each_epoch_and_each_seed_has_a_different_order(table):
    steps, epoch = whole(table), SoftLabelDataset(table, stream()).total_steps
    assert steps[: len(steps) - epoch] != steps[epoch:]
    assert [names(unpacked(batch)) for batch in SoftLabelDataset(table, stream(micro_batch_size=6, seed=6))] != steps[
        :epoch
    ]


def test_evaluation_reads_its_split_once_in_the_tables_order(table):
    held_out = SoftLabelDataset(table, stream(max_length=LONGEST), split="eval", shuffle=False)
    batches = list(held_out)
    assert len(batches) == held_out.total_steps * held_out.accumulation
    found = [row["next_logprobs"] for batch in batches for row in unpacked(batch)]
    expected = [row["next_logprobs"] for row in reference(table, "eval")]
    assert sorted(found) == sorted(expected)
    assert found[0] == expected[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_stays_within_each_sequence(table, tiny_teacher, attention):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_teacher, attn_implementation=attention, dtype=torch.float32).eval()
    batch = next(iter(SoftLabelDataset(table, stream(max_length=128))))
    assert batch.sequences > len(batch.input_ids), "something is packed"
    with torch.no_grad():
        hidden = model(**batch.inputs).last_hidden_state.flatten(0, 1)[batch.positions]
        alone = [
            model(input_ids=torch.tensor([row["ids"][: row["from"][-1] + 1]])).last_hidden_state[0, list(row["from"])]
            for row in unpacked(batch)
        ]
    torch.testing.assert_close(hidden, torch.cat(alone), atol=2e-5, rtol=1e-4)


def test_a_row_shorter_than_the_longest_sequence_is_refused(table):
    with pytest.raises(UsageError, match=rf"(?s)max_length: at least {LONGEST}.*max_length: 32.*set stream.max_length"):
        SoftLabelDataset(table, stream(max_length=32))


def test_an_empty_split_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="no train sequences"):
        SoftLabelDataset(make_table(tmp_path, shards=0), stream())


def test_a_damaged_shard_stops_the_stream(tmp_path: Path):
    damaged = make_table(tmp_path, shards=1)
    (shard,) = damaged.shards()
    path = Path(damaged.location, shard.path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"):
        list(SoftLabelDataset(damaged, stream()))
    path.write_bytes(content[:-100])
    with pytest.raises(IntegrityError, match="damaged"):
        SoftLabelDataset(damaged, stream())
