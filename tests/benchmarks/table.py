"""Measures the size of a real teacher's soft labels in a table, by column, and how fast one core writes and reads them.

``python -m tests.benchmarks.table`` runs SmolLM2-135M (unpacked to .demo/teacher) over Python's own manual, over prose
and over chats (``tests.texts``). It writes real tables of k=64 and of the default selection, each also with
its ids spread at random over the 151,669 ids of a large vocabulary, and prints their columns beside those of format 1.
The measured documents come after those from which the table numbers its ids, as in all but small tables. For
comparison, it measures a naive layout, and calculates the size of DistillKit's formats from their layouts.
``--keep FOLDER`` saves the teacher's soft labels in a folder, and loads them from there the next time. Speeds are per
second of CPU time in the best of several runs: a shard is encoded, written, hashed and committed, then hashed, read and
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
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softlabel.storage import reader
from softlabel.storage.clustering import SAMPLE
from softlabel.storage.codec import decode
from softlabel.storage.identity import (
    Identity,
    SelectionIdentity,
    SequencesIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from softlabel.storage.labels import SoftLabels
from softlabel.storage.places.place import SIDE_FOLDER
from softlabel.storage.schema import FORMAT, SEQUENCE, SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import inspect
from softlabel.storage.writer import ShardWriter
from tests import format_1_sizes as format_1
from tests.texts import CORPORA

LENGTH = 1024
"""Tokens of a sequence."""
LARGE = 151_669
"""Number of ids in a large vocabulary, that of Qwen3."""
GROWN = 10_000_000
"""Positions of a table that has grown."""
SELECTIONS = ("k=64", "default")
GOALS = {("manual", "k=64"): 105, ("manual", "default"): 38, ("prose", "k=64"): 106, ("prose", "default"): 50}
"""Bytes per position of all soft-label columns."""
SPEEDS = {"k=64": (100_000, 300_000), "default": (200_000, 600_000)}
"""Goals for positions/s written, and positions/s read, for each selection."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """Soft labels of some sequences."""

    labels: SoftLabels
    positions: NDArray[np.int64]
    """Captured positions of each sequence."""
    vocabulary: int
    sample: SoftLabels | None = None
    """Soft labels of other documents, by which a table numbers its ids; ``labels`` if None."""


def capture(corpus: str, wanted: int, kept: Path | None) -> dict[str, Captured]:
    """Both selections of the same logits: SmolLM2 over a corpus."""
    if kept and kept.exists():
        held = np.load(kept)
        positions, vocabulary = held["positions"], int(held["vocabulary"])
        return {
            name: Captured(_held(held, f"{name}.labels"), positions, vocabulary, _held(held, f"{name}.sample"))
            for name in SELECTIONS
        }
    captured = _run_teacher(corpus, wanted)
    if kept:
        first = captured[SELECTIONS[0]]
        fields = {
            f"{name}.{part}.{key}": value
            for name, c in captured.items()
            for part in ("labels", "sample")
            for key, value in vars(getattr(c, part)).items()
        }
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, positions=first.positions, vocabulary=first.vocabulary, **fields)
    return captured


def _held(arrays: Mapping[str, NDArray[Any]], prefix: str) -> SoftLabels:
    return SoftLabels(**{field.name: arrays[f"{prefix}.{field.name}"] for field in dataclasses.fields(SoftLabels)})


def _run_teacher(corpus: str, wanted: int) -> dict[str, Captured]:
    import torch

    from softlabel.pipeline.config.capture import SelectionConfig, TeacherConfig
    from softlabel.pipeline.examples.language_model import prepare_teacher
    from softlabel.pipeline.selection.select import select
    from softlabel.pipeline.selection.selection import Selection
    from softlabel.pipeline.teachers.kind import LanguageModel
    from softlabel.pipeline.teachers.queries import Queries
    from softlabel.pipeline.teachers.teacher import TransformersTeacher

    folder = Path(".demo/teacher")
    prepare_teacher(folder)
    teacher = TransformersTeacher(TeacherConfig(model=str(folder)))
    settings = {"k=64": SelectionConfig(top_k=64), "default": SelectionConfig()}
    selections = {name: Selection.of(settings[name]) for name in SELECTIONS}
    sample, measured = _sequences(corpus, teacher.checkpoint, SAMPLE, wanted)
    queries, identity = Queries(pa.concat_tables([sample, measured]), LanguageModel()), teacher_identity()
    parts: dict[str, list[SoftLabels]] = {name: [] for name in selections}
    for number, (tokens, at) in enumerate(zip(queries.tokens, queries.positions, strict=True)):
        print(f"\r{corpus}: sequence {number + 1} of {len(queries.tokens)}", end="", file=sys.stderr)
        batch, logits = np.array([number]), torch.cat(list(teacher.logits([tokens], [at])))
        for name, selection in selections.items():
            next_ids, seeds = queries.next_ids(batch), queries.seeds(batch, selection, identity)
            parts[name].append(select(logits, next_ids, seeds, selection, teacher.vocabulary))
    print(file=sys.stderr)
    positions, first = measured.column("positions").to_numpy().astype(np.int64), len(sample)
    return {
        name: Captured(
            SoftLabels.concatenate(made[first:]), positions, teacher.vocabulary, SoftLabels.concatenate(made[:first])
        )
        for name, made in parts.items()
    }


def _sequences(corpus: str, checkpoint: Any, sampled: int, wanted: int) -> tuple[pa.Table, pa.Table]:
    """Sequences of a corpus's first documents, and of the documents after them, with so many positions each."""
    from softlabel.pipeline.config.capture import SequencesConfig
    from softlabel.pipeline.documents.documents import DOCUMENT
    from softlabel.pipeline.sequences.chunking import ChunkedDocuments

    content, documents = CORPORA[corpus]
    chunked = ChunkedDocuments(checkpoint, SequencesConfig(max_tokens=LENGTH), content)
    left = [sampled, wanted]
    tables: list[list[pa.Table]] = [[], []]
    for name, text in documents():
        part = 0 if left[0] > 0 else 1
        document = {"document_id": name, "content": text, "label": None, "fingerprint": bytes(16)}
        rows, _ = chunked.sequences(pa.Table.from_pylist([document], DOCUMENT), 0.0)
        tables[part].append(rows)
        left[part] -= sum(rows.column("positions").to_pylist())
        if left[1] <= 0:
            break
    assert tables[1], "the corpus has more documents than the sample"
    first, rest = (pa.concat_tables(made) for made in tables)
    return first, rest


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


