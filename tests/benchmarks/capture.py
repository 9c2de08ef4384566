"""What a capture costs over the teacher's bare forward pass of the same batches.

``python -m tests.benchmarks.capture`` prints a table. Its teachers are SmolLM2-135M on Python's own manual, if the
package that carries it is there, and models with random weights and ids: of Llama 3.2 1B's shape on a CPU, of
Qwen2.5-1.5B's and Qwen3-8B's on a GPU. Every round runs over the same batches:

    model      model(input_ids).logits, as anybody would call it
    forward    the body, then the output layer over the captured positions, in chunks that are thrown away
    k=64       a capture of plain top-k: forward, selection, encoding, writing, commit
    default    the same with the default selection

A capture counts from its first batch to the end of its commit, into a table that is there; what comes before, once a
shard of a million positions, is printed beside it. Every batch is followed by the forward pass of the same batch, whose
time is no part of the capture's but what it is compared with: a machine that changes its pace changes it for both.
Shown are the median and range of the rounds' ratios, with the limit that is set for them in brackets. Tokens a second
are the best round's and, on a card whose data sheet is known, beside them is the share of its bf16 rate, at two
operations for each parameter and token.

The last columns are of a capture with a clock in it: the selection over the bare forward, then the shares of the
capture that go to the selection, to encoding and writing (beside the next batch), and to the commit, which writes the
last sequences too.
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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

import softlabel.flows  # noqa: F401, its environment is what a capture runs in
from softlabel.pipeline.capturing import capture as capturing
from softlabel.pipeline.capturing.capture import capture_shard
from softlabel.pipeline.capturing.plan import plan
from softlabel.pipeline.config.capture import CaptureConfig, SelectionConfig, SequencesConfig, TeacherConfig
from softlabel.pipeline.config.estimate import BF16_TERAFLOPS
from softlabel.pipeline.examples.language_model import prepare_teacher
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.teachers.teacher import TransformersTeacher, each_batch
from softlabel.storage.errors import TeacherError
from softlabel.storage.writer import Commit, ShardWriter
from tests import memory
from tests.shapes import SHAPES, RandomWeights, documents, random_teacher

SELECTIONS = {"k=64": SelectionConfig(top_k=64), "default": SelectionConfig()}
LIMITS = {("cpu", "SmolLM2"): 12, ("cpu", "1B"): 5, ("cuda", "8B"): 10}
"""Percent of the bare forward that a capture may cost beside it."""
SELECTION_LIMITS = {("cuda", "8B"): 10}
"""Percent of the bare forward that the selection may take."""

ROUND = 16
"""Seconds of a bare forward pass; a shard's take minutes, beside which what it costs to open and commit is little."""


