"""Measures the time and memory of a capture without its teacher, by the number of documents.

``python -m tests.benchmarks.planning`` creates 10^3 to 10^6 small documents, and runs over them with SmolLM2's
tokenizer (unpacked to .demo/teacher):

    plan       only the plan: read, tokenize, cut into sequences, compare with the table
    capture    a whole capture, from the plan to the last commit, with a stub as the teacher that returns the same
               single id at each position in no time (see ``tests.benchmarks.capture`` for the cost of a real teacher)
    nightly    the same capture again with ten more documents

Each runs in its own process, whose peak memory is shown. The tokenizer counts what was tokenized.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softlabel.pipeline.capturing import shard
from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.capturing.job import CaptureJob, resolve
from softlabel.pipeline.capturing.labelling import Labelled, OwnLabeller
from softlabel.pipeline.capturing.plan import plan
from softlabel.pipeline.config.capture import CaptureConfig, SelectionConfig, TeacherConfig
from softlabel.pipeline.examples.language_model import prepare_teacher
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer, Encoded
from softlabel.storage.labels import SoftLabels
from tests import memory

WORDS = 15
"""Words of a document, from a list of a thousand."""
SIZES = (10**3, 10**4, 10**5, 10**6)
NEW = 10
"""New documents in the nightly run."""
ROWS = 4096
"""Sequences that the stub returns at a time."""


class Stub(OwnLabeller):
    """A teacher that needs no time."""

    def label(self, sequences: pa.Table) -> Iterator[Labelled]:
        """The sequences in batches, with one id at each position."""
        for start in range(0, len(sequences), ROWS):
            rows = sequences.slice(start, ROWS)
            yield rows, made_up(sum(rows.column("positions").to_pylist()))


def stub_of(_: CaptureJob) -> Stub:
    """What a capture gets in the place of its teacher."""
    return Stub([])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=SIZES)
    sizes = parser.parse_args().documents
    teacher = Path(".demo/teacher")
    prepare_teacher(teacher)
    columns = f"{'tokenized':>10}{'seconds':>9}{'documents/s':>13}{'tokens/s':>11}{'peak memory':>13}"
    print(f"{'documents':>10}  {'run':<8}{columns}")
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="softlabel-") as name:
            measure(size, teacher, Path(name))


def measure(size: int, teacher: Path, folder: Path) -> None:
    """Run everything over a number of documents."""
    words = [f"word{i}" if i % 3 else "and" for i in range(1000)]
    write_documents(folder / "documents.parquet", words, size)
    config = CaptureConfig(
        documents=str(folder / "documents.parquet"),
        table=str(folder / "table"),
        teacher=TeacherConfig(model=str(teacher)),
        selection=SelectionConfig(top_k=1),
    )
    show(size, "plan", planned, config)
    show(size, "capture", captured, config)
    write_documents(folder / "documents.parquet", words, size + NEW)
    show(size, "nightly", captured, config)


def write_documents(path: Path, words: list[str], count: int) -> None:
    """Write documents of random words; a document's text depends only on its number."""
    with pq.ParquetWriter(path, pa.schema([("id", pa.string()), ("text", pa.string())])) as writer:
        for start in range(0, count, 10_000):
            numbers = range(start, min(start + 10_000, count))
            chosen = np.random.default_rng(start).integers(0, len(words), (10_000, WORDS)).tolist()
            texts = [" ".join([words[i] for i in row]) for row in chosen[: len(numbers)]]
            writer.write_table(pa.table({"id": [f"document-{i}" for i in numbers], "text": texts}))


def show(size: int, run: str, work: Callable[[CaptureConfig], None], config: CaptureConfig) -> None:
    """Run in a new process, and print its time and memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        documents, tokens, seconds, peak = process.submit(measured, work, config).result()
    rates = f"{size / seconds:>13,.0f}{tokens / seconds:>11,.0f}"
    print(f"{size:>10,}  {run:<8}{documents:>10,}{seconds:>9.1f}{rates}{peak / 1e6:>10,.0f} MB", flush=True)


def planned(config: CaptureConfig) -> None:
    """Only the plan."""
    with tempfile.TemporaryDirectory(prefix="softlabel-") as folder:
        plan(resolve(config), Path(folder))


def captured(config: CaptureConfig) -> None:
    """A whole capture."""
    with patch.object(shard, "labeller_of", stub_of):
        capture(config)


def measured(work: Callable[[CaptureConfig], None], config: CaptureConfig) -> tuple[int, int, float, int]:
    """Documents and tokens that went through the tokenizer, seconds, and this process's peak memory in bytes."""
    documents, tokens, encode = 0, 0, DocumentTokenizer.encode

    def counting(self: DocumentTokenizer, contents: list[str]) -> tuple[Encoded, dict[int, str]]:
        nonlocal documents, tokens
        encoded, refused = encode(self, contents)
        documents += len(contents)
        tokens += len(encoded.ids)
        return encoded, refused

    DocumentTokenizer.encode = counting  # type: ignore[method-assign, assignment]
    started = time.perf_counter()
    work(config)
    seconds = time.perf_counter() - started
    return documents, tokens, seconds, memory.peak()


def made_up(positions: int) -> SoftLabels:
    """The same soft labels at every position."""
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
