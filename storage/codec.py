"""Encodes soft labels into the columns of a shard, and decodes them.

Encoding renumbers token ids by frequency, rounds log-probabilities to multiples of 1/64 nat, stores these as
differences from the previous id, and clears the noisy low bits of floats. The resulting small integers compress close
to their entropy. Decoding is vectorized and needs only the table's vocabulary. FORMAT.md is the specification.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.storage.schema import SOFT_LABELS

CODES_PER_NAT = 64
"""Resolution of the log-probabilities. The logits of a bf16 teacher are coarser."""
ZERO_CODE = 32767
"""The code of probability 0, and of every probability below exp(-511)."""
ENTROPY_CODES_PER_NAT = 256
_LARGEST_COUNT = 32767
_MASS_QUANTUM = 2.0**-17
_NEXT_QUANTUM = 2.0**-10

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SoftLabels:
    """A teacher's soft labels at P positions, as flat arrays: position after position, with a count for each.

    Log-probabilities are in nats, at temperature 1, over the teacher's vocabulary without padding. The ids of a
    position are ordered by (logit descending, id ascending), head before tail.
    """

    head_counts: Ints
    """(P,) number of ids in the head, whose probabilities are stored."""
    head_ids: Ints
    """(sum of head_counts,)"""
    head_logprobs: Floats
    """(sum of head_counts,)"""
    tail_counts: Ints
    """(P,) number of distinct ids that were drawn from outside the head."""
    tail_ids: Ints
    """(sum of tail_counts,)"""
    tail_draws: Ints
    """(sum of tail_counts,) how often each was drawn."""
    tail_logprobs: Floats
    """(sum of tail_counts,)"""
    tail_log_masses: Floats
    """(T, P) log of the mass outside the head at each stored temperature; -inf if the head has all of it."""
    entropies: Floats
    """(P,) entropy of the whole distribution, in nats."""
    next_logprobs: Floats
    """(P,) log-probability of the token that follows in the document."""

    @property
    def positions(self) -> int:
        """P."""
        return len(self.head_counts)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Join soft labels. All parts with positions must have the same temperatures."""
        parts = [part for part in parts if part.positions] or parts[:1]
        joined = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts], axis=-1) for field in fields(cls)
        }
        return cls(**joined)


def encode(labels: SoftLabels, positions: NDArray[np.int64], ranks: Ints) -> pa.Table:
    """Encode soft labels into the columns of R rows.

    Args:
        labels: soft labels of all rows' positions, in order.
        positions: (R,) captured positions of each row, summing to ``labels.positions``.
        ranks: (V,) rank of each token id, the inverse of the table's vocabulary.
    """
    assert positions.sum() == labels.positions, "every row's positions have soft labels, and nothing else does"
    for counts in (labels.head_counts, labels.tail_counts, labels.tail_draws):
        assert counts.max(initial=0) <= _LARGEST_COUNT, f"an int16 would wrap beyond {_LARGEST_COUNT}"
    head_codes, tail_codes = _codes(labels.head_logprobs), _codes(labels.tail_logprobs)
    head_starts, tail_starts = _starts(labels.head_counts), _starts(labels.tail_counts)
    # The tail continues where the head ends: its first gap is from the head's last code (0 if there is no head).
    last = np.zeros(labels.positions, np.int32)
    filled = labels.head_counts > 0
    last[filled] = head_codes[(head_starts + labels.head_counts - 1)[filled]]
    # Normalizing a decoded head may have moved it past a tail id with the same code.
    highest = np.repeat(last, labels.tail_counts)
    assert (tail_codes >= highest - 1).all(), "ids of the tail come after those of the head in the order of logits"
    tail_codes = np.maximum(tail_codes, highest)
    zeros = np.zeros_like(last)
    flat = {
        "head_counts": labels.head_counts,
        "head_ids": ranks[labels.head_ids],
        "head_codes": _gaps(head_codes, head_starts, labels.head_counts, zeros),
        "tail_counts": labels.tail_counts,
        "tail_ids": ranks[labels.tail_ids],
        "tail_draws": labels.tail_draws,
        "tail_codes": _gaps(tail_codes, tail_starts, labels.tail_counts, last),
        "tail_log_masses": trim_log_masses(labels.tail_log_masses).T.ravel(),
        "entropies": np.rint(labels.entropies * ENTROPY_CODES_PER_NAT),
        "next_logprobs": _trim(labels.next_logprobs, _NEXT_QUANTUM),
    }
    return assemble(flat, positions)


