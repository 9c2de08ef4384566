"""What it costs to use a model: its size and, measured on this machine, its speed and memory.

The speed is that of transformers, eagerly, with the model as it was evaluated. Models are comparable if they were
measured under the same conditions, which ``Speed`` names. The docstrings here are part of the description of
report.json.
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self
from weakref import WeakSet, finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from softlabel.pipeline.config.evaluate import CostConfig
from softlabel.pipeline.models.experts import active_parameters
from softlabel.storage.errors import StudentError, UsageError

_CPUS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Rate:
    """How much is done in a second."""

    median: float
    """Of the runs."""
    slowest: float
    fastest: float

    @classmethod
    def of(cls, amount: int, seconds: Sequence[float]) -> Self:
        """The rate of runs that each did this much."""
        return cls(amount / median(seconds), amount / max(seconds), amount / min(seconds))


@dataclass(frozen=True)
class Lengths:
    """What each run reads and writes."""

    batch_size: int
    """Prompts at a time; of a classifier, documents."""
    prompt_tokens: int
    """Tokens of each prompt or document."""
    new_tokens: int
    """Tokens that are generated after each prompt; 0 for a classifier."""

    @classmethod
    def fitting(cls, config: CostConfig, limits: Sequence[tuple[str, int]], generates: bool) -> Self:
        """The lengths that the settings ask for; the defaults are shortened until they fit all models.

        Args:
            config: the settings.
            limits: name and positions of each model that has a limit.
            generates: whether the models are language models.

        Raises:
            UsageError: if a given length is too long for one of the models.
        """
        new = config.new_tokens if generates else 0
        name, limit = min(limits, key=lambda each: each[1], default=("", config.prompt_tokens + new))
        if config.prompt_tokens + new <= limit:
            return cls(config.batch_size, config.prompt_tokens, new)
        if config.gives("prompt_tokens") or (generates and config.gives("new_tokens")):
            raise UsageError(
                f"{name} can't read as many tokens as its cost is to be measured with",
                expected=f"cost.prompt_tokens and cost.new_tokens of at most {limit} together",
                found=f"cost.prompt_tokens: {config.prompt_tokens}, cost.new_tokens: {config.new_tokens}",
                do="choose smaller ones; all models are measured with the same",
            )
        new = min(new, limit // 2)
        return cls(config.batch_size, limit - new, new)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a model is and how much memory it needs, and the conditions of the measurement."""

    prefill: Rate
    """Tokens of prompts, or of documents, read in a second."""
    decode: Rate | None
    """Tokens generated in a second, over all prompts of a batch; None for a classifier."""
    documents: Rate | None
    """Documents of ``prompt_tokens`` tokens classified in a second; None for a language model."""
    memory: int
    """Most bytes of tensors at a time: the weights, and what a run adds to them."""
    device: str
    """Name of the processor, with the number of threads of a CPU."""
    dtype: str
    """Type of the weights."""
    lengths: Lengths
    runs: int
    """Number of runs, after one more to warm up."""

    @property
    def produced(self) -> Rate | None:
        """How much comes out in a second: tokens generated or, of a classifier, documents classified."""
        return self.decode or self.documents


@dataclass(frozen=True)
class Cost:
    """What it costs to use a model."""

    active_parameters: int | None
    """Parameters that one token uses: fewer than all in a mixture of experts. None if it is not known."""
    bytes: int
    """Size of its weight files on disk."""
    speed: Speed | None
    """None if it was not measured."""


