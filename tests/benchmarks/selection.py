"""Measures the time of the selection per position, in comparison with plain torch.

``python -m tests.benchmarks.selection`` prints one table. The logits are random bf16 numbers with an entropy of about 4
nats, in which low ids are more likely, as in a tokenizer. The baseline takes the 64 highest log-probabilities with
plain torch, in chunks of rows that suit it: it has no order among ties, no exact tail and no entropy. Every round runs
all selections one after another. The time is that of the best round. The share is the median of the ratios within each
round, so that a busy machine slows down both sides.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from softlabel.pipeline.config.capture import SelectionConfig
from softlabel.pipeline.selection.select import position_seeds, select
from softlabel.pipeline.selection.selection import Selection

PEER = "topk + log_softmax, k=64"
SELECTIONS = {
    "k=64": SelectionConfig(top_k=64),
    "default": SelectionConfig(),
    "RS-50": SelectionConfig(min_k=0, max_k=0, draws=50),
}


def language(positions: int, vocabulary: int, device: str) -> Tensor:
    """(positions, vocabulary) bf16 logits."""
    logits = torch.empty(positions, vocabulary, dtype=torch.bfloat16, device=device)
    frequencies = -0.8 * torch.arange(1, vocabulary + 1, device=device).log()
    for rows in logits.split(64):
        rows.copy_(15 + frequencies + 2.2 * torch.randn(rows.shape, device=device))
    return logits


def plain(logits: Tensor) -> None:
    """The baseline; its results end in main memory, as ours do."""
    for rows in logits.split(32 if logits.device.type == "cpu" else 1024):
        logprobs = rows.float().log_softmax(1)
        for found in logprobs.topk(64, dim=1):
            found.cpu()


def contestants(logits: Tensor, vocabulary: int) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    positions = torch.arange(len(logits))
    runs: dict[str, Callable[[], object]] = {PEER: lambda: plain(logits)}
    for name, config in SELECTIONS.items():
        selection = Selection.of(config)
        seeds = position_seeds(selection, b"teacher", b"key", positions)
        runs[name] = partial(select, logits, positions, seeds, selection, vocabulary)
    return runs


def seconds(run: Callable[[], object]) -> float:
    """Seconds until the results are in main memory."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    places = [("cpu", 1), ("cpu", 2)] + ([("cuda", 1)] if torch.cuda.is_available() else [])
    print(f"{'selection':<26} {'vocabulary':>10} {'device':>7} {'threads':>7} {'us/position':>11} {'of baseline':>11}")
    for vocabulary in (49_152, 151_936):
        for device, threads in places:
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            runs = contestants(language(arguments.positions, vocabulary, device), vocabulary)
            times = [{name: seconds(run) for name, run in runs.items()} for _ in range(arguments.rounds + 1)][1:]
            for name in runs:
                best = min(round_[name] for round_ in times) / arguments.positions * 1e6
                share = statistics.median(round_[name] / round_[PEER] for round_ in times)
                print(f"{name:<26} {vocabulary:>10,} {device:>7} {threads:>7} {best:>11.1f} {share:>11.2f}")


if __name__ == "__main__":
    main()
