"""The stream against a plain reading of the same table, over topologies, restarts and workers."""

import pickle
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pipeline import dataset
from pipeline.batch import Batch, RowGroup
from pipeline.config import LossConfig, StreamConfig
from pipeline.dataset import SoftLabelDataset
from pipeline.order import Cursor
from pipeline.targets import decode
from storage import codec
from storage.codec import SoftLabels
from storage.errors import UsageError
from storage.provenance import Identity, SelectionIdentity, SequencesIdentity, TeacherIdentity, TokenizerIdentity
from storage.reader import read
from storage.schema import SEQUENCE
from storage.table import Table
from storage.writer import ShardWriter

VOCABULARY = 97
TEMPERATURES = (1.0, 2.0)
LONGEST = 48


def random_labels(generator: np.random.Generator, positions: int) -> SoftLabels:
    """Any soft labels that could be: a head in the order of its logits, sometimes nothing, and a few draws."""
    head_counts = generator.integers(0, 6, positions, dtype=np.int32)
    tail_counts = generator.integers(0, 4, positions, dtype=np.int32)
    ids = [generator.permutation(VOCABULARY)[: h + t] for h, t in zip(head_counts, tail_counts, strict=True)]
    logits = [-np.sort(generator.exponential(2, h + t)) - 2 for h, t in zip(head_counts, tail_counts, strict=True)]

    def flat(parts: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0), *parts]).astype(dtype)

    heads = list(enumerate(head_counts))
    masses = np.where(head_counts > 0, -generator.exponential(1, (2, positions)), 0).astype(np.float32)
    return SoftLabels(
        head_counts=head_counts,
        head_ids=flat([ids[i][:h] for i, h in heads], np.int32),
        head_logprobs=flat([logits[i][:h] for i, h in heads], np.float32),
        tail_counts=tail_counts,
        tail_ids=flat([ids[i][h:] for i, h in heads], np.int32),
        tail_draws=generator.integers(1, 9, tail_counts.sum(), dtype=np.int32),
        tail_logprobs=flat([logits[i][h:] for i, h in heads], np.float32),
        tail_log_masses=masses,
        entropies=generator.exponential(1, positions).astype(np.float32),
        next_logprobs=-generator.exponential(1, positions).astype(np.float32),
    )


def random_sequences(generator: np.random.Generator, count: int, name: str, split: str) -> pa.Table:
    """Sequences whose first id is unique in the split (ids are taken for names here, not for tokens)."""
    lengths = generator.integers(2, LONGEST + 1, count)
    masks = [np.append(False, generator.random(n - 1) < 0.7) for n in lengths]
    for mask in masks:
        mask[-1] = True
    rows = [
        {
            "key": f"{name}{i:014}".encode(),
            "document_id": f"{name}{i}",
            "chunk": 0,
            "chunks": 1,
            "fingerprint": b"0" * 16,
            "label": None,
            "split": split,
            "token_ids": generator.integers(0, VOCABULARY, n).tolist(),
            "loss_mask": mask.tolist(),
            "tokens": int(n),
            "positions": int(mask.sum()),
        }
        for i, (n, mask) in enumerate(zip(lengths, masks, strict=True))
    ]
    return pa.Table.from_pylist(rows, SEQUENCE)