def assemble(flat: Mapping[str, NDArray[Any]], positions: NDArray[np.int64]) -> pa.Table:
    """Assemble encoded values into the soft-label columns of R rows.

    Args:
        flat: values of each column of ``storage.schema.SOFT_LABELS``, position after position.
        positions: (R,) captured positions of each row.
    """
    ends = np.concatenate([[0], np.cumsum(positions)])
    heads, tails = _ends(flat["head_counts"])[ends], _ends(flat["tail_counts"])[ends]
    offsets = dict.fromkeys(SOFT_LABELS.names, ends) | {
        "head_ids": heads,
        "head_codes": heads,
        "tail_ids": tails,
        "tail_draws": tails,
        "tail_codes": tails,
        "tail_log_masses": ends * (len(flat["tail_log_masses"]) // max(len(flat["head_counts"]), 1)),
    }
    columns = [
        pa.ListArray.from_arrays(
            offsets[field.name].astype(np.int32),
            pa.array(flat[field.name].astype(field.type.value_type.to_pandas_dtype())),
        )
        for field in SOFT_LABELS
    ]
    return pa.Table.from_arrays(columns, schema=SOFT_LABELS)


def flatten(rows: pa.Table) -> dict[str, NDArray[Any]]:
    """The encoded values of rows by column, position after position: the inverse of ``assemble``."""
    return {name: _flatten(rows.column(name)) for name in SOFT_LABELS.names}


def decode(rows: pa.Table, vocabulary: Ints) -> SoftLabels:
    """Decode the soft labels of rows, position after position.

    Args:
        rows: a table with at least the soft-label columns.
        vocabulary: (V,) token id of each rank.

    Returns:
        Soft labels whose log-probabilities are within 1/64 nat of the encoded ones, and whose head and tail masses add
        up to 1.
    """
    flat = flatten(rows)
    head_counts, tail_counts = flat["head_counts"].astype(np.int32), flat["tail_counts"].astype(np.int32)
    count = len(head_counts)
    masses = flat["tail_log_masses"].reshape(count, -1).T if count else flat["tail_log_masses"].reshape(1, 0)
    head_codes = _accumulate(flat["head_codes"], head_counts, np.zeros(count, np.int32))
    last = np.zeros(count, np.int32)
    filled = head_counts > 0
    last[filled] = head_codes[(_ends(head_counts)[1:] - 1)[filled]]
    tail_codes = _accumulate(flat["tail_codes"], tail_counts, last)
    return SoftLabels(
        head_counts=head_counts,
        head_ids=vocabulary[flat["head_ids"]],
        head_logprobs=_normalized(head_codes, head_counts, masses[0]),
        tail_counts=tail_counts,
        tail_ids=vocabulary[flat["tail_ids"]],
        tail_draws=flat["tail_draws"].astype(np.int32),
        tail_logprobs=_LOGPROBS[tail_codes],
        tail_log_masses=masses,
        entropies=flat["entropies"].astype(np.float32) / np.float32(ENTROPY_CODES_PER_NAT),
        next_logprobs=flat["next_logprobs"],
    )


_LOGPROBS = np.append(np.arange(ZERO_CODE) / np.float32(-CODES_PER_NAT), -np.inf).astype(np.float32)
_PROBABILITIES = np.exp(_LOGPROBS.astype(np.float64))


def _codes(logprobs: Floats) -> Ints:
    """Absolute codes; rounding before taking differences keeps errors from adding up along a position."""
    codes: Ints = np.rint(np.clip(logprobs * np.float32(-CODES_PER_NAT), 0, ZERO_CODE)).astype(np.int32)
    return codes


def _gaps(codes: Ints, starts: NDArray[np.int64], counts: Ints, origins: Ints) -> Ints:
    gaps = np.diff(codes, prepend=np.int32(0))
    filled = counts > 0
    gaps[starts[filled]] = codes[starts[filled]] - origins[filled]
    assert not len(gaps) or gaps.min() >= 0, "ids of a position come in the order of their logits"
    return gaps


def _accumulate(gaps: NDArray[np.int16], counts: Ints, origins: Ints) -> Ints:
    """Absolute codes from gaps: one running sum over all values, minus its value before each position."""
    running = np.cumsum(gaps, dtype=np.int64)
    before = np.append(np.int64(0), running)[_starts(counts)] - origins
    codes: Ints = (running - np.repeat(before, counts)).astype(np.int32)
    return codes


def _normalized(codes: Ints, counts: Ints, tail_log_mass: Floats) -> Floats:
    """Head log-probabilities, normalized to the mass outside the tail; moves each by at most 1/128."""
    if not len(codes):
        return np.zeros(0, np.float32)
    filled = counts > 0
    mass = np.add.reduceat(_PROBABILITIES[codes], _starts(counts)[filled])
    shift = np.log(-np.expm1(tail_log_mass[filled].astype(np.float64)) / mass).astype(np.float32)
    return _LOGPROBS[codes] + np.repeat(shift, counts[filled])


def trim_log_masses(log_masses: NDArray[np.floating[Any]]) -> Floats:
    """Log-masses as they are stored: without their noisy low bits."""
    return _trim(log_masses, _MASS_QUANTUM, full_above=-(2.0**-4))


def _trim(values: NDArray[np.floating[Any]], quantum: float, full_above: float = np.inf) -> Floats:
    """Values rounded to a multiple of ``quantum``, so that the low bits of the mantissa are 0 and compress well.

    Values above ``full_above`` keep full precision: where the tail has nearly all the mass, the head's mass is computed
    as the difference from 1.
    """
    trimmed = np.rint(values / quantum) * quantum
    return np.where(values > full_above, values, trimmed).astype(np.float32)


def _ends(counts: Ints) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _starts(counts: Ints) -> NDArray[np.int64]:
    return _ends(counts)[:-1]


def _flatten(column: pa.ChunkedArray) -> NDArray[Any]:
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
    if len(chunks) == 1:
        flat: NDArray[Any] = chunks[0]
        return flat
    return np.concatenate(chunks) if chunks else np.zeros(0, column.type.value_type.to_pandas_dtype())
