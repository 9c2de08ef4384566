"""The kernels of ``scan_cpu``, compiled by numba for the current CPU; they process one row at a time.

torch's operators write their results for many rows to memory, and the next operator reads them again. Here, one row
stays in a core's cache while the next one is prefetched. Logits are given as the bits of bfloat16 or float32. Loops
over them use unsigned indices, since numba checks whether a signed index counts from the end.
"""

from contextlib import suppress

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from softlabel.pipeline.selection.scan import BELOW_1, BLOCK, LEAST

_MINUS_INFINITY = np.int32(-0x800000)
"""The bits of -inf."""
_EXP_0 = np.float32(-88)
"""Where ``_exp`` reaches 0."""
_INTEGERS = np.float32(3 * 2**22 + 127)
"""Added to a small float32, it leaves the nearest integer plus 127 in the lowest bits of the sum."""
_NEAREST = np.polynomial.Chebyshev.interpolate(np.exp, 5, (-np.log(2) / 2, np.log(2) / 2))
_C0, _C1, _C2, _C3, _C4, _C5 = _NEAREST.convert(kind=np.polynomial.Polynomial).coef.astype(np.float32)
"""Polynomial of degree 5 for exp from -ln(2) / 2 to ln(2) / 2, interpolated at Chebyshev nodes; error below 2e-7."""


@njit(nogil=True, error_model="numpy")
def scan_rows(logits, stride, V, temperatures, maxima, values, ids, rests, rest_means, block_bounds):
    """Compute the fields of ``Scan`` for rows whose starts are ``stride`` numbers apart."""
    S, blocks = ids.shape[1] - 1, block_bounds.shape[1]
    tops, products, keys = np.empty(blocks, np.int32), np.empty(blocks), np.empty(S + 1, np.int64)
    parts, places = np.empty(min(S + 1, blocks) * BLOCK, np.int32), np.empty(S + 1, np.int64)
    for r in range(len(maxima)):
        row, after = logits[r * stride : r * stride + V], logits[(r + 1) * stride : (r + 1) * stride + V]
        maxima[r] = _highest_of_blocks(row, tops)
        if not np.isfinite(maxima[r]):
            continue
        count = _highest(row, tops, keys)
        for i in range(count):
            values[r, i], ids[r, i] = _from_key(keys[i])
        cut = _cut_out(row, ids[r, : min(S, count)], parts, places)
        peak = np.float32(values[r, S] if count > S else 0.0)  # without a rest, any number works
        for t in range(len(temperatures) - 1, -1, -1):  # 1 comes last: its sums are kept
            scale = np.float32(1 / temperatures[t])
            _block_sums(row, parts, places[:cut], peak, scale, block_bounds[r], products, after)
            total, product = 0.0, 0.0
            for b in range(blocks):
                total += block_bounds[r, b]
                block_bounds[r, b] = total
                product += products[b]
            rests[r, t] = peak / temperatures[t] + np.log(total)
        if total > 0:
            rest_means[r] = peak + product / total


@njit
def _highest_of_blocks(row, tops):
    """The row's highest logit (see ``Scan.maxima``); ``tops`` gets the ranks of the blocks' highest logits."""
    largest = row.dtype.type(0)
    for b in range(len(tops)):
        if (b + 1) * BLOCK <= len(row):
            top, size = _extremes(row, b * BLOCK, BLOCK)  # a length known at compile time
        else:
            top, size = _extremes(row, b * BLOCK, len(row) % BLOCK)
        tops[b] = _rank(top)
        largest = max(largest, size)
    highest = np.float32(np.nan) if np.isnan(_as_float(largest)) else _from_rank(tops.max())
    return np.float32(-np.inf) if highest < LEAST else highest


@njit
def _extremes(row, start, size):
    """The bits of the highest of some logits, and the largest bits without the sign.

    As integers, the bits of positive numbers are in the order of the numbers, those of negative ones in reverse order.
    """
    top = bottom = row[start]
    largest = row.dtype.type(0)
    for j in range(size):
        bits = row[np.uint64(start + j)]
        top, bottom, largest = max(top, bits), min(bottom, bits), max(largest, _unsigned(bits))
    return top if top >= 0 else bottom, largest


