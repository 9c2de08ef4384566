"""What a capture costs over the teacher's bare forward pass of the same batches.

``python -m tests.benchmarks.capture`` prints a table. Its teachers are SmolLM2-135M on Python's own manual and, with
random weights and ids, a model of Llama 3.2 1B's shape; on a GPU also one of Qwen3-8B's. Every round runs over the same
batches, in turn:

    model      model(input_ids).logits, as anybody would call it
    forward    the body, then the output layer in float32 over the captured positions, in chunks that are thrown away
    k=64       a capture of plain top-k: forward, selection, encoding, writing, commit
    default    the same with the default selection

A capture counts from its first batch to the end of its commit, into a table that is there; what comes before, once a
shard of a million positions, is printed beside it. Ratios are of one round; shown are their median and range.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from pipeline import capturing
from pipeline.capturing import capture_shard
from pipeline.checkpoint import Checkpoint
from pipeline.config import CaptureConfig, SelectionConfig, SequencesConfig, TeacherConfig
from pipeline.demo import prepare_teacher
from pipeline.planning import plan
from pipeline.teacher import TransformersTeacher, each_batch
from storage.writer import Commit, ShardWriter
from tests import memory

SELECTIONS = {"k=64": SelectionConfig(top_k=64), "default": SelectionConfig()}
SHAPES: dict[str, Any] = {
    "1B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    ),
    "8B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        architectures=["Qwen3ForCausalLM"],
    ),
}


class RandomWeights(Checkpoint):
    """A teacher of some shape whose weights are on no disk."""

    def load(self, device_map: Any, attention: str) -> Any:
        torch.manual_seed(0)
        with torch.device(device_map[""]):
            model = AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, self.dtype))
        model.base_model.norm.weight.data.mul_(4)  # a distribution of about 5 nats, not a flat one
        return model.eval()


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


def random_teacher(folder: Path, shape: str) -> None:
    """A folder with the shape's configuration and a tokenizer that knows every id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = SHAPES[shape]
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t1").save_pretrained(folder)
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()


def documents(path: Path, teacher: str, count: int, tokens: int, seed: int) -> str:
    """So many documents of at least so many tokens."""
    if teacher in SHAPES:
        rng = np.random.default_rng(seed)
        texts = [" ".join(f"t{i}" for i in rng.integers(2, SHAPES[teacher].vocab_size, tokens)) for _ in range(count)]
    else:
        from pydoc_data.topics import topics

        whole = "\n".join(text for _, text in sorted(topics.items()))[seed * 12 * tokens * count :]
        texts = [whole[i * 12 * tokens : (i + 1) * 12 * tokens] for i in range(count)]
    pq.write_table(pa.table({"id": [f"{seed}-{i}" for i in range(count)], "text": texts}), path)
    return str(path)


