"""Compares memory and time of the loss (forward and backward, with the head's matrix products) with alternatives.

``python -m tests.benchmarks.loss`` prints one table, and checks the limits. Every round runs all methods, in
alternating order. A ratio is the median of the ratios within each round, so that a busy machine slows down both sides.
On a CPU, times are CPU times, on one thread by default; with more threads, their waiting for each other counts. Peak
memory is measured by torch on a GPU, and on a CPU in a separate process for each method, as the rise of resident memory
during the forward and backward pass. The dense teacher's probabilities, which are twice as large as everything else
that dense KL reads, do not count.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.fused import distillation_loss
from softlabel.pipeline.loss.targets import SparseTargets
from tests import memory
from tests.figures import seconds, verdict

REFERENCE, FORWARD_KL = "cross-entropy", "softlabel, forward KL"


@dataclass(frozen=True)
class Shape:
    """Size of the problem."""

    positions: int
    hidden: int
    vocabulary: int
    device: str
    dtype: torch.dtype
    k: int = 64


CPU = Shape(2048, 512, 65_536, "cpu", torch.float32)
CUDA = Shape(8192, 4096, 128_256, "cuda", torch.bfloat16)


class Problem:
    """Random hidden states and head of a student, and a random distribution of a teacher."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.shape = shape
        options: dict[str, Any] = {"device": shape.device, "dtype": shape.dtype}
        self.hidden = torch.randn(shape.positions, shape.hidden, **options).requires_grad_()
        self.weight = torch.randn(shape.vocabulary, shape.hidden, **options).mul_(0.05).requires_grad_()
        self.next_ids = torch.randint(shape.vocabulary, (shape.positions,), device=shape.device)

    def targets(self) -> SparseTargets:
        """k ids with 0.9 of the mass, and a bucket for the rest."""
        shape, device = self.shape, self.shape.device
        stride = shape.vocabulary // shape.k
        first = torch.randint(stride, (shape.positions, shape.k), device=device)
        ids = first + stride * torch.arange(shape.k, device=device)
        logprobs = torch.randn(ids.shape, device=device).log_softmax(1) + torch.tensor(0.9).log()
        log_rest = torch.full((shape.positions,), 0.1, device=device).log()
        return SparseTargets(ids, logprobs, log_rest, torch.zeros_like(log_rest), "bucket")

    def probabilities(self) -> Tensor:
        """A teacher's dense distribution, normalized in place."""
        p = torch.rand(self.shape.positions, self.shape.vocabulary, device=self.shape.device, dtype=self.shape.dtype)
        return p.div_(p.sum(1, keepdim=True))


Step = Callable[[], Tensor]


def softlabel(problem: Problem, config: LossConfig, soft_cap: float | None = None) -> Step:
    targets, parts = problem.targets(), (problem.hidden, problem.weight, problem.next_ids)
    return lambda: distillation_loss(*parts, targets, config, soft_cap=soft_cap).total


def forward_kl(problem: Problem) -> Step:
    return softlabel(problem, LossConfig(hard_weight=0.5, soft_weight=0.5))


def softened(problem: Problem) -> Step:
    return softlabel(problem, LossConfig(hard_weight=0.5, soft_weight=0.5, temperature=2.0))


def capped(problem: Problem) -> Step:
    return softlabel(problem, LossConfig(hard_weight=0.5, soft_weight=0.5), soft_cap=30.0)


def jsd(problem: Problem) -> Step:
    return softlabel(problem, LossConfig(divergence="jsd", hard_weight=0.5, soft_weight=0.5))


def hard_labels(problem: Problem) -> Step:
    return softlabel(problem, LossConfig(hard_weight=1.0, soft_weight=0.0))


def cross_entropy(problem: Problem) -> Step:
    return lambda: F.cross_entropy(problem.hidden @ problem.weight.t(), problem.next_ids)


def dense_kl(problem: Problem) -> Step:
    p = problem.probabilities()

    def step() -> Tensor:
        log_q = (problem.hidden @ problem.weight.t()).log_softmax(1)
        return 0.5 * F.nll_loss(log_q, problem.next_ids) + 0.5 * F.kl_div(log_q, p, reduction="batchmean")

    return step


