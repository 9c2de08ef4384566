"""What the benchmarks of training share: a clock that a busy machine does not change, and limits beside figures."""

import time

import torch


def seconds(device: str) -> float:
    """The time: on a CPU what this process has used of it, all threads added up; on a GPU when its work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def verdict(what: str, found: float, unit: str, *, at_most: float | None = None, at_least: float | None = None) -> str:
    """A figure, its one limit, and whether it holds."""
    if at_most is not None:
        limit, holds = f"at most {at_most:,g}", found <= at_most
    else:
        assert at_least is not None
        limit, holds = f"at least {at_least:,g}", found >= at_least
    places = 0 if found >= 1000 else 3
    return f"{what}: {found:,.{places}f} {unit}, {limit}: {'holds' if holds else 'DOES NOT HOLD'}"
