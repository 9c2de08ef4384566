"""Measures what soft labels add to a training step, relative to a step with the same model and tokens on hard labels.

``python -m tests.benchmarks.step`` prints one table and, on a GPU, checks the limit. Each method has a copy of the same
random Llama and trains on the same batches from a table: forward, backward and AdamW. Every round runs all methods one
after another. A ratio is the median of the ratios within each round, so that a busy machine slows down both sides. On a
CPU, times are CPU times, on one thread by default. The plain step uses the model's own loss in transformers, with full
logits. Liger's step, if it is installed and there is a GPU, uses its fused cross-entropy and its kernels in the body.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from softlabel.pipeline.config.train import LossConfig, StreamConfig
from softlabel.pipeline.objectives.language_model import Distillation
from softlabel.pipeline.stream.batch import Batch
from softlabel.pipeline.stream.dataset import SoftLabelDataset
from softlabel.storage.table import Table
from tests.benchmarks.stream import VOCABULARY, make_table
from tests.figures import seconds, verdict

REFERENCE, FORWARD_KL = "softlabel, hard labels", "softlabel, forward KL"


@dataclass(frozen=True)
class Shape:
    """Size of the student and of a step."""

    hidden: int
    layers: int
    rows: int
    device: str
    dtype: torch.dtype


CPU = Shape(hidden=384, layers=6, rows=1, device="cpu", dtype=torch.float32)
CUDA = Shape(hidden=2048, layers=16, rows=8, device="cuda", dtype=torch.bfloat16)

Loss = Callable[[Batch], Tensor]


def student(shape: Shape) -> PreTrainedModel:
    """A Llama with random weights, the same at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(shape.device, shape.dtype)


def softlabel(model: PreTrainedModel, table: Table, loss: LossConfig) -> Loss:
    module = Distillation(model, table, loss, None).to(model.device)
    return lambda batch: module(batch)[0]


def plain(model: PreTrainedModel) -> Loss:
    """The loss that the model itself computes, over the same captured tokens."""

    def loss(batch: Batch) -> Tensor:
        labels = torch.full_like(batch.input_ids, -100)
        labels.view(-1)[batch.positions + 1] = batch.next_ids
        total: Tensor = model(**batch.inputs, labels=labels).loss
        return total

    return loss


def liger(model: PreTrainedModel) -> Loss:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)
    return plain(model)


class Stepper:
    """One method: its copy of the student, its optimizer, its loss."""

    def __init__(self, model: PreTrainedModel, loss: Loss) -> None:
        self._loss = loss
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run(self, batch: Batch) -> float:
        """Seconds of a step."""
        device = batch.input_ids.device.type
        start = seconds(device)
        self._loss(batch).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return seconds(device) - start


def steppers(shape: Shape, table: Table) -> dict[str, Stepper]:
    """Every method that can run on this machine, by name."""
    losses = {
        REFERENCE: LossConfig(hard_weight=1.0, soft_weight=0.0),
        FORWARD_KL: LossConfig(),
        "softlabel, both": LossConfig(hard_weight=0.5, soft_weight=0.5),
        "softlabel, reverse KL": LossConfig(divergence="reverse_kl"),
    }
    methods: dict[str, Callable[[PreTrainedModel], Loss]] = {
        name: partial(softlabel, table=table, loss=loss) for name, loss in losses.items()
    }
    methods["transformers, hard labels"] = plain
    if shape.device == "cuda":
        try:
            import liger_kernel  # noqa: F401
        except ImportError:
            print("(liger-kernel is not installed: its step is skipped)")
        else:
            methods["Liger, hard labels"] = liger
    result = {}
    for name, method in methods.items():
        model = student(shape)
        result[name] = Stepper(model, method(model))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = CUDA if torch.cuda.is_available() else CPU
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(Path(folder), 256)
        stream = StreamConfig(max_length=1024, batch_size=shape.rows, micro_batch_size=shape.rows)
        batches = iter(SoftLabelDataset(table, stream, max_steps=arguments.rounds + 1))
        methods = steppers(shape, table)
        rounds = []
        for batch in batches:
            there = batch.to(shape.device)
            rounds.append({name: method.run(there) for name, method in methods.items()})
    rounds = rounds[1:]  # the first one warms up

    print(f"Llama, H {shape.hidden:,}, {shape.layers} layers, V {VOCABULARY:,}, {shape.rows} rows of 1,024 tokens,")
    print(f"{shape.dtype}, {shape.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':<28}{'ms a step':>10}{'/ ' + REFERENCE:>26}{'from':>8}{'to':>8}")
    for name in methods:
        ratios = sorted(times[name] / times[REFERENCE] for times in rounds)
        ratio, milliseconds = statistics.median(ratios), 1000 * statistics.median(times[name] for times in rounds)
        print(f"{name:<28}{milliseconds:>10,.1f}{ratio:>26.3f}{ratios[0]:>8.2f}{ratios[-1]:>8.2f}")
        if name == FORWARD_KL:
            limit = verdict(f"{name}, a step", ratio, "of one on hard labels", at_most=1.05)
    if shape is CUDA:
        print("", limit, sep="\n")


if __name__ == "__main__":
    main()