@njit
def _highest(row, tops, keys):
    """Fill ``keys`` with the keys of the highest ids, descending; returns their number.

    These ids are at least as high as the len(keys)-th highest block maximum, so other blocks are skipped.
    """
    blocks, count, bound = 0, 0, np.float32(LEAST)
    for top in tops:
        blocks = _insert(keys, blocks, np.int64(top))
    if blocks == len(keys):
        bound = max(bound, _from_rank(np.int32(keys[-1])))
    for b in range(len(tops)):
        if _from_rank(tops[b]) >= bound:
            for j in range(b * BLOCK, min(len(row), (b + 1) * BLOCK)):
                if _as_float(row[np.uint64(j)]) >= bound:
                    count = _insert(keys, count, _key(row, j))
    return count


@njit
def _insert(keys, count, new):
    """Insert a key into the ``count`` highest keys so far, in descending order; returns their new number."""
    place = min(count, len(keys) - 1)
    if count > place and new <= keys[place]:
        return count
    while place > 0 and keys[place - 1] < new:
        keys[place] = keys[place - 1]
        place -= 1
    keys[place] = new
    return min(count + 1, len(keys))


@njit
def _cut_out(row, ids, parts, places):
    """Copy the last block (padded) and the blocks with these ids to ``parts``, with -inf in place of the ids.

    Returns the number of copied blocks; ``places`` gets their indices.
    """
    count = 0
    for i in range(-1, len(ids)):
        b, slot = (len(row) - 1 if i < 0 else ids[i]) // BLOCK, 0
        while slot < count and places[slot] != b:
            slot += 1
        if slot == count:
            places[slot], count = b, count + 1
            for j in range(BLOCK):
                inside = b * BLOCK + j < len(row)
                parts[slot * BLOCK + j] = _as_bits(_as_float(row[b * BLOCK + j])) if inside else _MINUS_INFINITY
        if i >= 0:
            parts[slot * BLOCK + ids[i] % BLOCK] = _MINUS_INFINITY
    return count


