"""``pipeline.scan`` on a CPU: a row at a time, compiled by numba for the machine at hand.

torch's operators write what each pass makes of many rows to memory, for the next to read. One row fits a core's own
cache, and goes through all passes there. Logits are compared as integers: the bits of a float32, turned over where it
is negative, are in the order of the numbers.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from pipeline.scan import BLOCK, Scan

_MINUS_INFINITY = np.int32(-0x800000)
"""The bits of -inf, ..."""
_IMPOSSIBLE = np.int32(-0x7F800001)
"""... and their rank. Only a negative NaN is below."""
_LOWEST = np.int32(-0x80000000)
"""Below every rank, and the bits of -0.0."""
_EXP_0 = np.float32(-88)
"""Where ``_exp`` has come to 0."""
_INTEGERS = np.float32(3 * 2**22 + 127)
"""Added to a small float32, it leaves the nearest integer, plus 127, in the lowest bits: there is no room for more."""
_C0, _C1, _C2, _C3, _C4, _C5 = map(
    np.float32,
    # The polynomial of degree 5 nearest to exp from -ln(2) / 2 to ln(2) / 2: through Chebyshev's nodes, within 2e-7.
    np.polynomial.Chebyshev.interpolate(np.exp, 5, (-np.log(2) / 2, np.log(2) / 2))
    .convert(kind=np.polynomial.Polynomial)
    .coef,
)

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PARALLEL = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
"""Starts a parallel region of the OpenMP that torch's operators use, if that is GCC's or one that speaks its language.

Its threads stay awake for milliseconds after an operator, in wait for the next one: threads beside them would have to
share the cores with them.
"""


def scan(logits: Tensor, singles: int, temperatures: tuple[float, ...]) -> Scan:
    """See ``scan_torch.scan``."""
    R, V = logits.shape
    blocks = -(-V // BLOCK)
    found = Scan(
        maxima=torch.zeros(R),
        values=torch.full((R, singles + 1), -torch.inf, dtype=torch.float64),
        ids=torch.zeros((R, singles + 1), dtype=torch.int64),
        rests=torch.zeros((R, len(temperatures)), dtype=torch.float64),
        rest_means=torch.zeros(R, dtype=torch.float64),
        block_bounds=torch.empty((R, blocks), dtype=torch.float64),
    )
    bits, stride, shift = _bits(logits)

    def work(rows: slice) -> None:
        results = [values[rows].numpy() for values in found]
        _scan_rows(bits[rows.start * stride :], stride, V, shift, np.array(temperatures), *results)

    _on_all_cores(work, R)
    return found


def draw_in_blocks(logits: Tensor, scan: Scan, rows: Tensor, blocks: Tensor, uniforms: Tensor) -> Tensor:
    """See ``scan_torch.draw_in_blocks``."""
    ids = torch.empty_like(blocks)
    peaks, peak_ids = scan.values[:, -1].float().numpy(), scan.ids[:, -1].numpy()
    bits, stride, shift = _bits(logits)

    def work(draws: slice) -> None:
        each = [values[draws].numpy() for values in (rows, blocks, uniforms, ids)]
        _draw_in_blocks(bits, stride, logits.shape[1], shift, peaks, peak_ids, *each)

    _on_all_cores(work, len(ids))
    return ids


def _bits(logits: Tensor) -> tuple[np.ndarray[Any, Any], int, np.int32]:
    """The logits as integers, with how far apart the rows start and what shift makes float32's bits of a number."""
    if logits.dtype != torch.bfloat16:
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    wide, stride = logits.dtype == torch.float32, logits.stride(0)
    size = (len(logits) - 1) * stride + logits.shape[1] if len(logits) else 0
    flat = logits.as_strided((size,), (1,))
    return flat.view(torch.int32 if wide else torch.int16).numpy(), stride, np.int32(0 if wide else 16)