def liger_jsd(problem: Problem) -> Step:
    """Liger's chunked JSD needs the teacher's head; here it is as large as the student's."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5)
    teacher = problem.hidden.detach().clone(), problem.weight.detach().clone()
    return lambda: loss(problem.hidden, problem.weight, *teacher, problem.next_ids, None, None)


METHODS: dict[str, Callable[[Problem], Step]] = {
    REFERENCE: cross_entropy,
    "dense KL": dense_kl,
    FORWARD_KL: forward_kl,
    "  at temperature 2": softened,
    "  soft-capped": capped,
    "softlabel, JSD": jsd,
    "softlabel, hard labels": hard_labels,
    "Liger, JSD": liger_jsd,
}


def run(problem: Problem, step: Step) -> float:
    """Seconds of forward and backward."""
    problem.hidden.grad = problem.weight.grad = None
    start = seconds(problem.shape.device)
    step().backward()
    return seconds(problem.shape.device) - start


def peak(name: str, shape: Shape) -> int:
    """Peak bytes during forward and backward, above those before."""
    if shape.device == "cuda":
        problem = Problem(shape)
        step = METHODS[name](problem)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(problem, step)
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, "-m", "tests.benchmarks.loss", "--peak-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident_peak(name: str) -> int:
    """Peak of this process's resident memory during forward and backward, above its size before."""
    small = Problem(Shape(16, 16, 128, "cpu", torch.float32, k=8))
    run(small, METHODS[name](small))
    problem = Problem(CPU)
    step = METHODS[name](problem)
    before = memory.resident()
    run(problem, step)
    return memory.peak() - before


def limits(peaks: dict[str, int], times: dict[str, float], ratio: float, shape: Shape) -> list[str]:
    """The limits for one H200 or any CPU; ``ratio`` is forward KL's time relative to plain cross-entropy's."""
    if shape.device == "cuda":
        return [
            verdict(f"{FORWARD_KL}, time", 1000 * times[FORWARD_KL], "ms", at_most=42),
            verdict(f"{FORWARD_KL}, peak", peaks[FORWARD_KL] / 1e9, "GB", at_most=6),
        ]
    ours = [FORWARD_KL, "  at temperature 2", "  soft-capped"]
    memories = [
        verdict(f"{name.strip()}, dense KL's peak", peaks["dense KL"] / peaks[name], "times its own", at_least=12)
        for name in ours
    ]
    return [*memories, verdict(f"{FORWARD_KL}, time", ratio, f"of {REFERENCE}'s", at_most=1.15)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(resident_peak(arguments.peak_of))
        return

    torch.set_num_threads(arguments.threads)
    shape = CUDA if torch.cuda.is_available() else CPU
    names = list(METHODS)
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        names.remove("Liger, JSD")
        print("(liger-kernel is not installed: its loss is skipped)")
    peaks = {name: peak(name, shape) for name in names}
    problem = Problem(shape)
    steps = {name: METHODS[name](problem) for name in names}
    for step in steps.values():
        run(problem, step)
    rounds = [
        {name: run(problem, steps[name]) for name in (names if number % 2 else reversed(names))}
        for number in range(arguments.rounds)
    ]
    times = {name: statistics.median(one[name] for one in rounds) for name in names}
    ratios = {name: sorted(one[name] / one[REFERENCE] for one in rounds) for name in names}

    print(f"{shape.positions:,} positions, H {shape.hidden:,}, V {shape.vocabulary:,}, k {shape.k}, {shape.dtype},")
    print(f"{shape.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds")
    print(f"{'':<24}{'peak MB':>10}{'dense KL /':>12}{'ms':>10}{'/ ' + REFERENCE:>18}{'from':>8}{'to':>8}")
    for name in names:
        print(
            f"{name:<24}{peaks[name] / 1e6:>10,.0f}{peaks['dense KL'] / peaks[name]:>12.1f}{1000 * times[name]:>10,.1f}"
            f"{statistics.median(ratios[name]):>18.2f}{ratios[name][0]:>8.2f}{ratios[name][-1]:>8.2f}"
        )
    print("", *limits(peaks, times, statistics.median(ratios[FORWARD_KL]), shape), sep="\n")


if __name__ == "__main__":
    main()