@njit(fastmath={"reassoc", "nsz", "contract"})
def _block_sums(row, parts, places, peak, scale, sums, products, after):
    """The sums of exp(x) and of x exp(x) in each block, with x = (logit - peak) * scale.

    The logits of the blocks in ``places`` are taken from ``parts``. Meanwhile, the next row is prefetched.
    """
    for b in range(len(row) // BLOCK):
        _fetch(after, b)
        sums[b], products[b] = _sums(row, b * BLOCK, peak, scale)
    for i in range(len(places)):
        sums[places[i]], products[places[i]] = _sums(parts, i * BLOCK, peak, scale)


@njit(inline="always")  # a call per block would take a tenth of the time
def _sums(row, start, peak, scale):
    """The sums of exp(x) and of x exp(x) in a block."""
    total, product = np.float32(0), np.float32(0)
    for j in range(BLOCK):
        x = max((_as_float(row[np.uint64(start + j)]) - peak) * scale, _EXP_0)
        weight = _exp(x)
        total += weight
        product += weight * x
    return total, product


@njit(nogil=True, error_model="numpy")
def draw_rows(logits, stride, V, values, ids, bounds, outside, wanted, uniforms, distinct, found, draws, scores):
    """Compute the fields of ``Draws``, at the start of each row, for rows whose starts are ``stride`` numbers apart."""
    S, D = outside.shape[1], uniforms.shape[1]
    singles, chosen, keys = np.empty(S), np.empty(D, np.int64), np.empty(D, np.int64)
    weights = np.empty(BLOCK, np.float32)
    for r in range(len(wanted)):
        row, peak, total, count = logits[r * stride : r * stride + V], values[r, S], 0.0, min(D, wanted[r])
        highest = max(peak, outside[r].max())
        for i in range(S):
            total += np.exp(outside[r, i] - highest)
            singles[i] = total
        rest = np.exp(peak - highest) * bounds[r, -1]
        for d in range(count):
            target = uniforms[r, d, 0] * (total + rest)
            if target < total:
                chosen[d] = ids[r, np.searchsorted(singles, target, side="right")]
            else:
                share = min((target - total) / rest, BELOW_1) * bounds[r, -1]
                chosen[d] = ~np.searchsorted(bounds[r], share, side="right")  # a block, from which an id ...
                _fetch(row, ~chosen[d])  # ... is drawn below, when it has arrived in the cache
        for d in range(count):
            if chosen[d] < 0:
                start = ~chosen[d] * BLOCK
                chosen[d] = _draw_in_block(row, np.float32(peak), ids[r, S], start, uniforms[r, d, 1], weights)
            keys[d] = -_key(row, chosen[d])  # to be sorted descending
        keys[:count].sort()
        for d in range(count):
            if d == 0 or keys[d] != keys[d - 1]:
                scores[r, distinct[r]], found[r, distinct[r]] = _from_key(-keys[d])
                distinct[r] += 1
            draws[r, distinct[r] - 1] += 1


@njit(fastmath={"reassoc", "nsz", "contract"})
def _draw_in_block(row, peak, peak_id, start, uniform, weights):
    """Draw an id of the rest from the block that starts at ``start``; ``weights`` is a buffer."""
    size, first, total, chosen = min(BLOCK, len(row) - start), peak_id - start, 0.0, 0
    for j in range(size):
        x = _as_float(row[np.uint64(start + j)]) - peak
        weights[j] = _exp(max(x, _EXP_0)) if (x < 0) | ((x == 0) & (j >= first)) else np.float32(0)
        total += weights[j]
    left = uniform * total
    for j in range(size):
        if weights[j] > 0:  # rounding may leave something after the last possible id
            left -= weights[j]
            chosen = j
            if left < 0:
                break
    return start + chosen


@njit(fastmath={"contract"})
def _exp(x):
    """exp(x) for x from -88 (where it is 0) to 0: 2^n times a polynomial in x - n ln(2).

    From -87 on, the relative error is at most 5e-7, or 5e-6 on a CPU without fused multiply-add.
    """
    shifted = x * np.float32(1 / np.log(2)) + _INTEGERS
    r = x - (shifted - _INTEGERS) * np.float32(np.log(2))
    p = ((((_C5 * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
    return p * _as_float(np.int32(_as_bits(shifted) << np.int32(23)))


@njit
def _rank(bits):
    """int32 in the order of the logits: the bits of float32, inverted for negative numbers."""
    wide = _as_bits(_as_float(bits) + np.float32(0))  # because -0.0 equals 0.0
    return np.int32(wide ^ ((wide >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@njit
def _from_rank(rank):
    """The float32 with this rank."""
    return _as_float(np.int32(rank ^ ((rank >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@njit
def _key(row, id):
    """rank << 32 | (2^32 - 1 - id): ordered by logit, and for equal logits the lower id is higher."""
    return (np.int64(_rank(row[id])) << 32) | (0xFFFFFFFF - id)


@njit
def _from_key(key):
    """The logit and the id of a key."""
    return _from_rank(np.int32(key >> 32)), 0xFFFFFFFF - (key & 0xFFFFFFFF)


@intrinsic
def _as_float(_, bits):
    """The number with these bits: float32 for int32, bfloat16 for int16."""

    def generate(_context, builder, _signature, values):
        wide = builder.zext(values[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, wide.type(32 - bits.bitwidth)), ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _as_bits(_, value):
    """The bits of a float32."""
    return types.int32(types.float32), lambda _c, builder, _s, values: builder.bitcast(values[0], ir.IntType(32))


@intrinsic
def _unsigned(_, bits):
    """The bits of a number without the sign bit."""
    mask = 2 ** (bits.bitwidth - 1) - 1
    return bits(bits), lambda _c, builder, _s, values: builder.and_(values[0], values[0].type(mask))


@intrinsic
def _fetch(_, row, block):
    """Prefetch a block of a row into the cache, in lines of 64 bytes."""

    def generate(context, builder, signature, values):
        array, int32 = make_array(signature.args[0])(context, builder, values[0]), cgutils.int32_t
        first = builder.mul(values[1], values[1].type(BLOCK))
        start = builder.bitcast(builder.gep(array.data, [first]), cgutils.voidptr_t)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, int32, int32, int32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, second_cache, data = int32(0), int32(2), int32(1)
        for line in range(0, BLOCK * row.dtype.bitwidth // 8, 64):
            builder.call(prefetch, [builder.gep(start, [int32(line)]), read, second_cache, data])
        return context.get_dummy_value()

    return types.void(row, types.int64), generate


for _compiled in (scan_rows, draw_rows):
    with suppress(RuntimeError):  # without a writable folder, every process compiles again, for five seconds
        _compiled.enable_caching()
