"""The inner loops of encoding, compiled by numba for the current CPU: each passes once over the entries of many heads
or tails. Only writers and views need them, so ``storage.numbering`` and ``storage.codec`` import them when they do.
"""

from contextlib import suppress

import numpy as np
from numba import njit


@njit(nogil=True)
def assign(ids, counts, ranks, saved, deciding, clusters):
    """Write the cluster of each position: the first of those in which its first ids save most."""
    total, nothing, end = np.empty(saved.shape[1], np.uint16), saved[-1], 0
    for p in range(len(counts)):
        start, end = end, end + counts[p]
        total[:] = 0
        stop = min(end, start + deciding)
        for i in range(start, stop, 4):  # the sum of four fits into a byte, so that most additions are of bytes
            first = saved[ranks[ids[i]]]
            second = saved[ranks[ids[i + 1]]] if i + 1 < stop else nothing
            third = saved[ranks[ids[i + 2]]] if i + 2 < stop else nothing
            fourth = saved[ranks[ids[i + 3]]] if i + 3 < stop else nothing
            for c in range(len(total)):
                total[c] += np.uint8(first[c] + second[c] + third[c] + fourth[c])
        most = np.uint16(0)
        for c in range(len(total)):
            most = max(most, total[c])
        best = 0
        while total[best] != most:
            best += 1
        clusters[p] = best


@njit(nogil=True)
def number_heads(ids, counts, ranks, clusters, numbers, found):
    """Write the number of each id, given those of all ranks in each cluster."""
    end = 0
    for p in range(len(counts)):
        start, end = end, end + counts[p]
        here = numbers[clusters[p]]
        for i in range(start, end):
            found[i] = here[ranks[ids[i]]]


@njit(nogil=True)
def places_with_entries(ids, counts, ranks, clusters, places, bits, found):
    """Write, for each id, its position, its place in ``bits`` bits and its entry within the position in 15 bits."""
    end = 0
    for p in range(len(counts)):
        start, end = end, end + counts[p]
        here = places[clusters[p]]
        for i in range(start, end):
            found[i] = ((p << bits | here[ranks[ids[i]]]) << 15) | (i - start)


@njit(nogil=True)
def number_gaps(sorted_places, counts, bits, numbers, found, order):
    """Write the number of each gap between the sorted places of a position, and the entry that each place is from."""
    end = 0
    for p in range(len(counts)):
        start, end = end, end + counts[p]
        before = 0
        for i in range(start, end):
            place = (sorted_places[i] >> 15) & ((1 << bits) - 1)
            found[i], order[i] = numbers[place - before], start + (sorted_places[i] & 0x7FFF)
            before = place


@njit(nogil=True)
def head_gaps(logprobs, counts, codes_per_nat, zero_code, gaps):
    """Write the gap of each code of a head from the one before it; -1 is not a number. Return the lowest gap."""
    lowest, end = 0, 0
    for p in range(len(counts)):
        start, end = end, end + counts[p]
        before = 0
        for i in range(start, end):
            steps = (logprobs[start] - logprobs[i]) * codes_per_nat
            if logprobs[i] == logprobs[start] or steps <= 0:
                code = 0
            elif steps >= zero_code:
                code = zero_code
            else:
                code = np.int64(np.rint(steps)) if steps == steps else before - 1
            gaps[i] = code - before
            lowest, before = min(lowest, code - before), code
    return lowest


for _compiled in (assign, number_heads, places_with_entries, number_gaps, head_gaps):
    with suppress(RuntimeError):  # without a writable folder, every process compiles again
        _compiled.enable_caching()
