"""Measures the cost of a table with very many shards, before its first row is read or written.

``python -m tests.benchmarks.shards`` creates tables of 100, 1,000 and 10,000 small shards, and prints one line for each
operation that handles all of them. Each operation runs in its own process. Seconds are CPU time over all threads, so
that a busy machine does not change them. They, and the rise of resident memory, cover only the operation, without
imports. The files are on a local disk and in the system's cache.

Then it prints the cost of commits to tables of 100 to 100,000 shards. Commits read no shard that they share no key
with, so these shards are only in the log and in the files of keys; their own files do not exist. Last, it writes a
table shard by shard, each in a commit of its own.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabel.pipeline.config.train import StreamConfig
from softlabel.pipeline.stream.dataset import SoftLabelDataset
from softlabel.storage.codec import encode
from softlabel.storage.committing import try_commit
from softlabel.storage.key_index import KeyIndex
from softlabel.storage.log.checkpoints import write_checkpoint
from softlabel.storage.log.state import Shard
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.shard_file import ShardFile, add_action
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import inspect
from softlabel.storage.upkeep.verification import verify
from softlabel.storage.writer import ShardWriter
from tests import memory
from tests.benchmarks.stream import random_labels
from tests.benchmarks.table import Captured, make_table

SEQUENCES, POSITIONS = 16, 8
"""Sequences in a shard, and positions in a sequence."""
LABELS = random_labels(np.random.default_rng(0), SEQUENCES * POSITIONS)
SHARDS_PER_COMMIT = 100
"""Shards in one commit."""


def rows(table: Table, number: int) -> pa.Table:
    """Rows of one shard; only their soft labels are the same in every shard."""
    names = [f"{number}-{i}" for i in range(SEQUENCES)]
    keys = [number.to_bytes(8, "big") + i.to_bytes(8, "big") for i in range(SEQUENCES)]
    lengths = np.full(SEQUENCES, POSITIONS)
    own = {
        "key": keys,
        "document_id": names,
        "chunk": [0] * SEQUENCES,
        "chunks": [1] * SEQUENCES,
        "fingerprint": keys,
        "label": [None] * SEQUENCES,
        "split": ["train"] * SEQUENCES,
        "token_ids": [range(POSITIONS + 1)] * SEQUENCES,
        "loss_mask": [[False] + [True] * POSITIONS] * SEQUENCES,
        "tokens": lengths + 1,
        "positions": lengths,
    }
    sequences, labels = pa.table(own, schema=SEQUENCE), encode(LABELS, lengths, table.numbering)
    return pa.table([*sequences.columns, *labels.columns], [*sequences.column_names, *labels.column_names])


def make(folder: Path, shards: int) -> Table:
    """Create a table with this number of shards."""
    table = make_table(folder, Captured(LABELS, np.full(SEQUENCES, POSITIONS), 49_152))
    index = KeyIndex()
    for first in range(0, shards, SHARDS_PER_COMMIT):
        added = []
        for number in range(first, min(first + SHARDS_PER_COMMIT, shards)):
            file = ShardFile(table.place, table.schema, "train", SEQUENCES)
            file.append(rows(table, number))
            file.finish()
            added.append(add_action(file.shard))
            index.add(file.shard, [key for _, _, key in file.keys])
            file.publish()
            file.discard()
        try_commit(table.newest(), added, {})
        index.save(table)
        print(f"\rshard {first + len(added):,} of {shards:,}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 40, end="\r", file=sys.stderr)
    return table.newest()


def opening(location: str) -> Callable[[], object]:
    Table.open(location).shards()  # the first call imports modules
    return lambda: Table.open(location).shards()


def planning(location: str) -> Callable[[], object]:
    table, stream = Table.open(location), StreamConfig()
    return lambda: SoftLabelDataset(table, stream).state(1)


def inspecting(location: str) -> Callable[[], object]:
    table = Table.open(location)
    return lambda: inspect(table)


def verifying(location: str) -> Callable[[], object]:
    table = Table.open(location)
    return lambda: verify(table)


def committing(location: str) -> Callable[[], object]:
    table = Table.open(location)
    writer = ShardWriter(table)
    writer.append_encoded(rows(table, time.time_ns()))
    return lambda: writer.commit({})


def committing_again(location: str) -> Callable[[], object]:
    committing(location)()
    return committing(location)


WORK: dict[str, Callable[[str], Callable[[], object]]] = {
    "open, list shards": opening,
    "plan an epoch": planning,
    "inspect": inspecting,
    "verify": verifying,
    "first commit of a process": committing,
    "second commit of a process": committing_again,
}


def make_named(folder: Path, shards: int) -> Table:
    """Create a table whose shards are only named: in its log, with a checkpoint, and in its files of keys."""
    table = make_table(folder, Captured(LABELS, np.full(SEQUENCES, POSITIONS), 49_152))
    names = [f"split=train/{number:032x}.parquet" for number in range(shards)]
    named = [Shard(name, "train", SEQUENCES, 1000) for name in names]
    for first in range(0, shards, max(SHARDS_PER_COMMIT, shards // 100)):
        try_commit(table.newest(), [add_action(s) for s in named[first : first + max(100, shards // 100)]], {})
    index, chance = KeyIndex(), np.random.default_rng(0)
    for shard in named:
        index.add(shard, [chance.bytes(16) for _ in range(SEQUENCES)])
    index.save(table)
    write_checkpoint(table.place, table.newest().version)
    return table.newest()


def shard_by_shard(folder: Path, shards: int) -> None:
    """Write a table of this number of shards, each in its own commit, and print the seconds of the commits."""
    table = make_table(folder, Captured(LABELS, np.full(SEQUENCES, POSITIONS), 49_152))
    seconds = []
    for number in range(shards):
        with ShardWriter(table) as writer:
            writer.append_encoded(rows(table, number))
            start = time.process_time()
            writer.commit({})
            seconds.append(time.process_time() - start)
    first, last = sum(seconds[: shards // 10]), sum(seconds[-shards // 10 :])
    print(f"\n{shards:,} commits of one shard each: {sum(seconds):.1f} CPU s")
    print(f"a tenth of them: at first {first:.1f} CPU s, in the end {last:.1f}")


def measure(name: str, location: str) -> None:
    """Print the seconds of an operation, and the peak rise of resident memory in bytes; runs in its own process."""
    work = WORK[name](location)
    before = memory.resident()
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    print(seconds, memory.peak() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--commits", type=int, nargs="*", default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--measure", nargs=2, metavar=("WORK", "TABLE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    print(
        f"CPU seconds, and peak MB of the largest; a shard has {SEQUENCES} sequences, {SEQUENCES * POSITIONS} positions"
    )
    print(f"{'shards':<34}{''.join(f'{shards:>9,}' for shards in arguments.shards)}{'peak MB':>9}")
    with tempfile.TemporaryDirectory() as scratch:
        locations = [make(Path(scratch) / str(shards), shards).location for shards in arguments.shards]
        for name in WORK:
            costs = [measured(name, location) for location in locations]
            print(f"{name:<34}{''.join(f'{seconds:>9.3f}' for seconds, _ in costs)}{costs[-1][1] / 1e6:>9.0f}")
    print(f"\n{'shards in the log':<34}{'first commit, CPU s':>20}{'second':>9}")
    for shards in arguments.commits:
        with tempfile.TemporaryDirectory() as scratch:
            location = make_named(Path(scratch), shards).location
            first, second = (measured(name, location)[0] for name in list(WORK)[-2:])
            print(f"{shards:<34,}{first:>20.2f}{second:>9.2f}")
    with tempfile.TemporaryDirectory() as scratch:
        shard_by_shard(Path(scratch), 2_000)


def measured(name: str, location: str) -> tuple[float, float]:
    """Seconds of an operation and the rise of memory, in bytes; it runs in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.shards", "--measure", name, location]
    seconds, peak = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    return seconds, peak


if __name__ == "__main__":
    main()
