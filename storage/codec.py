"""Encodes soft labels into the columns of a shard, and decodes them.

Encoding numbers token ids (``storage.numbering``), stores the log-probabilities of a head as differences from the
previous id in multiples of 1/64 nat, sorts the ids of a tail, and clears the noisy low bits of floats. The resulting
small integers compress close to their entropy. Decoding is vectorized and needs only the table's numbering. FORMAT.md
is the specification.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.storage.labels import Floats, Ints, SoftLabels
from softlabel.storage.numbering import Numbering, running_sums
from softlabel.storage.schema import SOFT_LABELS

CODES_PER_NAT = 64
"""Resolution of the log-probabilities. The logits of a bf16 teacher are coarser."""
ZERO_CODE = 32767
"""The code of probability 0, and of every probability below exp(-511)."""
UNKNOWN = -1
"""The code of an unknown log-probability or entropy."""
ENTROPY_CODES_PER_NAT = 256
_LARGEST_COUNT = 32767
_MASS_QUANTUM = 2.0**-17
_NEXT_QUANTUM = 2.0**-10

Flat = dict[str, NDArray[Any]]
"""Encoded values by column, position after position."""


def encode(
    labels: SoftLabels, positions: NDArray[np.int64], numbering: Numbering, tail_codes: NDArray[np.bool_] | None = None
) -> pa.Table:
    """Encode soft labels into the columns of R rows.

    Args:
        labels: soft labels of all rows' positions, in order.
        positions: (R,) captured positions of each row, summing to ``labels.positions``.
        numbering: of the table.
        tail_codes: (R,) rows that store the log-probabilities of their tails; all by default.
    """
    assert positions.sum() == labels.positions, "every row's positions have soft labels, and nothing else does"
    for counts in (labels.head_counts, labels.tail_counts, labels.tail_draws):
        assert counts.max(initial=0) <= _LARGEST_COUNT, f"an int16 would wrap beyond {_LARGEST_COUNT}"
    flat: Flat = {
        "head_counts": labels.head_counts,
        "head_ids": labels.head_ids,
        "head_codes": _head_gaps(labels.head_logprobs, labels.head_counts),
        "tail_counts": labels.tail_counts,
        "tail_ids": labels.tail_ids,
        "tail_draws": labels.tail_draws,
        "tail_codes": _codes(labels.tail_logprobs),
        "tail_log_masses": trim_log_masses(labels.tail_log_masses).T.ravel(),
        "entropies": np.rint(np.nan_to_num(labels.entropies * ENTROPY_CODES_PER_NAT, nan=UNKNOWN)),
        "next_logprobs": _trim(labels.next_logprobs, _NEXT_QUANTUM),
    }
    return assemble(number(flat, positions, numbering, tail_codes), positions)


def number(
    flat: Flat, positions: NDArray[np.int64], numbering: Numbering, tail_codes: NDArray[np.bool_] | None = None
) -> Flat:
    """The encoded values of R rows, given those with token ids for ``head_ids`` and ``tail_ids``, tails in any order.

    Args:
        flat: values with token ids.
        positions: (R,) captured positions of each row.
        numbering: of the table.
        tail_codes: (R,) rows that keep their ``tail_codes``; all by default.
    """
    clusters = numbering.assign(flat["head_ids"], flat["head_counts"])
    gaps, order = numbering.number_tails(flat["tail_ids"], flat["tail_counts"], clusters)
    codes = flat["tail_codes"][order]
    if tail_codes is not None and not tail_codes.all():
        codes = np.where(np.repeat(np.repeat(tail_codes, positions), flat["tail_counts"]), codes, UNKNOWN)
    return flat | {
        "head_clusters": clusters,
        "head_ids": numbering.number_heads(flat["head_ids"], flat["head_counts"], clusters),
        "tail_ids": gaps,
        "tail_draws": flat["tail_draws"][order],
        "tail_codes": codes,
    }


NUMBERED = ("head_counts", "head_clusters", "head_ids", "tail_counts", "tail_ids", "tail_draws", "tail_codes")
"""The columns that ``number`` changes, and those that it needs."""


def renumber(flat: Flat, old: Numbering, new: Numbering) -> Flat:
    """The encoded values with another numbering; at least the columns in ``NUMBERED``."""
    positions = np.array([len(flat["head_counts"])])
    return number(with_token_ids(flat, old), positions, new)


def with_token_ids(flat: Mapping[str, NDArray[Any]], numbering: Numbering) -> Flat:
    """Encoded values with token ids in place of ``head_ids`` and ``tail_ids``: the inverse of ``number``."""
    clusters, head_counts, tail_counts = (flat[name] for name in ("head_clusters", "head_counts", "tail_counts"))
    tail_places = running_sums(numbering.places.take(flat["tail_ids"]), tail_counts)
    return {
        **flat,
        "head_ids": numbering.ids_at(numbering.places.take(flat["head_ids"]), head_counts, clusters),
        "tail_ids": numbering.ids_at(tail_places, tail_counts, clusters),
    }


def without_tail_codes(rows: pa.Table, dropped: NDArray[np.bool_]) -> pa.Table:
    """The same R rows, of which the (R,) ``dropped`` ones no longer store the log-probabilities of their tails."""
    lists = rows.column("tail_codes").combine_chunks()
    offsets, codes = lists.offsets.to_numpy(), lists.values.to_numpy()
    codes = codes[offsets[0] : offsets[-1]]
    kept = np.where(np.repeat(dropped, np.diff(offsets)), np.int16(UNKNOWN), codes)
    changed = pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), pa.array(kept))
    return rows.set_column(rows.column_names.index("tail_codes"), rows.schema.field("tail_codes"), changed)


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
            pa.array(flat[field.name].astype(field.type.value_type.to_pandas_dtype(), copy=False)),
        )
        for field in SOFT_LABELS
    ]
    return pa.Table.from_arrays(columns, schema=SOFT_LABELS)


def flatten(rows: pa.Table) -> Flat:
    """The encoded values of rows by column, position after position: the inverse of ``assemble``."""
    return {name: _flatten(rows.column(name)) for name in SOFT_LABELS.names if name in rows.column_names}


def decode(rows: pa.Table, numbering: Numbering) -> SoftLabels:
    """Decode the soft labels of rows, position after position.

    Args:
        rows: a table with at least the soft-label columns.
        numbering: of the table.

    Returns:
        Soft labels whose log-probabilities are within 1/64 nat of the encoded ones, and whose head and tail masses add
        up to 1. The ids of a tail are in the order of their ranks.
    """
    flat = with_token_ids(flatten(rows), numbering)
    head_counts, tail_counts = flat["head_counts"].astype(np.int32), flat["tail_counts"].astype(np.int32)
    count = len(head_counts)
    masses = flat["tail_log_masses"].reshape(count, -1).T if count else flat["tail_log_masses"].reshape(1, 0)
    return SoftLabels(
        head_counts=head_counts,
        head_ids=flat["head_ids"],
        head_logprobs=_normalized(running_sums(flat["head_codes"], head_counts), head_counts, masses[0]),
        tail_counts=tail_counts,
        tail_ids=flat["tail_ids"],
        tail_draws=flat["tail_draws"].astype(np.int32),
        tail_logprobs=_LOGPROBS.take(flat["tail_codes"]),
        tail_log_masses=masses,
        entropies=np.where(flat["entropies"] < 0, np.nan, flat["entropies"] / np.float32(ENTROPY_CODES_PER_NAT)).astype(
            np.float32
        ),
        next_logprobs=flat["next_logprobs"],
    )


_LOGPROBS = np.append(np.arange(ZERO_CODE) / np.float32(-CODES_PER_NAT), [-np.inf, np.nan]).astype(np.float32)
"""The log-probability of each code; the last one is that of ``UNKNOWN``."""
_PROBABILITIES = np.exp(_LOGPROBS.astype(np.float64))


def _codes(logprobs: Floats) -> Ints:
    """Absolute codes; rounding before taking differences keeps errors from adding up along a head."""
    scaled = np.clip(logprobs * np.float32(-CODES_PER_NAT), 0, ZERO_CODE)
    codes: Ints = np.rint(np.nan_to_num(scaled, nan=UNKNOWN, copy=False)).astype(np.int32)
    return codes


def _head_gaps(logprobs: Floats, counts: Ints) -> NDArray[np.int16]:
    """The gaps between the codes of each head, which count from its first id."""
    from softlabel.storage import kernels  # numba takes a third of a second to import, and readers need none

    gaps = np.empty(len(logprobs), np.int16)
    values, counts = np.require(logprobs, np.float32, ["C", "W"]), counts.astype(np.int64)
    lowest = kernels.head_gaps(values, counts, np.float32(CODES_PER_NAT), ZERO_CODE, gaps)
    assert lowest >= 0, "ids of a head come in the order of their logits"
    return gaps


def _normalized(codes: Ints, counts: Ints, tail_log_mass: Floats) -> Floats:
    """Head log-probabilities, normalized to the mass outside the tail (moves each by at most 1/128); or to 1 where that
    is unknown."""
    if not len(codes):
        return np.zeros(0, np.float32)
    filled = counts > 0
    mass = np.add.reduceat(_PROBABILITIES.take(codes), _starts(counts)[filled])
    tail = np.nan_to_num(tail_log_mass[filled].astype(np.float64), nan=-np.inf, neginf=-np.inf)
    shift = np.log(-np.expm1(tail) / mass).astype(np.float32)
    logprobs: Floats = _LOGPROBS.take(codes)
    logprobs += np.repeat(shift, counts[filled])
    return logprobs


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


def _ends(counts: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _starts(counts: NDArray[Any]) -> NDArray[np.int64]:
    return _ends(counts)[:-1]


def _flatten(column: pa.ChunkedArray) -> NDArray[Any]:
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
    if len(chunks) == 1:
        flat: NDArray[Any] = chunks[0]
        return flat
    return np.concatenate(chunks) if chunks else np.zeros(0, column.type.value_type.to_pandas_dtype())
