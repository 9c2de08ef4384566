"""The passes over the vocabulary on a CPU: runs ``scan_kernels`` in torch's own threads."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softlabel.pipeline.selection.scan import BLOCK, Draws, Scan
from softlabel.pipeline.selection.scan_kernels import draw_rows, scan_rows

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PARALLEL = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
"""Starts a parallel region of the OpenMP that torch uses, if that is GCC's or compatible with it.

Its threads stay awake for milliseconds after an operator, waiting for the next one; other threads would have to share
the cores with them.
"""


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
    """Let each of torch's threads take parts of the rows until none are left."""
    threads = torch.get_num_threads()
    size = max(1, -(-count // (4 * threads)))
    parts = iter([slice(start, start + size) for start in range(0, count, size)])
    errors: list[BaseException] = []

    def work_on(_: None) -> None:
        try:
            for part in parts:
                work(part)
        except BaseException as error:  # OpenMP would not propagate it
            errors.append(error)

    if _PARALLEL is not None:
        _PARALLEL(_REGION(work_on), None, threads, 0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            pool.map(work_on, [None] * threads)
    if errors:
        raise errors[0]