def identity() -> Identity:
    return Identity(
        teacher=TeacherIdentity(files={"model.safetensors": "0"}, dtype="float32"),
        tokenizer=TokenizerIdentity(files="0", chat_template=None, chat_template_date=date(2026, 1, 1)),
        vocabulary=VOCABULARY,
        padded_vocabulary=VOCABULARY,
        selection=SelectionIdentity(top_p=0.95, min_k=0, max_k=5, draws=24, seed=0),
        temperatures=TEMPERATURES,
        sequences=SequencesIdentity(max_tokens=LONGEST, context=1, mask="all", eval_fraction=0.1),
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Three shards of 90 train sequences in row groups of 8, and 13 eval sequences."""
    folder = tmp_path_factory.mktemp("stream")
    (folder / "tokenizer").mkdir()
    generator = np.random.default_rng(0)
    sample = random_labels(generator, 500)
    table = Table.create(str(folder / "table"), identity(), pa.schema([]), sample, folder / "tokenizer")
    for name, count, split in [("a", 40, "train"), ("b", 27, "train"), ("c", 23, "train"), ("e", 13, "eval")]:
        with ShardWriter(table.newest(), row_group=8) as writer:
            sequences = random_sequences(generator, count, name, split)
            positions = sum(sequences.column("positions").to_pylist())
            writer.append(sequences, random_labels(generator, positions))
            writer.commit({})
    return table.newest()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of a few row groups, so that this small table has several."""
    monkeypatch.setattr(dataset, "WINDOW_TOKENS", 400)


Sequence = tuple[tuple[int, ...], tuple[float, ...]]


def reference(table: Table, split: str = "train") -> list[dict]:
    """All that the stream must give of each sequence, row by row in plain Python."""
    rows = []
    for shard in table.shards(split):
        for row in read(table, shard).to_pylist():
            captured = [i for i, taken in enumerate(row["loss_mask"]) if taken]
            rows.append(
                {
                    "ids": tuple(row["token_ids"]),
                    "from": tuple(i - 1 for i in captured),
                    "next": tuple(row["token_ids"][i] for i in captured),
                    "next_logprobs": tuple(row["next_logprobs"]),
                    "head_counts": tuple(row["head_counts"]),
                }
            )
    return rows


def unpacked(batch: Batch) -> list[dict]:
    """The sequences of a batch, cut out where position ids begin anew; rows of padding have no captured positions."""
    length = batch.input_ids.shape[1]
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    starts = (positions == 0).nonzero().flatten().tolist()
    found = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        assert start // length == (end - 1) // length
        assert positions[start:end].tolist() == list(range(end - start))
        here = (batch.positions >= start) & (batch.positions < end)
        if here.any():
            found.append(
                {
                    "ids": tuple(ids[start:end].tolist()),
                    "from": tuple((batch.positions[here] - start).tolist()),
                    "next": tuple(batch.next_ids[here].tolist()),
                    "next_logprobs": tuple(batch.targets.next_logprobs[here].tolist()),
                    "head_counts": tuple(batch.targets.head_counts[here].tolist()),
                }
            )
    assert len(found) == batch.sequences
    return found


def names(rows: list[dict]) -> Counter:
    return Counter(row["next_logprobs"] for row in rows)


def stream(**fields: int) -> StreamConfig:
    return StreamConfig(**{"row_tokens": 64, "batch_rows": 4, "micro_rows": 2, "seed": 5, **fields})


def test_each_sequence_comes_as_a_plain_reading_gives_it(table):
    found = [row for batch in SoftLabelDataset(table, stream()) for row in unpacked(batch)]
    by_name = {row["next_logprobs"]: row for row in found}
    expected = reference(table)
    assert len(found) == len(by_name) == len(expected) == 90
    for row in expected:
        assert by_name[row["next_logprobs"]] == row


def test_targets_decode_to_what_the_table_holds(table):
    (batch,) = SoftLabelDataset(table, stream(batch_rows=100, micro_rows=100), split="eval", shuffle=False)
    (shard,) = table.shards("eval")
    rows = read(table, shard)
    order_of = {tuple(values): i for i, values in enumerate(rows.column("next_logprobs").to_pylist())}
    labels = codec.decode(rows.take([order_of[row["next_logprobs"]] for row in unpacked(batch)]), table.vocabulary)
    targets = decode(batch.targets, torch.tensor(table.vocabulary), TEMPERATURES, LossConfig(target="bucket"))
    found = targets.logprobs.isfinite()
    assert targets.ids[found].tolist() == labels.head_ids.tolist()
    np.testing.assert_allclose(targets.logprobs[found], labels.head_logprobs, atol=1e-5)
    np.testing.assert_array_equal(batch.targets.tail_log_masses, labels.tail_log_masses)
    np.testing.assert_array_equal(batch.targets.tail_draws, labels.tail_draws)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_topology_and_restart_gives_the_same_steps(table, data):
    """Kill points and new world sizes, micro-batches and batch sizes, until an epoch and a half is through."""
    cursor, epochs, seen = Cursor(), {0: Counter(), 1: Counter()}, []
    finished = False
    while not finished:
        world_size = data.draw(st.integers(1, 5), "world_size")
        micro_rows = data.draw(st.integers(1, 4), "micro_rows")
        kill = data.draw(st.integers(1, 20), "steps until killed")
        parts = [
            SoftLabelDataset(
                table, stream(micro_rows=micro_rows), rank=rank, world_size=world_size, start=cursor, epochs=1.5
            )
            for rank in range(world_size)
        ]
        last = min(parts[0].total_steps, cursor.step + kill)
        streams = [iter(part) for part in parts]
        for step in range(cursor.step, last):
            batches = [next(batches) for _ in range(parts[0].accumulation) for batches in streams]
            rows = [row for batch in batches for row in unpacked(batch)]
            assert {batch.global_positions for batch in batches} == {sum(len(row["next"]) for row in rows)}
            assert all(len(batch.input_ids) <= micro_rows for batch in batches)
            epochs[parts[0].state(step + 1).epoch] += names(rows)
            seen.append(names(rows))
        cursor = parts[0].state(last)
        finished = last == parts[0].total_steps
        if finished:
            assert all(next(batches, None) is None for batches in streams)
    assert epochs[0] == names(reference(table)), "each sequence once"
    assert set(epochs[1].values()) == {1}
    assert seen == whole(table), "the same global batches as without any interruption"


def whole(table: Table) -> list[Counter]:
    """The global batches of a run on one rank, in one piece."""
    steps = SoftLabelDataset(table, stream(micro_rows=4), epochs=1.5)
    assert steps.accumulation == 1
    return [names(unpacked(batch)) for batch in steps]


def test_a_resumed_run_reads_no_window_that_is_done_with(table, monkeypatch):
    groups: list[int] = []
    monkeypatch.setattr(dataset, "RowGroup", lambda rows: groups.append(len(rows)) or RowGroup(rows))
    plain = SoftLabelDataset(table, stream())
    end = SoftLabelDataset(table, stream(), start=plain.state(plain.total_steps - 1))
    assert sum(batch.sequences for batch in end) <= sum(groups) < 40 < sum(batch.sequences for batch in plain)


def test_another_batch_size_goes_on_where_the_last_one_was(table):
    before = SoftLabelDataset(table, stream(batch_rows=4, micro_rows=4))
    seen = sum((names(unpacked(batch)) for batch, _ in zip(before, range(3), strict=False)), Counter())
    after = SoftLabelDataset(table, stream(batch_rows=6, micro_rows=6), start=before.state(3))
    seen += sum((names(unpacked(batch)) for batch in after), Counter())
    assert seen == names(reference(table))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(table, workers):
    rows = SoftLabelDataset(table, stream(), rank=1, world_size=2, epochs=2)
    loaded = DataLoader(rows, batch_size=None, num_workers=workers, prefetch_factor=2)
    for found, expected in zip(loaded, rows, strict=True):
        assert found.input_ids.equal(expected.input_ids)
        assert found.positions.equal(expected.positions)
        assert found.targets.head_codes.equal(expected.targets.head_codes)


def test_batches_and_the_stream_travel_to_a_spawned_worker(table):
    rows = pickle.loads(pickle.dumps(SoftLabelDataset(table, stream())))
    batch = next(iter(rows))
    assert batch.to("cpu").input_ids.equal(batch.input_ids)
    assert batch.to("cpu").targets.positions == batch.targets.positions


def test_ranks_without_rows_get_padding_so_that_all_make_equally_many_passes(table):
    parts = [SoftLabelDataset(table, stream(batch_rows=5, micro_rows=1), rank=r, world_size=3) for r in range(3)]
    batches = [list(part) for part in parts]
    assert len({len(part) for part in batches}) == 1
    empty = [batch for part in batches for batch in part if not batch.sequences]
    assert empty, "5 packs for 3 ranks leave one without"
    for batch in empty:
        assert batch.input_ids.shape == (1, 64)
        assert len(batch.positions) == batch.targets.positions == 0
        assert batch.global_positions > 0
        assert batch.targets.tail_log_masses.shape == (2, 0)


def test_the_order_within_a_global_batch_is_the_same_for_any_world_size(table):
    (alone,) = SoftLabelDataset(table, stream(batch_rows=6, micro_rows=6), max_steps=1)
    parts = [
        list(SoftLabelDataset(table, stream(batch_rows=6, micro_rows=1), rank=rank, world_size=2, max_steps=1))
        for rank in range(2)
    ]
    dealt = [part[micro].input_ids for micro in range(3) for part in parts]
    assert torch.cat(dealt).equal(alone.input_ids)


def test_epochs_and_seeds_have_an_order_of_their_own(table):
    steps, epoch = whole(table), SoftLabelDataset(table, stream()).total_steps
    assert steps[: len(steps) - epoch] != steps[epoch:]
    assert [names(unpacked(batch)) for batch in SoftLabelDataset(table, stream(micro_rows=4, seed=6))] != steps[:epoch]


def test_evaluation_reads_its_split_once_in_the_table_s_order(table):
    held_out = SoftLabelDataset(table, stream(row_tokens=LONGEST), split="eval", shuffle=False)
    batches = list(held_out)
    assert len(batches) == held_out.total_steps * held_out.accumulation
    found = [row["next_logprobs"] for batch in batches for row in unpacked(batch)]
    expected = [row["next_logprobs"] for row in reference(table, "eval")]
    assert sorted(found) == sorted(expected)
    assert found[0] == expected[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_stays_inside_each_sequence(table, tiny_teacher, attention):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_teacher, attn_implementation=attention, dtype=torch.float32).eval()
    batch = next(iter(SoftLabelDataset(table, stream(row_tokens=128))))
    assert batch.sequences > len(batch.input_ids), "something is packed"
    with torch.no_grad():
        hidden = model(**batch.inputs).last_hidden_state.flatten(0, 1)[batch.positions]
        alone = [
            model(input_ids=torch.tensor([row["ids"][: row["from"][-1] + 1]])).last_hidden_state[0, list(row["from"])]
            for row in unpacked(batch)
        ]
    torch.testing.assert_close(hidden, torch.cat(alone), atol=2e-5, rtol=1e-4)


def test_a_row_shorter_than_the_longest_sequence_is_refused(table):
    with pytest.raises(UsageError, match=rf"(?s)row_tokens: at least {LONGEST}.*row_tokens: 32.*set stream.row_tokens"):
        SoftLabelDataset(table, stream(row_tokens=32))


def test_an_empty_split_is_refused(tmp_path: Path):
    (tmp_path / "tokenizer").mkdir()
    sample = random_labels(np.random.default_rng(0), 9)
    table = Table.create(str(tmp_path / "table"), identity(), pa.schema([]), sample, tmp_path / "tokenizer")
    with pytest.raises(UsageError, match="no train sequences"):
        SoftLabelDataset(table, stream())