def _on_all_cores(work: Callable[[slice], None], count: int) -> None:
    """Let each of torch's threads work on parts until none is left."""
    threads = torch.get_num_threads()
    size = max(1, -(-count // (4 * threads)))
    parts = iter([slice(start, start + size) for start in range(0, count, size)])
    errors: list[BaseException] = []

    def work_on(_: None) -> None:
        try:
            for part in parts:
                work(part)
        except BaseException as error:  # nothing above would pass it on
            errors.append(error)

    if _PARALLEL is not None:
        _PARALLEL(_REGION(work_on), None, threads, 0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            pool.map(work_on, [None] * threads)
    if errors:
        raise errors[0]


@njit(nogil=True, error_model="numpy")
def _scan_rows(logits, stride, V, shift, temperatures, maxima, values, ids, rests, rest_means, block_bounds):
    """The fields of ``Scan`` for rows that start at every ``stride``-th number."""
    bits = np.empty(block_bounds.shape[1] * BLOCK, np.int32)
    scores = bits.view(np.float32)
    tops = np.empty(block_bounds.shape[1], np.int32)
    keys = np.empty(ids.shape[1], np.int64)
    for r in range(len(maxima)):
        _widen(logits[r * stride : r * stride + V], shift, bits)
        maxima[r] = _highest_of_blocks(bits, tops)
        if not np.isfinite(maxima[r]):
            continue
        count = _highest(bits, tops, keys)
        for i in range(count):
            ids[r, i] = 0xFFFFFFFF - (keys[i] & 0xFFFFFFFF)
            values[r, i] = scores[ids[r, i]]
        for i in range(min(count, len(keys) - 1)):
            bits[ids[r, i]] = _MINUS_INFINITY
        peak = np.float32(values[r, -1] if count == len(keys) else 0.0)  # without a rest, any number will do
        for t in range(len(temperatures) - 1, -1, -1):  # 1 comes last: its sums are kept
            total, product = _sums(scores, peak, np.float32(1 / temperatures[t]), block_bounds[r])
            rests[r, t] = peak / temperatures[t] + np.log(total)
        if total > 0:
            rest_means[r] = peak + product / total


@njit
def _widen(logits, shift, bits):
    """A row's logits as the bits of float32, with 0.0 for -0.0, and with -inf to the end of the last block."""
    for j in range(len(logits)):
        wide = np.int32(np.int32(logits[j]) << shift)
        bits[j] = np.int32(0) if wide == _LOWEST else wide
    bits[len(logits) :] = _MINUS_INFINITY


@njit
def _highest_of_blocks(bits, tops):
    """The row's highest logit, NaN if it has one; ``tops`` gets the ranks of the blocks' highest."""
    bottom = np.int32(0)
    for b in range(len(tops)):
        top = _LOWEST
        for j in range(b * BLOCK, (b + 1) * BLOCK):
            top = max(top, _rank(bits[j]))
            bottom = min(bottom, _rank(bits[j]))
        tops[b] = top
    return np.float32(np.nan) if bottom < _IMPOSSIBLE else _as_float(_rank(tops.max()))


@njit
def _highest(bits, tops, keys):
    """Fill ``keys`` with rank << 32 | (2^32 - 1 - id) of the highest ids, descending; returns how many there are.

    Their ranks reach the len(keys)-th highest block maximum: only blocks that reach it are looked through.
    """
    count, bound = 0, np.int64(_IMPOSSIBLE) + 1
    for b in range(len(tops)):
        count = _insert(keys, count, np.int64(tops[b]))
    if count == len(keys):
        bound = max(bound, keys[-1])
    count = 0
    for b in range(len(tops)):
        if tops[b] >= bound:
            for j in range(b * BLOCK, (b + 1) * BLOCK):
                rank = np.int64(_rank(bits[j]))
                if rank >= bound:
                    count = _insert(keys, count, (rank << 32) | (0xFFFFFFFF - j))
    return count


@njit
def _insert(keys, count, new):
    """Keep the highest keys, descending, ``count`` of them so far; returns how many there are."""
    if count == len(keys):
        if new <= keys[count - 1]:
            return count
        count -= 1
    place = count
    while place > 0 and keys[place - 1] < new:
        keys[place] = keys[place - 1]
        place -= 1
    keys[place] = new
    return count + 1


@njit(fastmath={"reassoc", "nsz", "contract"})
def _sums(scores, peak, scale, block_bounds):
    """Of a row, with x = (score - peak) * scale, the sum of exp(x), kept at the end of each block, and of x exp(x)."""
    total, product = 0.0, 0.0
    for b in range(len(block_bounds)):
        block_sum, block_product = np.float32(0), np.float32(0)
        for j in range(b * BLOCK, (b + 1) * BLOCK):
            x = max((scores[j] - peak) * scale, _EXP_0)
            weight = _exp(x)
            block_sum += weight
            block_product += weight * x
        total += block_sum
        block_bounds[b] = total
        product += block_product
    return total, product


@njit(nogil=True)
def _draw_in_blocks(logits, stride, V, shift, peaks, peak_ids, rows, blocks, uniforms, ids):
    """An id for each of N draws, out of the block of a row."""
    weights, bounds = np.zeros(BLOCK, np.float32), np.empty(BLOCK)
    for n in range(len(ids)):
        start, peak, first = blocks[n] * BLOCK, peaks[rows[n]], peak_ids[rows[n]] - blocks[n] * BLOCK
        scores = logits[rows[n] * stride + start : rows[n] * stride + min(V, start + BLOCK)]
        for j in range(len(scores)):
            x = _as_float(np.int32(np.int32(scores[j]) << shift)) - peak
            weights[j] = _exp(max(x, _EXP_0)) if (x < 0) | ((x == 0) & (j >= first)) else np.float32(0)
        total = 0.0
        for j in range(len(scores)):
            total += weights[j]
            bounds[j] = total
        j = 0
        while j < len(scores) - 1 and bounds[j] <= uniforms[n] * total:
            j += 1
        ids[n] = start + j


@njit(fastmath={"contract"})
def _exp(x):
    """exp(x) of a float32 from -88, where it is 0, to 0: 2^n times a polynomial in what n ln(2) leaves of x.

    Within 5e-7 of it.
    """
    shifted = x * np.float32(1 / np.log(2)) + _INTEGERS
    r = x - (shifted - _INTEGERS) * np.float32(np.log(2))
    p = ((((_C5 * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
    return p * _as_float(np.int32(_as_bits(shifted) << np.int32(23)))


@njit
def _rank(bits):
    """int32 in the order of the float32 with these bits; the same function leads back."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@intrinsic
def _as_float(_, bits):
    """The float32 with these bits."""
    return types.float32(types.int32), lambda _c, builder, _s, values: builder.bitcast(values[0], ir.FloatType())


@intrinsic
def _as_bits(_, value):
    """The bits of a float32."""
    return types.int32(types.float32), lambda _c, builder, _s, values: builder.bitcast(values[0], ir.IntType(32))


for compiled in (_scan_rows, _draw_in_blocks):
    with suppress(RuntimeError):  # where no folder can be written to, every process compiles anew, for two seconds
        compiled.enable_caching()