class WholeModel:
    """The teacher called the plain way: logits of every position at once, in its own dtype."""

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
    """One teacher with everything to run it over the same batches in each way.

    Args:
        name: a shape, or SmolLM2.
        folder: for its tables.
        device: to run it on.
        sequences: of each round at most.
        tokens: of each sequence.
        batch: sequences of a batch.
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
        capturing.load_teacher = lambda config: self.teacher
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
            capture_shard(config, plan(config, folder / f"plan-{selection}").shards[0])
            nowhere = config.model_copy(update={"documents": measured, "table": str(folder / "nowhere")})
            planned = plan(nowhere, folder / f"measured-{selection}").shards[0]
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
        """Let these be the sequences of a round."""
        self._ids = [row.values.to_numpy() for row in rows["token_ids"]]
        self._positions = [np.arange(1, len(ids), dtype=np.int32) for ids in self._ids]

    def forward(self, teacher: Any) -> float:
        """Seconds of all batches without a capture."""
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
    def beside(self, teacher: Any) -> Iterator[list[float]]:
        """Run the bare forward pass after each batch of a teacher; its seconds are in the list, batch by batch."""
        asked, bare = teacher.logits, self.teacher.logits
        spent: list[float] = []

        def both(*arguments: Any) -> Iterator[torch.Tensor]:
            yield from asked(*arguments)
            self._wait()
            started = time.perf_counter()
            deque(bare(*arguments), 0)
            self._wait()
            spent.append(time.perf_counter() - started)

        teacher.logits = both
        yield spent
        teacher.logits = asked

    def capture(self, selection: str, about: dict[str, float]) -> float:
        """Seconds of a capture of all batches; ``about`` is told what came before, and its bytes a position."""
        config, table = self._configs[selection], self._folder / "table"
        shutil.copytree(config.table, table)
        began: list[float] = []
        logits = self.teacher.logits

        def clocked(*arguments: Any) -> Iterator[torch.Tensor]:
            began.append(time.perf_counter())
            return logits(*arguments)

        self.teacher.logits = clocked  # type: ignore[method-assign]
        started = time.perf_counter()
        commit: Commit = capture_shard(config.model_copy(update={"table": str(table)}), self._plans[selection])
        ended = time.perf_counter()
        assert commit.positions == sum(map(len, self._positions)), "the table has none of them before"
        self.teacher.logits = logits  # type: ignore[method-assign]
        shutil.rmtree(table)
        about |= {"before": began[0] - started, "bytes": commit.bytes / commit.positions}
        return ended - began[0]

    def clocked(self, selection: str) -> dict[str, float]:
        """Seconds of a capture, and within it of the selection, of encoding and writing, and of the commit."""
        spent = dict.fromkeys(("selection", "writing", "commit"), 0.0)

        def clocked(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
            if name == "selection":  # what the device is still at is no part of it
                self._wait()
            started = time.perf_counter()
            result = work(*arguments)
            spent[name] += time.perf_counter() - started
            return result

        kept = capturing.select, ShardWriter.append, ShardWriter.commit
        capturing.select = partial(clocked, "selection", kept[0])
        ShardWriter.append = lambda *a: clocked("writing", kept[1], *a)  # type: ignore[method-assign]
        ShardWriter.commit = lambda *a: clocked("commit", kept[2], *a)  # type: ignore[method-assign]
        spent["whole"] = self.capture(selection, {})
        capturing.select, ShardWriter.append, ShardWriter.commit = kept  # type: ignore[method-assign]
        return spent

    def peak(self, work: Callable[[], object]) -> float:
        """Highest memory during some work, in GB: the device's or, on a CPU, the process's."""
        if self.teacher.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            work()
            return torch.cuda.max_memory_allocated() / 1e9
        memory.reset_peak()
        work()
        return memory.peak() / 1e9


def percent(ratios: list[float], limit: int | None) -> str:
    """Median and range, and the limit."""
    low, middle, high = (f"{100 * f(ratios):+.1f}" for f in (min, statistics.median, max))
    return f"{middle} % ({low} to {high})" + (f" [at most {limit} %]" if limit else "")


def card_rate() -> float | None:
    """Dense bf16 operations a second by the data sheet of this card, if that is known."""
    words = re.split("[ -]", torch.cuda.get_device_name().lower()) if torch.cuda.is_available() else []
    hopper = {"h100", "h200"} & {*words} and {"pcie", "nvl"} & {*words}  # slower boards of the same name
    rates = [rate * 1e12 for gpu, rate in BF16_TERAFLOPS.items() if gpu in words and not hopper]
    return rates[0] if rates else None


def measure(name: str, bench: Bench, rounds: int) -> None:
    """Print a teacher's lines."""
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
            with bench.beside(whole if arm == "model" else bench.teacher) as forward:
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
                print(f"{name} is left out: {error}", flush=True)
                continue
            threads = "" if cuda else f", {torch.get_num_threads()} threads"
            parameters = f"{bench.teacher.parameters / 1e6:,.0f}M parameters"
            print(f"{name}: {parameters}, {device}{threads}, {bench.tokens:,} tokens a round")
            measure(name, bench, arguments.rounds)


if __name__ == "__main__":
    main()
