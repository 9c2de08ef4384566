"""Measures the size of a real teacher's soft labels in a table, by column, and how fast one core writes and reads them.

``python -m tests.benchmarks.table`` runs SmolLM2-135M (unpacked to .demo/teacher) over Python's own manual, and writes
real tables of k=64 and of the default selection, each also with its ids renumbered at random over the 151,669 ids of a
large vocabulary. The measured text comes after the text by which the table numbers its ids, as in all but small tables.
For comparison, it measures a naive layout, and calculates the size of DistillKit's formats from their layouts.
``--npz FILE`` saves the teacher's soft labels in a file, and loads them from there the next time. Speeds are per second
of CPU time in the best of several runs: a shard is encoded, written, hashed and committed, then hashed, read and
decoded.
"""

import argparse
import dataclasses
import io
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softlabel.storage import reader
from softlabel.storage.codec import decode
from softlabel.storage.identity import (
    Identity,
    SelectionIdentity,
    SequencesIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from softlabel.storage.labels import SoftLabels
from softlabel.storage.schema import SEQUENCE, SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import inspect
from softlabel.storage.writer import ShardWriter

LENGTH = 1024
"""Tokens of a sequence."""
LARGE = 151_669
"""Number of ids in a large vocabulary, that of Qwen3."""
GOALS = {"k=64": (126, 100_000, 300_000), "default": (60, 200_000, 600_000)}
"""Bytes per position, positions/s written, and positions/s read, for each selection."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """Soft labels of some sequences."""

    labels: SoftLabels
    positions: NDArray[np.int64]
    """Captured positions of each sequence."""
    vocabulary: int
    sample: SoftLabels | None = None
    """Soft labels of other sequences, by which a table numbers its ids; ``labels`` if None."""


def capture_demo(npz: Path | None, wanted: int) -> dict[str, Captured]:
    """Both selections of the same logits: SmolLM2 over sections of Python's manual."""
    if npz and npz.exists():
        held = np.load(npz)
        return {
            name: Captured(
                _held(held, f"{name}.labels"), held["positions"], int(held["vocabulary"]), _held(held, f"{name}.sample")
            )
            for name in GOALS
        }
    captured = _run_teacher(wanted)
    if npz:
        first = captured["k=64"]
        fields = {
            f"{name}.{part}.{key}": value
            for name, c in captured.items()
            for part in ("labels", "sample")
            for key, value in vars(getattr(c, part)).items()
        }
        np.savez(npz, positions=first.positions, vocabulary=first.vocabulary, **fields)
    return captured


def _held(arrays: Mapping[str, NDArray[Any]], prefix: str) -> SoftLabels:
    return SoftLabels(**{field.name: arrays[f"{prefix}.{field.name}"] for field in dataclasses.fields(SoftLabels)})


def _run_teacher(wanted: int) -> dict[str, Captured]:
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoTokenizer

    from softlabel.pipeline.config.capture import SelectionConfig, TeacherConfig
    from softlabel.pipeline.examples.language_model import prepare_teacher
    from softlabel.pipeline.selection.select import position_seeds, select
    from softlabel.pipeline.selection.selection import Selection
    from softlabel.pipeline.teachers.teacher import TransformersTeacher
    from softlabel.storage.clustering import SAMPLE

    folder = Path(".demo/teacher")
    prepare_teacher(folder)
    teacher = TransformersTeacher(TeacherConfig(model=str(folder)))
    selections = {"k=64": Selection.of(SelectionConfig(top_k=64)), "default": Selection.of(SelectionConfig())}
    text = "\n".join(text for _, text in sorted(topics.items()))
    ids = np.array(AutoTokenizer.from_pretrained(folder)(text)["input_ids"], np.int32)
    sampled, measured = (-(-count // (LENGTH - 1)) for count in (SAMPLE, wanted))
    sequences = ids[: LENGTH * (sampled + measured)].reshape(sampled + measured, LENGTH)
    parts: dict[str, list[SoftLabels]] = {name: [] for name in selections}
    for number, sequence in enumerate(sequences):
        print(f"\rteacher: sequence {number + 1} of {len(sequences)}", end="", file=sys.stderr)
        start = 1
        for logits in teacher.logits([sequence], [np.arange(1, LENGTH, dtype=np.int32)]):
            at = torch.arange(start, start + len(logits))
            start += len(logits)
            for name, selection in selections.items():
                seeds = position_seeds(selection, b"smollm2", b"%d" % number, at)
                next_ids = torch.from_numpy(sequence[at.numpy()])
                parts[name].append(select(logits, next_ids, seeds, selection, teacher.vocabulary))
    print(file=sys.stderr)
    positions = np.full(measured, LENGTH - 1)
    chunks = len(parts["k=64"]) // len(sequences)
    return {
        name: Captured(
            SoftLabels.concatenate(made[sampled * chunks :]),
            positions,
            teacher.vocabulary,
            SoftLabels.concatenate(made[: sampled * chunks]),
        )
        for name, made in parts.items()
    }


def renumbered(captured: Captured) -> Captured:
    """The same soft labels with ids that are drawn at random from a large vocabulary."""
    numbers = np.random.default_rng(0).permutation(LARGE).astype(np.int32)

    def changed(labels: SoftLabels) -> SoftLabels:
        return dataclasses.replace(labels, head_ids=numbers[labels.head_ids], tail_ids=numbers[labels.tail_ids])

    assert captured.sample is not None
    return Captured(changed(captured.labels), captured.positions, LARGE, changed(captured.sample))


def sequences_of(captured: Captured, copy: int) -> pa.Table:
    names = [f"{copy}-{i}" for i in range(len(captured.positions))]
    rows = [
        {
            "key": name.encode().rjust(16),
            "document_id": name,
            "chunk": 0,
            "chunks": 1,
            "fingerprint": name.encode().rjust(16),
            "label": None,
            "split": "train",
            "token_ids": [0] * (n + 1),
            "loss_mask": [False] + [True] * n,
            "tokens": n + 1,
            "positions": n,
        }
        for name, n in zip(names, captured.positions.tolist(), strict=True)
    ]
    return pa.Table.from_pylist(rows, SEQUENCE)


def make_table(folder: Path, captured: Captured) -> Table:
    """A softlabel table that numbers its ids by their frequency in the sample."""
    identity = Identity(
        teacher=TeacherIdentity(files={}, dtype="bfloat16"),
        tokenizer=TokenizerIdentity(files="", chat_template=None, chat_template_date=date(2026, 1, 1)),
        vocabulary=captured.vocabulary,
        padded_vocabulary=captured.vocabulary,
        selection=SelectionIdentity(top_p=1, min_k=0, max_k=64, draws=0, seed=0),
        temperatures=(1.0,),
        sequences=SequencesIdentity(max_tokens=1024, context=1, mask="all", eval_fraction=0),
    )
    (folder / "tokenizer").mkdir(parents=True)
    sample = captured.labels if captured.sample is None else captured.sample
    return Table.create(str(folder / "table"), identity, pa.schema([]), sample, folder / "tokenizer")


def naive_bytes(labels: SoftLabels) -> float:
    """Bytes per position of int32 ids and float32 log-probabilities as lists of lists with zstd, and nothing else."""
    counts = labels.head_counts + labels.tail_counts
    heads = np.repeat(np.arange(labels.positions), labels.head_counts)
    tails = np.repeat(np.arange(labels.positions), labels.tail_counts)
    order = np.argsort(np.concatenate([heads, tails]), kind="stable")
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    columns = {
        "ids": np.concatenate([labels.head_ids, labels.tail_ids])[order],
        "logprobs": np.concatenate([labels.head_logprobs, labels.tail_logprobs])[order],
    }
    sink = io.BytesIO()
    lists = {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}
    pq.write_table(pa.table(lists), sink, compression="zstd", use_dictionary=False)
    return len(sink.getvalue()) / labels.positions


def distillkit_bytes(k: int, vocabulary: int) -> dict[str, float]:
    """Bytes per position, calculated from DistillKit's layout; its code is not run here.

    Ids are packed to as many bits as the vocabulary needs (``DistributionQuantizationConfig.total_bits`` in
    distillkit/compression/config.py). The exact setting stores all k log-probabilities as bfloat16. The setting that
    its README recommends stores 16 of them, and 6 float32 terms of a polynomial for the rest.
    """
    ids = (k * (vocabulary - 1).bit_length() + 7) // 8
    return {"bf16 exact": ids + 2 * k, "polynomial": ids + 2 * 16 + 4 * 6}


def best(work: Callable[[int], object], positions: int, runs: int) -> float:
    """Positions per second of CPU time in the best run: what one core can do if it does nothing else."""
    seconds = []
    for run in range(runs):
        started = time.process_time()
        work(run)
        seconds.append(time.process_time() - started)
    return positions / min(seconds)


def measure(name: str, captured: Captured, runs: int) -> None:
    """Print the sizes and speeds of a selection."""
    P = captured.labels.positions
    sizes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, case in (("as they are", captured), ("random", renumbered(captured))):
            table = make_table(Path(scratch) / kind, case)
            with ShardWriter(table) as writer:
                writer.append(sequences_of(case, 0), case.labels)
                writer.commit({})
            sizes[kind] = inspect(table.newest())
        one_shard = Table.open(str(Path(scratch) / "as they are" / "table"))
        copies = [sequences_of(captured, copy) for copy in range(1, runs + 1)]

        def write(run: int) -> None:
            with ShardWriter(one_shard) as writer:
                writer.append(copies[run], captured.labels)
                writer.commit({})

        def load(run: int) -> None:
            reader._HASHES.clear()  # so that each run checks the shard's bytes, as every process does once
            for shard in one_shard.shards():
                decode(reader.read(one_shard, shard, SOFT_LABELS.names), one_shard.numbering)

        written, loaded = best(write, P, runs), best(load, P, runs)

    plain, random = sizes["as they are"], sizes["random"]
    goal_bytes, goal_write, goal_read = GOALS[name]
    print(f"\n{name}: {P:,} positions, {captured.labels.head_counts.mean():.1f} ids in the head, ", end="")
    print(f"{captured.labels.tail_counts.mean():.1f} in the tail")
    print(f"  {'bytes per position':<20}{'stored':>8}{'entropy':>9}{'ids at random':>15}")
    for column in SOFT_LABELS.names:
        a, b = plain.columns[column], random.columns[column]
        print(f"  {column:<20}{a.bytes_per_position:8.2f}{a.entropy_per_position:9.2f}{b.bytes_per_position:15.2f}")
    ours, worst = plain.soft_label_bytes_per_position, random.soft_label_bytes_per_position
    entropy = sum(plain.columns[column].entropy_per_position or 0 for column in SOFT_LABELS.names)
    print(
        f"  {'together':<20}{ours:8.2f}{entropy:9.2f}{worst:15.2f}   goals {goal_bytes}, +10%: {worst / ours - 1:+.1%}"
    )
    print(f"  {'naive layout':<20}{naive_bytes(captured.labels):8.2f}   int32 ids + float32, zstd; only ids and values")
    if name == "k=64":
        sizes_here, sizes_large = (distillkit_bytes(64, V) for V in (captured.vocabulary, LARGE))
        for setting, size in sizes_here.items():
            print(f"  {'DistillKit':<20}{size:8.2f}{sizes_large[setting]:24.2f}   {setting}, calculated")
    print(f"  encode and write  {written:10,.0f} positions/s   goal {goal_write:,}")
    print(f"  read and decode   {loaded:10,.0f} positions/s   goal {goal_read:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--npz", type=Path, help="file to save the teacher's soft labels in, or to load them from if it exists"
    )
    parser.add_argument("--positions", type=int, default=16_384)
    parser.add_argument("--runs", type=int, default=7)
    settings = parser.parse_args()
    pa.set_cpu_count(1)
    for name, captured in capture_demo(settings.npz, settings.positions).items():
        measure(name, captured, settings.runs)


if __name__ == "__main__":
    main()