class Bench:
    """One teacher with everything to run it over the same batches in each way.

    Args:
        name: a shape, or SmolLM2.
        folder: for its tables.
        device: to run it on.
        sequences: of each round.
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
        measured = documents(folder / "measured.parquet", name, sequences, tokens, 0)
        for selection, chosen in SELECTIONS.items():
            config = CaptureConfig(
                documents=documents(folder / "first.parquet", name, 1, tokens, 1),
                table=str(folder / f"{selection}-first"),
                teacher=settings,
                selection=chosen,
                sequences=SequencesConfig(max_tokens=tokens),
            )
            capture_shard(config, plan(config, folder / f"plan-{selection}").shards[0])
            nowhere = config.model_copy(update={"documents": measured, "table": str(folder / "nowhere")})
            planned = plan(nowhere, folder / f"measured-{selection}").shards[0]
            rows = pq.read_table(planned)
            rows = rows.filter(pc.equal(rows["tokens"], tokens)).slice(0, sequences)
            pq.write_table(rows, planned)
            self._configs[selection], self._plans[selection] = config, planned
        self._ids = [row.values.to_numpy() for row in rows["token_ids"]]
        self._positions = [np.arange(1, len(ids), dtype=np.int32) for ids in self._ids]
        self.tokens = sum(map(len, self._ids))

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
        del self.teacher.logits
        shutil.rmtree(table)
        about |= {"before": began[0] - started, "bytes": commit.bytes / commit.positions}
        return ended - began[0]

    def shares(self, selection: str) -> dict[str, float]:
        """Seconds within a capture that go to the selection, to encoding and writing (beside it), and to the commit."""
        spent = dict.fromkeys(("selection", "writing", "commit"), 0.0)

        def clocked(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
            self._wait()
            started = time.perf_counter()
            result = work(*arguments)
            spent[name] += time.perf_counter() - started
            return result

        kept = capturing.select, ShardWriter.append, ShardWriter.commit
        capturing.select = partial(clocked, "selection", kept[0])
        ShardWriter.append = lambda *a: clocked("writing", kept[1], *a)  # type: ignore[method-assign]
        ShardWriter.commit = lambda *a: clocked("commit", kept[2], *a)  # type: ignore[method-assign]
        whole = self.capture(selection, {})
        capturing.select, ShardWriter.append, ShardWriter.commit = kept  # type: ignore[method-assign]
        return {name: seconds / whole for name, seconds in spent.items()}

    def peak(self, work: Callable[[], object]) -> float:
        """Highest memory during some work, in GB: the device's or, on a CPU, the process's."""
        if self.teacher.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            work()
            return torch.cuda.max_memory_allocated() / 1e9
        memory.reset_peak()
        work()
        return memory.peak() / 1e9


def measure(bench: Bench, rounds: int) -> None:
    """Print a teacher's lines."""
    about: dict[str, dict[str, float]] = {name: {} for name in SELECTIONS}
    arms: dict[str, Callable[[], float]] = {
        "model": lambda: bench.forward(WholeModel(bench.teacher)),
        "forward": lambda: bench.forward(bench.teacher),
        **{name: partial(bench.capture, name, about[name]) for name in SELECTIONS},
    }
    memory = {name: bench.peak(arm) for name, arm in arms.items()}  # and warms up
    times = []
    for number in range(rounds):
        order = list(arms) if number % 2 else list(reversed(arms))
        times.append({name: arms[name]() for name in order})
    for name in arms:
        rate = bench.tokens / min(round_[name] for round_ in times)
        line = f"  {name:<9} {rate:>9,.0f} {memory[name]:>8.2f}"
        if name in SELECTIONS:
            for peer in ("forward", "model"):
                ratios = [100 * (round_[name] / round_[peer] - 1) for round_ in times]
                line += f"   {statistics.median(ratios):>+6.1f} % ({min(ratios):+.1f} to {max(ratios):+.1f})"
            shares = bench.shares(name)
            line += "".join(f" {share:>9.1%}" for share in shares.values())
            line += f" {about[name]['bytes']:>9.1f} {about[name]['before']:>8.2f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--teachers", nargs="+", default=["SmolLM2", "1B", *(["8B"] * torch.cuda.is_available())])
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    on_cpu = {"SmolLM2": (8, 512, 1), "1B": (4, 256, 1)}
    sizes = dict.fromkeys(["SmolLM2", *SHAPES], (64, 1024, 8)) if cuda else on_cpu
    for name in arguments.teachers:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(name, Path(folder), device, *sizes[name])
            threads = "" if cuda else f", {torch.get_num_threads()} threads"
            size = f"{bench.teacher.parameters / 1e6:,.0f}M parameters"
            print(f"{name}: {size}, {device}{threads}, {bench.tokens:,} tokens a round")
            print(
                f"  {'':<9} {'tokens/s':>9} {'peak GB':>8}   {'over forward':>24}   {'over model':>24}"
                f" {'selection':>9} {'writing':>9} {'commit':>9} {'B/pos':>9} {'before s':>8}"
            )
            measure(bench, arguments.rounds)


if __name__ == "__main__":
    main()