def cost_of(model: PreTrainedModel, name: str, files: Sequence[Path], lengths: Lengths, runs: int, task: str) -> Cost:
    """What it costs to use a model, measured on the device that it is on.

    Args:
        model: the model.
        name: its name, for an error.
        files: its weight files.
        lengths: what each run reads and writes.
        runs: number of runs; 0 to measure no speed.
        task: what the model does, in the terms of transformers.

    Raises:
        StudentError: if the model can't be run with transformers' own methods.
        UsageError: if memory runs out.
    """
    size = sum(file.stat().st_size for file in files)
    try:
        speed = _speed(model, lengths, runs, task) if runs else None
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UsageError(
            f"the memory is too small to measure the cost of {name}",
            expected=f"memory for {lengths.batch_size} x {lengths.prompt_tokens + lengths.new_tokens} tokens",
            found=str(error).partition("\n")[0],
            do="choose a smaller cost.batch_size or cost.prompt_tokens, or leave it out with --cost.no-measure; the"
            " finished measurements are kept",
        ) from error
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise StudentError(
            f"the speed of {name} can't be measured",
            expected="a model that transformers can run" + (" with generate()" if lengths.new_tokens else ""),
            found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            do="leave it out with --cost.no-measure; the finished measurements are kept",
        ) from error
    return Cost(active_parameters(model), size, speed)


@torch.no_grad()
def _speed(model: PreTrainedModel, lengths: Lengths, runs: int, task: str) -> Speed:
    """Time some runs on the same random tokens, after one to warm up, in which the memory is measured."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(
        vocabulary, (lengths.batch_size, lengths.prompt_tokens), generator=torch.Generator().manual_seed(0)
    ).to(model.device)
    run = _generate if task == "text-generation" else _classify
    model.eval()
    with _plain_generation(model, lengths.new_tokens):
        memory = _peak(model, lambda: run(model, ids))
        times = [run(model, ids) for _ in range(runs)]
    prefill, decode = zip(*times, strict=True)
    return Speed(
        prefill=Rate.of(ids.numel(), prefill),
        decode=Rate.of(lengths.batch_size * lengths.new_tokens, decode) if lengths.new_tokens else None,
        documents=None if lengths.new_tokens else Rate.of(lengths.batch_size, prefill),
        memory=memory,
        device=hardware(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        lengths=lengths,
        runs=runs,
    )


def _generate(model: PreTrainedModel, ids: Tensor) -> tuple[float, float]:
    """Seconds to the first new token, and from there to the last."""
    clock = _Clock()
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock)
    start, first, *_, last = clock.times
    return first - start, last - first


def _classify(model: PreTrainedModel, ids: Tensor) -> tuple[float, float]:
    """Seconds of a forward pass; nothing is generated after it."""
    start = time.perf_counter()
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.cpu()
    return time.perf_counter() - start, 0.0


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when the prompts and each new token come; a token comes when the device has computed it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompts before they are read, and with each new token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called at the end."""


@contextmanager
def _plain_generation(model: PreTrainedModel, new_tokens: int) -> Iterator[None]:
    """Let the model generate greedily, this many tokens after the first: its own settings may ask for beams or less."""
    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig(max_new_tokens=1 + new_tokens, do_sample=False, use_cache=True)
    try:
        yield
    finally:
        model.generation_config = own


def _peak(model: PreTrainedModel, run: Callable[[], object]) -> int:
    """Most bytes of tensors during a run: the weights, and what the run adds to them."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        allocated: int = torch.cuda.max_memory_allocated(device)
        return _weights(model) + allocated - before
    tensors = _Tensors(model)
    with tensors:
        run()
    return _weights(model) + tensors.peak


class _Tensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and freed.

    A process's memory is no measure of that: it keeps some of what is freed, more or less by chance.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._bytes = 0
        self._known = WeakSet(each.untyped_storage() for each in _tensors(model))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it makes."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, bytes: int) -> None:
        self._bytes += bytes
        self.peak = max(self.peak, self._bytes)


def _tensors(model: PreTrainedModel) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _weights(model: PreTrainedModel) -> int:
    """Bytes of a model's weights in memory; shared ones count once."""
    return sum({each.data_ptr(): each.numel() * each.element_size() for each in _tensors(model)}.values())


def hardware(device: torch.device) -> str:
    """The name of a processor, with the number of threads that a CPU's computations use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{_cpu()}, {threads} thread{'' if threads == 1 else 's'}"


def _cpu() -> str:
    with suppress(OSError, StopIteration):
        lines = _CPUS.read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
