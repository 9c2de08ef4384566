"""How many captured positions one core makes ready to train on, beside the plain ways to do it.

``python -m tests.benchmarks.stream`` prints one table, and the limits that are to hold. The soft labels are random,
with the counts of the default selection on a real teacher (13 head ids and 9 tail ids a position) and ids as frequent
as words are. The plain ways read what most projects store, lists of lists of int32 ids and float32 log-probabilities,
as many ids at each position, so that they make whole tensors; theirs are decoded with that, ours on the device that
trains. All begin with compressed Parquet on a disk. Every round runs all of them; rates are of CPU time, all threads
added up, so that a busy machine does not change them. A sequence costs something by itself, so that a position costs
more in a short one: both lengths are shown. Hugging Face's ``datasets`` comes with the ``bench`` extra.
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from softlabel.pipeline.config.train import StreamConfig
from softlabel.pipeline.stream.batch import COLUMNS
from softlabel.pipeline.stream.dataset import SoftLabelDataset
from softlabel.storage.codec import SoftLabels
from softlabel.storage.identity import (
    Identity,
    SelectionIdentity,
    SequencesIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
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
    """Soft labels of the default selection's sizes: most heads are full, most tails short."""
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
    """A table of softlabel's, in row groups of 256 sequences; most have so many tokens, no other under half."""
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


def _row(number: int, tokens: int, generator: np.random.Generator) -> dict[str, object]:
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
    """What most projects store: for each sequence a list of lists of ids, and one of log-probabilities."""
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
    """Shuffled, packed, collated, ready for the device."""
    stream = StreamConfig(max_length=TOKENS, batch_size=ROWS_A_BATCH, micro_batch_size=ROWS_A_BATCH)
    for batch in SoftLabelDataset(table, stream):
        yield len(batch.positions)


def reading(table: Table) -> Iterator[int]:
    """What of that is reading and decompressing."""
    for _, rows in batches(table, COLUMNS):
        yield len(rows.column("entropies").combine_chunks().values)


def plain_pyarrow(path: Path) -> Iterator[int]:
    """Python lists, made tensors batch by batch."""
    for rows in pq.ParquetFile(path).iter_batches(ROWS_A_BATCH):
        columns = rows.to_pydict()
        tensors = {name: torch.tensor(values) for name, values in columns.items()}
        yield tensors["input_ids"].numel()


def hugging_face(path: Path) -> Iterator[int]:
    """``datasets`` with its torch formatting, from the Arrow file that it makes of the Parquet (not timed)."""
    import datasets

    datasets.disable_progress_bars()
    cache = str(path.parent / "cache")
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=cache).with_format("torch")
    yield 0
    for batch in rows.iter(ROWS_A_BATCH):
        yield batch["input_ids"].numel()


def mean_tokens(table: Table) -> int:
    """Tokens of a sequence, on average."""
    return round(np.mean([count for _, rows in batches(table, ["tokens"]) for count in rows["tokens"].to_pylist()]))


def rate(stream: Iterator[int], prepared: bool = False) -> float:
    """Positions a second of CPU time."""
    if prepared:
        next(stream)
    start = time.process_time()
    positions = sum(stream)
    return positions / (time.process_time() - start)


def compared(usual: Table, short: Table, naive: Path) -> dict[str, Callable[[], float]]:
    """Every way that runs here, by name: positions a second."""
    ways = {
        OURS: lambda: rate(ours(usual)),
        "  of which reading Parquet": lambda: rate(reading(usual)),
        OURS_SHORT: lambda: rate(ours(short)),
        "pyarrow to lists to tensors": lambda: rate(plain_pyarrow(naive)),
    }
    if importlib.util.find_spec("datasets") is None:
        print("(datasets is not installed: Hugging Face is left out; pip install -e '.[bench]' brings it)")
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
