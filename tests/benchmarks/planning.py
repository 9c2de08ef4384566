"""How long it takes to find out what a capture has to do, and in how much memory, by the number of documents.

``python -m tests.benchmarks.planning`` makes 10^3 to 10^6 small documents, plans their capture with SmolLM2's tokenizer
(unpacked to .demo/teacher), fills a table with made-up soft labels of all their sequences, and plans again with ten
documents more, as a nightly run does. Each plan runs in a process of its own, whose peak memory is shown; how many
documents were tokenised is counted in the tokeniser.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.checkpoint import Checkpoint
from pipeline.config import CaptureConfig, SelectionConfig, TeacherConfig
from pipeline.demo import prepare_teacher
from pipeline.planning import identify, plan
from pipeline.tokeniser import Tokeniser
from storage.codec import SoftLabels
from storage.schema import SEQUENCE
from storage.table import Table
from storage.writer import ShardWriter

WORDS = 15
"""Words of a document, from a list of a thousand."""
SIZES = (10**3, 10**4, 10**5, 10**6)
NEW = 10
"""Documents that a nightly run finds beside the old."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=SIZES)
    sizes = parser.parse_args().documents
    teacher = Path(".demo/teacher")
    prepare_teacher(teacher)
    print(f"{'documents':>10}  {'run':<8}{'tokenised':>10}{'seconds':>9}{'documents/s':>13}{'peak memory':>13}")
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="softlabel-") as name:
            measure(size, teacher, Path(name))


def measure(size: int, teacher: Path, folder: Path) -> None:
    """Both plans over so many documents."""
    words = [f"word{i}" if i % 3 else "and" for i in range(1000)]
    write_documents(folder / "documents.parquet", words, size)
    config = CaptureConfig(
        documents=str(folder / "documents.parquet"),
        table=str(folder / "table"),
        teacher=TeacherConfig(model=str(teacher)),
        selection=SelectionConfig(top_k=1),
    )
    show(size, "first", config, folder / "first")
    fill(config, folder / "first")
    write_documents(folder / "documents.parquet", words, size + NEW)
    show(size, "nightly", config, folder / "nightly")


def write_documents(path: Path, words: list[str], count: int) -> None:
    """Documents of random words, the same for the same number."""
    with pq.ParquetWriter(path, pa.schema([("id", pa.string()), ("text", pa.string())])) as writer:
        for start in range(0, count, 10_000):
            numbers = range(start, min(start + 10_000, count))
            chosen = np.random.default_rng(start).integers(0, len(words), (10_000, WORDS)).tolist()
            texts = [" ".join([words[i] for i in row]) for row in chosen[: len(numbers)]]
            writer.write_table(pa.table({"id": [f"document-{i}" for i in numbers], "text": texts}))


def show(size: int, run: str, config: CaptureConfig, folder: Path) -> None:
    """Plan in a fresh process, and print what that took."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        tokenised, seconds, peak = process.submit(planned, config, folder).result()
    print(f"{size:>10,}  {run:<8}{tokenised:>10,}{seconds:>9.1f}{size / seconds:>13,.0f}{peak / 1e6:>10,.0f} MB")


def planned(config: CaptureConfig, folder: Path) -> tuple[int, float, int]:
    """Documents tokenised, seconds, and this process's peak memory in bytes."""
    tokenised, encode = 0, Tokeniser.encode

    def counting(self: Tokeniser, contents: list[str]) -> object:
        nonlocal tokenised
        tokenised += len(contents)
        return encode(self, contents)

    Tokeniser.encode = counting  # type: ignore[method-assign, assignment]
    started = time.perf_counter()
    plan(config, folder)
    seconds = time.perf_counter() - started
    return tokenised, seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fill(config: CaptureConfig, folder: Path) -> None:
    """Commit a plan's sequences with soft labels that no teacher gave: one id a position."""
    checkpoint = Checkpoint.find(config.teacher)
    tokeniser = Tokeniser(checkpoint, config.sequences, "text")
    identity = identify(config, checkpoint, tokeniser)
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    tokeniser.save(tokenizer)
    table = Table.create(config.table, identity, pa.schema([]), made_up(1), tokenizer)
    for path in sorted((folder / "shards").iterdir()):
        sequences = pq.read_table(path).select(SEQUENCE.names)
        with ShardWriter(table) as writer:
            writer.append(sequences, made_up(sum(sequences.column("positions").to_pylist())))
            writer.commit({"operation": "capture"})


def made_up(positions: int) -> SoftLabels:
    """Soft labels that say the same everywhere."""
    ones, none = np.ones(positions, np.int32), np.zeros(0, np.int32)
    half = np.full(positions, -np.log(2), np.float32)
    return SoftLabels(
        head_counts=ones,
        head_ids=0 * ones,
        head_logprobs=half,
        tail_counts=0 * ones,
        tail_ids=none,
        tail_draws=none,
        tail_logprobs=none.astype(np.float32),
        tail_log_masses=half[None],
        entropies=-half,
        next_logprobs=half,
    )


if __name__ == "__main__":
    main()
