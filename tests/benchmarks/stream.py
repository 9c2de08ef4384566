"""Measures how many captured positions per second one core prepares for training, compared with simple alternatives.

``python -m tests.benchmarks.stream`` prints one table, and checks the limits. The soft labels are random, with the
counts of the default selection on a real teacher (13 head ids and 9 tail ids a position) and ids as frequent as words.
The alternatives read what most projects store: lists of lists of int32 ids and float32 log-probabilities, with the same
number of ids at each position, so that they form rectangular tensors. Their soft labels are then decoded; ours are
decoded on the training device. All start from compressed Parquet on a disk. Every round runs all of them. Rates are per
second of CPU time over all threads, so that a busy machine does not change them. Each sequence has a fixed cost, which
weighs more on the positions of a short one, so both lengths are shown. Hugging Face's ``datasets`` comes with the
``bench`` extra.
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from softlabel.pipeline.config.train import StreamConfig
from softlabel.pipeline.stream.batch import COLUMNS
from softlabel.pipeline.stream.dataset import SoftLabelDataset
from softlabel.storage.identity import (
    Identity,
    SelectionIdentity,
    SequencesIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from softlabel.storage.labels import SoftLabels
from softlabel.storage.reader import batches
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.writer import ShardWriter
from tests.figures import verdict

OURS, OURS_SHORT, HUGGING_FACE = "softlabel", "softlabel, short sequences", "Hugging Face datasets, torch"
VOCABULARY = 49_152
TOKENS, SHORT = 1024, 16
IDS = 22
ROWS_A_BATCH = 8


def random_labels(generator: np.random.Generator, positions: int) -> SoftLabels:
    """Soft labels with the sizes of the default selection: most heads are full, most tails short."""
    head_counts = np.where(generator.random(positions) < 0.6, 16, generator.integers(1, 16, positions))
    tail_counts = np.where(generator.random(positions) < 0.9, generator.integers(1, 20, positions), 0)
    counts = head_counts + tail_counts
    starts = np.cumsum(counts) - counts
    gaps = generator.exponential(0.3, counts.sum())
    running = np.cumsum(gaps)
    logprobs = -(running - np.repeat(running[starts] - gaps[starts], counts)) - 0.5
    ids = np.minimum(generator.zipf(1.2, counts.sum()), VOCABULARY) - 1
    in_head = np.arange(counts.sum()) - np.repeat(starts, counts) < np.repeat(head_counts, counts)
    return SoftLabels(
        head_counts=head_counts.astype(np.int32),
        head_ids=ids[in_head].astype(np.int32),
        head_logprobs=logprobs[in_head].astype(np.float32),
        tail_counts=tail_counts.astype(np.int32),
        tail_ids=ids[~in_head].astype(np.int32),
        tail_draws=generator.integers(1, 4, (~in_head).sum(), dtype=np.int32),
        tail_logprobs=logprobs[~in_head].astype(np.float32),
        tail_log_masses=-generator.exponential(3, (1, positions)).astype(np.float32),
        entropies=generator.exponential(2, positions).astype(np.float32),
        next_logprobs=-generator.exponential(2, positions).astype(np.float32),
    )


def make_table(folder: Path, sequences: int, tokens: int = TOKENS) -> Table:
    """A softlabel table in row groups of 256 sequences; most have ``tokens`` tokens, the rest at least half as many."""
    generator = np.random.default_rng(0)
    (folder / "tokenizer").mkdir()
    identity = Identity(
        teacher=TeacherIdentity(files={}, dtype="bfloat16"),
        tokenizer=TokenizerIdentity(files="", chat_template=None, chat_template_date=date(2026, 1, 1)),
        vocabulary=VOCABULARY,
        padded_vocabulary=VOCABULARY,
        selection=SelectionIdentity(top_p=0.95, min_k=1, max_k=16, draws=48, seed=0),
        temperatures=(1.0,),
        sequences=SequencesIdentity(max_tokens=tokens, context=1, mask="all", eval_fraction=0.0),
    )
    sample = random_labels(generator, 20_000)
    table = Table.create(str(folder / "table"), identity, pa.schema([]), sample, folder / "tokenizer")
    with ShardWriter(table) as writer:
        for first in range(0, sequences, 256):
            rows = [_row(number, tokens, generator) for number in range(first, min(first + 256, sequences))]
            writer.append(
                pa.Table.from_pylist(rows, SEQUENCE), random_labels(generator, sum(row["positions"] for row in rows))
            )
        writer.commit({})
    return table.newest()


def _row(number: int, tokens: int, generator: np.random.Generator) -> dict[str, Any]:
    length = int(tokens if generator.random() < 0.6 else generator.integers(tokens // 2, tokens))
    return {
        "key": number.to_bytes(16, "little"),
        "document_id": str(number),
        "chunk": 0,
        "chunks": 1,
        "fingerprint": b"",
        "label": None,
        "split": "train",
        "token_ids": np.minimum(generator.zipf(1.2, length), VOCABULARY) - 1,
        "loss_mask": np.arange(length) > 0,
        "tokens": length,
        "positions": length - 1,
    }


def make_naive(path: Path, sequences: int) -> None:
    """Write what most projects store: a list of lists of ids, and one of log-probabilities, for each sequence."""
    generator = np.random.default_rng(0)
    ids = np.minimum(generator.zipf(1.2, (sequences, TOKENS, IDS)), VOCABULARY).astype(np.int32)
    logprobs = -np.cumsum(generator.exponential(0.3, ids.shape), 2, dtype=np.float32)

    def nested(values: np.ndarray) -> pa.ListArray:
        inner = pa.ListArray.from_arrays(np.arange(0, values.size + 1, IDS, dtype=np.int32), values.ravel())
        return pa.ListArray.from_arrays(np.arange(0, sequences * TOKENS + 1, TOKENS, dtype=np.int32), inner)

    tokens = pa.array(ids[:, :, 0].tolist(), pa.list_(pa.int32()))
    table = pa.table({"input_ids": tokens, "ids": nested(ids), "logprobs": nested(logprobs)})
    pq.write_table(table, path, compression="zstd", row_group_size=64)


def ours(table: Table) -> Iterator[int]:
    """Positions that are shuffled, packed, collated and ready for the device."""
    stream = StreamConfig(max_length=TOKENS, batch_size=ROWS_A_BATCH, micro_batch_size=ROWS_A_BATCH)
    for batch in SoftLabelDataset(table, stream):
        yield len(batch.positions)


def reading(table: Table) -> Iterator[int]:
    """Positions that are only read and decompressed."""
    for _, rows in batches(table, COLUMNS):
        yield len(rows.column("entropies").combine_chunks().values)


def plain_pyarrow(path: Path) -> Iterator[int]:
    """Python lists that become tensors, batch by batch."""
    for rows in pq.ParquetFile(path).iter_batches(ROWS_A_BATCH):
        columns = rows.to_pydict()
        tensors = {name: torch.tensor(values) for name, values in columns.items()}
        yield tensors["input_ids"].numel()


def hugging_face(path: Path) -> Iterator[int]:
    """``datasets`` with its torch format, from the Arrow file into which it converts the Parquet file (not timed)."""
    import datasets

    datasets.disable_progress_bars()
    cache = str(path.parent / "cache")
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=cache).with_format("torch")
    yield 0
    for batch in rows.iter(ROWS_A_BATCH):
        yield batch["input_ids"].numel()


def mean_tokens(table: Table) -> int:
    """Mean number of tokens in a sequence."""
    counts: list[int] = [count for _, rows in batches(table, ["tokens"]) for count in rows["tokens"].to_pylist()]
    return round(statistics.mean(counts))


def rate(stream: Iterator[int], prepared: bool = False) -> float:
    """Positions per second of CPU time."""
    if prepared:
        next(stream)
    start = time.process_time()
    positions = sum(stream)
    return positions / (time.process_time() - start)


def compared(usual: Table, short: Table, naive: Path) -> dict[str, Callable[[], float]]:
    """Every method that can run on this machine, by name; each returns positions per second."""
    ways = {
        OURS: lambda: rate(ours(usual)),
        "  of which reading Parquet": lambda: rate(reading(usual)),
        OURS_SHORT: lambda: rate(ours(short)),
        "pyarrow to lists to tensors": lambda: rate(plain_pyarrow(naive)),
    }
    if importlib.util.find_spec("datasets") is None:
        print("(datasets is not installed: Hugging Face is skipped; install it with pip install -e '.[bench]')")
    else:
        ways[HUGGING_FACE] = lambda: rate(hugging_face(naive), prepared=True)
    return ways


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--naive-sequences", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as temporary:
        naive = Path(temporary, "naive.parquet")
        make_naive(naive, arguments.naive_sequences)
        usual, short = (
            make_table(Path(tempfile.mkdtemp(dir=temporary)), sequences, tokens)
            for sequences, tokens in ((arguments.sequences, TOKENS), (16 * arguments.sequences, SHORT))
        )
        means = {name: mean_tokens(table) for name, table in ((OURS, usual), (OURS_SHORT, short))}
        ways = compared(usual, short, naive)
        rounds = [{name: way() for name, way in ways.items()} for _ in range(arguments.rounds)]
    rates = {name: statistics.median(one[name] for one in rounds) for name in ways}
    ratios = {name: statistics.median(one[OURS] / one[name] for one in rounds) for name in ways}
    print(f"{'':30}{'tokens a sequence':>18}{'positions/s of one core':>24}{'softlabel is':>15}")
    for name in ways:
        print(f"{name:30}{means.get(name, ''):>18}{rates[name]:>24,.0f}{ratios[name]:>14.1f}×")
    print()
    for name in (OURS, OURS_SHORT):
        print(verdict(name, rates[name], "positions/s", at_least=500_000))
    if HUGGING_FACE in ways:
        print(verdict("softlabel", ratios[HUGGING_FACE], f"times {HUGGING_FACE}", at_least=10))


if __name__ == "__main__":
    main()