def teacher_identity() -> TeacherIdentity:
    return TeacherIdentity(files={}, dtype="bfloat16")


def make_table(folder: Path, captured: Captured) -> Table:
    """A softlabel table that numbers its ids by their frequency in the sample."""
    identity = Identity(
        teacher=teacher_identity(),
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


class Sizes(NamedTuple):
    """Bytes of soft labels in one format."""

    columns: dict[str, float]
    """Bytes per position of each column."""
    vocabulary: int
    """Bytes of the vocabulary file."""

    @property
    def together(self) -> float:
        """Bytes per position of all columns."""
        return sum(self.columns.values())

    def share(self, positions: int) -> float:
        """The vocabulary file's share of the bytes of a table with so many positions."""
        return self.vocabulary / (self.vocabulary + positions * self.together)


def sizes_before(captured: Captured) -> Sizes:
    """The sizes in format 1."""
    ranking = format_1.ranked(captured.sample or captured.labels, captured.vocabulary)
    columns = format_1.column_bytes(captured.labels, captured.positions, ranking)
    positions = captured.labels.positions
    return Sizes({name: size / positions for name, size in columns.items()}, format_1.vocabulary_bytes(ranking))


def sizes_of(table: Table) -> Sizes:
    """The sizes in a table."""
    columns = inspect(table).columns
    vocabulary = table.place.read(f"{SIDE_FOLDER}/{table.vocabulary_name}")
    return Sizes({name: columns[name].bytes_per_position for name in SOFT_LABELS.names}, len(vocabulary))


def write(folder: Path, captured: Captured) -> Table:
    """A table with one shard of these soft labels."""
    table = make_table(folder, captured)
    with ShardWriter(table) as writer:
        writer.append(sequences_of(captured, 0), captured.labels)
        writer.commit({})
    return table.newest()


def measure_sizes(corpus: str, name: str, captured: Captured) -> None:
    """Print the sizes of a selection in both formats, with the teacher's ids and with those of a large vocabulary."""
    labels, P = captured.labels, captured.labels.positions
    sizes: list[Sizes] = []
    for case in (captured, renumbered(captured)):
        with tempfile.TemporaryDirectory() as scratch:
            sizes += [sizes_before(case), sizes_of(write(Path(scratch), case))]
    print(f"\n{corpus}, {name}: {P:,} positions, {labels.head_counts.mean():.1f} ids in the head, ", end="")
    print(f"{labels.tail_counts.mean():.1f} in the tail")
    print(f"  {'bytes per position':<20}{f'{captured.vocabulary:,} ids':>20}{f'spread over {LARGE:,}':>24}")
    print(f"  {'':<20}{''.join(f'{it:>{width}}' for width in (10, 14) for it in ('format 1', f'format {FORMAT}'))}")

    def line(what: str, figures: list[str], note: str = "") -> None:
        first, second, third, fourth = figures
        print(f"  {what:<20}{first:>10}{second:>10}{third:>14}{fourth:>10}   {note}".rstrip())

    for column in dict.fromkeys([*sizes[0].columns, *SOFT_LABELS.names]):
        line(column, [f"{size.columns[column]:.2f}" if column in size.columns else "" for size in sizes])
    goal = GOALS.get((corpus, name))
    line("together", [f"{size.together:.2f}" for size in sizes], f"goal {goal}" if goal else "")
    line("vocabulary file, kB", [f"{size.vocabulary / 1000:.0f}" for size in sizes])
    line("its share", [f"{size.share(P):.1%}" for size in sizes], f"of a table of {P:,} positions")
    line("", [f"{size.share(GROWN):.2%}" for size in sizes], f"of {GROWN:,}")
    print(f"  {'naive layout':<20}{naive_bytes(labels):>20.2f}   int32 ids + float32, zstd; only ids and values")
    if name == "k=64":
        sizes_here, sizes_large = (distillkit_bytes(64, V) for V in (captured.vocabulary, LARGE))
        for setting, size in sizes_here.items():
            print(f"  {'DistillKit':<20}{size:>20.2f}{sizes_large[setting]:>24.2f}   {setting}, calculated")


def measure_speeds(name: str, captured: Captured, runs: int) -> None:
    """Print how fast a selection is written and read."""
    P = captured.labels.positions
    with tempfile.TemporaryDirectory() as scratch:
        one_shard = write(Path(scratch), captured)
        copies = [sequences_of(captured, copy) for copy in range(1, runs + 1)]

        def add(run: int) -> None:
            with ShardWriter(one_shard) as writer:
                writer.append(copies[run], captured.labels)
                writer.commit({})

        def load(run: int) -> None:
            reader._HASHES.clear()  # so that each run checks the shard's bytes, as every process does once
            for shard in one_shard.shards():
                decode(reader.read(one_shard, shard, SOFT_LABELS.names), one_shard.numbering)

        written, loaded = best(add, P, runs), best(load, P, runs)
    goal_write, goal_read = SPEEDS[name]
    print(f"  encode and write  {written:10,.0f} positions/s   goal {goal_write:,}")
    print(f"  read and decode   {loaded:10,.0f} positions/s   goal {goal_read:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA))
    parser.add_argument(
        "--keep", type=Path, help="folder to save the teacher's soft labels in, or to load them from if they are there"
    )
    parser.add_argument("--positions", type=int, default=32_768)
    parser.add_argument("--runs", type=int, default=7)
    settings = parser.parse_args()
    pa.set_cpu_count(1)
    for corpus in settings.corpora:
        kept = settings.keep and settings.keep / f"{corpus}.npz"
        for name, captured in capture(corpus, settings.positions, kept).items():
            measure_sizes(corpus, name, captured)
            if corpus == settings.corpora[0]:
                measure_speeds(name, captured, settings.runs)


if __name__ == "__main__":
    main()
