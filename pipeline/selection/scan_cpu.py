"""The passes over the vocabulary on a CPU: runs ``scan_kernels`` on all cores.

In threads of its own. torch's OpenMP threads could run it, too, since they stay awake for a moment after an operator,
but on two cores of a busy AMD EPYC that saved 1 to 3 ms (best rounds of 64 and of 256 positions of SmolLM2; nothing at
the 682 of a whole chunk), and the forward pass of such a chunk took 2.5 s. numba's threads took as long as OpenMP's.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softlabel.pipeline.selection.scan import BLOCK, Draws, Scan
from softlabel.pipeline.selection.scan_kernels import draw_rows, scan_rows


def scan(logits: Tensor, singles: int, temperatures: tuple[float, ...]) -> Scan:
    """See ``scan_torch.scan``."""
    R, V = logits.shape
    found = Scan(
        maxima=torch.zeros(R),
        values=torch.full((R, singles + 1), -torch.inf, dtype=torch.float64),
        ids=torch.zeros((R, singles + 1), dtype=torch.int64),
        rests=torch.zeros((R, len(temperatures)), dtype=torch.float64),
        rest_means=torch.zeros(R, dtype=torch.float64),
        block_bounds=torch.empty((R, -(-V // BLOCK)), dtype=torch.float64),
    )
    bits, stride = _bits(logits)
    results = [values.numpy() for values in found]

    def work(rows: slice) -> None:
        of_rows = (values[rows] for values in results)
        scan_rows(bits[rows.start * stride :], stride, V, np.array(temperatures), *of_rows)

    _on_all_cores(work, R)
    return found


def draw(logits: Tensor, scan: Scan, outside: Tensor, counts: Tensor, uniforms: Tensor) -> Draws:
    """See ``scan_torch.draw``."""
    (R, V), D = logits.shape, uniforms.shape[1]
    distinct = torch.zeros(R, dtype=torch.int64)
    found = [torch.zeros((R, D), dtype=kind) for kind in (torch.int64, torch.int64, torch.float64)]
    bits, stride = _bits(logits)
    given = (scan.values, scan.ids, scan.block_bounds, outside, counts, uniforms)
    arrays = [values.numpy() for values in (*given, distinct, *found)]

    def work(rows: slice) -> None:
        draw_rows(bits[rows.start * stride :], stride, V, *(values[rows] for values in arrays))

    _on_all_cores(work, R)
    used = torch.arange(D) < distinct[:, None]
    return Draws(distinct, *(values[used] for values in found))


def _bits(logits: Tensor) -> tuple[np.ndarray[Any, Any], int]:
    """The bits of the logits as integers, and the distance between the starts of rows."""
    if logits.dtype != torch.bfloat16:
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    wide, stride = logits.dtype == torch.float32, logits.stride(0)
    size = (len(logits) - 1) * stride + logits.shape[1] if len(logits) else 0
    flat = logits.as_strided((size,), (1,))
    return flat.view(torch.int32 if wide else torch.int16).numpy(), stride


def _on_all_cores(work: Callable[[slice], None], count: int) -> None:
    """Share the rows out to as many threads as torch uses, in parts of which each thread takes several."""
    threads = torch.get_num_threads()
    size = max(1, -(-count // (4 * threads)))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, (slice(start, start + size) for start in range(0, count, size))):
            pass  # raises what the part raised
