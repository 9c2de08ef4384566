"""Helpers for tests of the stream: a small table of random soft labels, a plain reading of it, and unpacked batches."""

from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabel.pipeline.stream.batch import Batch
from softlabel.storage.identity import (
    Identity,
    SelectionIdentity,
    SequencesIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from softlabel.storage.labels import SoftLabels
from softlabel.storage.reader import read
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.writer import ShardWriter
from tests.numberings import random_numbering

VOCABULARY = 97
TEMPERATURES = (1.0, 2.0)
LONGEST = 48


def random_labels(generator: np.random.Generator, positions: int) -> SoftLabels:
    """Random valid soft labels: heads in the order of their logits, some empty, and a few draws."""
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
    """Sequences whose first id is unique in the split (ids serve as names here, not as tokens)."""
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
            "fingerprint": f"{name}{i:014}".encode(),
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


def make_table(folder: Path, shards: int = 4) -> Table:
    """Up to three shards of 90 train sequences in row groups of 8, and one of 13 eval sequences."""
    (folder / "tokenizer").mkdir()
    generator = np.random.default_rng(2)
    table = Table.create(
        str(folder / "table"), identity(), pa.schema([]), random_numbering(VOCABULARY), folder / "tokenizer"
    )
    for name, count, split in [("a", 40, "train"), ("b", 27, "train"), ("c", 23, "train"), ("e", 13, "eval")][:shards]:
        with ShardWriter(table.newest(), row_group=8) as writer:
            sequences = random_sequences(generator, count, name, split)
            positions = sum(sequences.column("positions").to_pylist())
            writer.append(sequences, random_labels(generator, positions))
            writer.commit({})
    return table.newest()


def reference(table: Table, split: str = "train") -> list[dict]:
    """Expected content of the stream for each sequence, read row by row in plain Python."""
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
    """The sequences of a batch, split where position ids restart; rows of padding have no captured positions."""
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
