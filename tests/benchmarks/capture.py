"""Measures the overhead of a capture over the teacher's bare forward pass of the same batches.

``python -m tests.benchmarks.capture`` prints a table. The teachers are SmolLM2-135M on Python's own manual, if the
package that contains it is installed, and models with random weights and ids: with the shape of Llama 3.2 1B on a CPU,
of Qwen2.5-1.5B and Qwen3-8B on a GPU. Every round runs over the same batches:

    model      model(input_ids).logits, called in the usual way
    forward    the body, then the output layer over the captured positions, in chunks that are discarded
    k=64       a capture of plain top-k: forward, selection, encoding, writing, commit
    default    the same with the default selection

A capture is timed from its first batch to the end of its commit, into an existing table. The time before that, which is
spent once for each shard of a million positions, is printed in a column of its own. Each batch is followed by a bare
forward pass of the same batch, which is timed separately as the reference: if the machine slows down, it slows down
both. The table shows the median and range of the rounds' ratios, with their limit in brackets. Tokens/s are those of
the best round. On a GPU with a known data sheet, the share of its bf16 rate is shown as well, at two operations for
each parameter and token.

The last columns come from a separate capture with timers inside: the selection relative to the bare forward pass, then
the shares of the capture that are spent on the selection, on encoding and writing (in parallel with the next batch),
and on the commit, which also writes the last sequences.
"""

import argparse
import math
import re
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

import softlabel.flows  # noqa: F401, sets the environment variables of a capture
from softlabel.pipeline.capturing import labelling
from softlabel.pipeline.capturing.job import resolve
from softlabel.pipeline.capturing.plan import plan
from softlabel.pipeline.capturing.shard import capture_shard
from softlabel.pipeline.config.capture import CaptureConfig, SelectionConfig, SequencesConfig, TeacherConfig
from softlabel.pipeline.config.estimate import BF16_TERAFLOPS
from softlabel.pipeline.examples.language_model import prepare_teacher
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.selection.select import select
from softlabel.pipeline.teachers.teacher import TransformersTeacher, each_batch
from softlabel.storage.errors import TeacherError
from softlabel.storage.writer import Commit, ShardWriter
from tests import memory
from tests.shapes import SHAPES, RandomWeights, documents, random_teacher

SELECTIONS = {"k=64": SelectionConfig(top_k=64), "default": SelectionConfig()}
LIMITS = {("cpu", "SmolLM2"): 12, ("cpu", "1B"): 5, ("cuda", "8B"): 10}
"""Highest overhead of a capture, in percent of the bare forward pass."""
SELECTION_LIMITS = {("cuda", "8B"): 10}
"""Highest time of the selection, in percent of the bare forward pass."""

ROUND = 16
"""Seconds of forward passes in a round. Those of a real shard take minutes, so opening and commit weigh less there."""


class WholeModel:
    """The teacher called in the usual way: logits of every position at once, in its own dtype."""

    def __init__(self, teacher: TransformersTeacher) -> None:
        self._teacher, self.vocabulary = teacher, teacher.vocabulary

    @torch.inference_mode()
    def logits(self, sequences: Any, positions: Any) -> Iterator[torch.Tensor]:
        ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        inputs = torch.from_numpy(ids).to(self._teacher.device)
        yield self._teacher._model(input_ids=inputs, use_cache=False).logits


