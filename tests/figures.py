"""Shared by the training benchmarks: a clock that other load does not change, and figures with their limits."""

import time

import torch


def seconds(device: str) -> float:
    """The time: on a CPU, the CPU time of all threads of this process; on a GPU, wall time after its work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def verdict(what: str, found: float, unit: str, *, at_most: float | None = None, at_least: float | None = None) -> str:
    """Describe a figure, its single limit, and whether the limit holds."""
    if at_most is not None:
        limit, holds = f"at most {at_most:,g}", found <= at_most
    else:
        assert at_least is not None
        limit, holds = f"at least {at_least:,g}", found >= at_least
    places = 0 if found >= 1000 else 3
    return f"{what}: {found:,.{places}f} {unit}, {limit}: {'holds' if holds else 'DOES NOT HOLD'}"