class Bench:
    """Runs one teacher over the same batches in each of the ways that are compared.

    Args:
        name: name of a shape, or SmolLM2.
        folder: folder for the tables.
        device: device that the teacher runs on.
        sequences: most sequences in a round.
        tokens: tokens of each sequence.
        batch: sequences in a batch.
    """

    def __init__(self, name: str, folder: Path, device: str, sequences: int, tokens: int, batch: int) -> None:
        source = Path(".demo/teacher")
        prepare_teacher(source) if name not in SHAPES else random_teacher(source := folder / "teacher", name)
        settings = TeacherConfig(model=str(source), device=device, batch_tokens=batch * tokens)
        checkpoint = Checkpoint.find(settings)
        if name in SHAPES:
            checkpoint = RandomWeights(checkpoint.folder, None, False, "bfloat16")
        self.teacher = TransformersTeacher(settings, checkpoint)
        self._folder, self._tokens, self._batch_tokens = folder, tokens, batch * tokens
        patch.object(labelling, "load_teacher", lambda config, checkpoint: self.teacher).start()
        self._configs: dict[str, CaptureConfig] = {}
        self._plans: dict[str, Path] = {}
        measured = documents(folder / "measured.parquet", name, 1, sequences, tokens)
        for selection, chosen in SELECTIONS.items():
            config = CaptureConfig(
                documents=documents(folder / "first.parquet", name, 0, 1, tokens),
                table=str(folder / f"{selection}-first"),
                teacher=settings,
                selection=chosen,
                sequences=SequencesConfig(max_tokens=tokens),
            )
            first = resolve(config)
            capture_shard(first, plan(first, folder / f"plan-{selection}").shards[0])
            nowhere = config.model_copy(update={"documents": measured, "table": str(folder / "nowhere")})
            planned = plan(resolve(nowhere), folder / f"measured-{selection}").shards[0]
            rows = pq.read_table(planned)
            rows = rows.filter(pc.equal(rows["tokens"], tokens))
            if not self._configs:
                self._take(rows.slice(0, batch))
                self.forward(self.teacher)  # warms up
                sequences = min(sequences, batch * max(4, int(ROUND / self.forward(self.teacher))))
            self._take(rows := rows.slice(0, sequences))
            pq.write_table(rows, planned)
            self._configs[selection], self._plans[selection] = config, planned
        self.tokens = sum(map(len, self._ids))

    def _take(self, rows: pa.Table) -> None:
        """Use these rows as the sequences of a round."""
        self._ids = [row.values.to_numpy() for row in rows["token_ids"]]
        self._positions = [np.arange(1, len(ids), dtype=np.int32) for ids in self._ids]

    def forward(self, teacher: Any) -> float:
        """Seconds for all batches without a capture."""
        started = time.perf_counter()
        for _ in each_batch(
            teacher, self._ids, self._positions, lambda _, logits: deque(logits, 0), self._batch_tokens
        ):
            self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.teacher.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def with_reference(self, teacher: Any) -> Iterator[list[float]]:
        """Follow each batch of a teacher with a bare forward pass; yields the list of its seconds, batch by batch."""
        original, bare = teacher.logits, self.teacher.logits
        spent: list[float] = []

        def both(*arguments: Any) -> Iterator[torch.Tensor]:
            yield from original(*arguments)
            self._wait()
            started = time.perf_counter()
            deque(bare(*arguments), 0)
            self._wait()
            spent.append(time.perf_counter() - started)

        with patch.object(teacher, "logits", both):
            yield spent

    def capture(self, selection: str, about: dict[str, float]) -> float:
        """Seconds to capture all batches; fills ``about`` with seconds before the first and bytes per position."""
        config, table = self._configs[selection], self._folder / "table"
        shutil.copytree(config.table, table)
        job = resolve(config.model_copy(update={"table": str(table)}))
        began: list[float] = []
        logits = self.teacher.logits

        def clocked(*arguments: Any) -> Iterator[torch.Tensor]:
            began.append(time.perf_counter())
            return logits(*arguments)

        with patch.object(self.teacher, "logits", clocked):
            started = time.perf_counter()
            commit: Commit = capture_shard(job, self._plans[selection])
            ended = time.perf_counter()
        assert commit.positions == sum(map(len, self._positions)), "some sequences were already in the table"
        shutil.rmtree(table)
        about |= {"before": began[0] - started, "bytes": commit.bytes / commit.positions}
        return ended - began[0]

    def clocked(self, selection: str) -> dict[str, float]:
        """Seconds of a capture as a whole, and of its selection, encoding and writing, and commit."""
        spent = dict.fromkeys(("selection", "writing", "commit"), 0.0)

        def clocked(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
            if name == "selection":  # pending work of the device is not part of the selection
                self._wait()
            started = time.perf_counter()
            result = work(*arguments)
            spent[name] += time.perf_counter() - started
            return result

        append, commit = ShardWriter.append, ShardWriter.commit
        with (
            patch.object(labelling, "select", partial(clocked, "selection", select)),
            patch.object(ShardWriter, "append", lambda *a: clocked("writing", append, *a)),
            patch.object(ShardWriter, "commit", lambda *a: clocked("commit", commit, *a)),
        ):
            spent["whole"] = self.capture(selection, {})
        return spent

    def peak(self, work: Callable[[], object]) -> float:
        """Peak memory during some work, in GB: of the GPU or, on a CPU, of the process."""
        if self.teacher.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            work()
            return torch.cuda.max_memory_allocated() / 1e9
        memory.reset_peak()
        work()
        return memory.peak() / 1e9


def percent(ratios: list[float], limit: int | None) -> str:
    """Median, range and limit, as text."""
    low, middle, high = (f"{100 * f(ratios):+.1f}" for f in (min, statistics.median, max))
    return f"{middle} % ({low} to {high})" + (f" [at most {limit} %]" if limit else "")


def card_rate() -> float | None:
    """Dense bf16 operations per second in the data sheet of this GPU, if it is known."""
    words = re.split("[ -]", torch.cuda.get_device_name().lower()) if torch.cuda.is_available() else []
    hopper = {"h100", "h200"} & {*words} and {"pcie", "nvl"} & {*words}  # slower boards of the same name
    rates = [rate * 1e12 for gpu, rate in BF16_TERAFLOPS.items() if gpu in words and not hopper]
    return rates[0] if rates else None


def measure(name: str, bench: Bench, rounds: int) -> None:
    """Measure one teacher, and print its lines."""
    place, rate = (bench.teacher.device.type, name), card_rate()
    about: dict[str, dict[str, float]] = {name: {} for name in SELECTIONS}
    whole = WholeModel(bench.teacher)
    arms: dict[str, Callable[[], float]] = {
        "model": lambda: bench.forward(whole),
        "forward": lambda: bench.forward(bench.teacher),
        **{name: partial(bench.capture, name, about[name]) for name in SELECTIONS},
    }
    memory = {arm: bench.peak(work) for arm, work in arms.items()}  # and warms up
    clocks = {selection: bench.clocked(selection) for selection in SELECTIONS}
    fastest = dict.fromkeys(arms, math.inf)
    over: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in ("model", *SELECTIONS):
            with bench.with_reference(whole if arm == "model" else bench.teacher) as forward:
                seconds = arms[arm]() - sum(forward)
            over[arm].append(seconds / sum(forward) - 1)
            fastest |= {arm: min(fastest[arm], seconds), "forward": min(fastest["forward"], sum(forward))}
    shares = "".join(f" {part:>9}" for part in ("selection", "writing", "commit"))
    print(
        f"  {'':<9} {'tokens/s':>9}{'' if rate is None else ' of bf16'} {'peak GB':>8}   {'over forward':<39}"
        f" {'selection over forward':<23}{shares} {'B/pos':>7} {'before s':>8}"
    )
    for arm in arms:
        speed = bench.tokens / fastest[arm]
        line = f"  {arm:<9} {speed:>9,.0f}"
        line += "" if rate is None else f" {2 * bench.teacher.parameters * speed / rate:>7.1%}"
        line += f" {memory[arm]:>8.2f}"
        if arm != "forward":
            line += f"   {percent(over[arm], LIMITS.get(place) if arm in SELECTIONS else None):<39}"
        if arm in SELECTIONS:
            clock, limit = clocks[arm], SELECTION_LIMITS.get(place)
            share, most = clock["selection"] / fastest["forward"], f" [at most {limit} %]" if limit else ""
            line += f" {f'{share:.1%}{most}':<23}"
            line += "".join(f" {clock[part] / clock['whole']:>9.1%}" for part in ("selection", "writing", "commit"))
            line += f" {about[arm]['bytes']:>7.1f} {about[arm]['before']:>8.2f}"
        print(line.rstrip(), flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--teachers", nargs="+", default=["SmolLM2", *(["1.5B", "8B"] if cuda else ["1B"])])
    arguments = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    on_cpu = {"SmolLM2": (64, 512, 1), "1B": (32, 256, 1)}
    for name in arguments.teachers:
        size = (64, 1024, 8) if cuda else on_cpu.get(name, on_cpu["1B"])
        with tempfile.TemporaryDirectory() as folder:
            try:
                bench = Bench(name, Path(folder), device, *size)
            except TeacherError as error:
                print(f"{name} is skipped: {error}", flush=True)
                continue
            threads = "" if cuda else f", {torch.get_num_threads()} threads"
            parameters = f"{bench.teacher.parameters / 1e6:,.0f}M parameters"
            print(f"{name}: {parameters}, {device}{threads}, {bench.tokens:,} tokens a round")
            measure(name, bench, arguments.rounds)


if __name__ == "__main__":
    main()
