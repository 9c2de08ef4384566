"""Encodes soft labels as tables of format 1 did, to compare their size with that of today's tables.

Nothing else writes format 1. This never changes: it is what the sizes in the history were measured with.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softlabel.storage.labels import SoftLabels

_TYPES = {
    "head_counts": "int16",
    "head_ids": "int32",
    "head_codes": "int16",
    "tail_counts": "int16",
    "tail_ids": "int32",
    "tail_draws": "int16",
    "tail_codes": "int16",
    "tail_log_masses": "float32",
    "entropies": "int16",
    "next_logprobs": "float32",
}
_ROW_GROUP = 256


def column_bytes(labels: SoftLabels, positions: NDArray[np.int64], ranking: NDArray[np.int32]) -> dict[str, int]:
    """Bytes of each soft-label column in a shard of format 1.

    Args:
        labels: soft labels at temperature 1, in the order of their logits.
        positions: (R,) captured positions of each row.
        ranking: (V,) token id of each rank, from ``ranked``.
    """
    ranks = np.argsort(ranking)
    head_codes, tail_codes = _codes(labels.head_logprobs), _codes(labels.tail_logprobs)
    heads, tails = _ends(labels.head_counts), _ends(labels.tail_counts)
    last = np.where(labels.head_counts > 0, np.append(head_codes, 0)[heads[1:] - 1], 0)
    tail_codes = np.maximum(tail_codes, np.repeat(last, labels.tail_counts))
    masses, nexts = labels.tail_log_masses[0], labels.next_logprobs
    flat: dict[str, NDArray[Any]] = {
        "head_counts": labels.head_counts,
        "head_ids": ranks[labels.head_ids],
        "head_codes": _gaps(head_codes, labels.head_counts, np.zeros_like(last)),
        "tail_counts": labels.tail_counts,
        "tail_ids": ranks[labels.tail_ids],
        "tail_draws": labels.tail_draws,
        "tail_codes": _gaps(tail_codes, labels.tail_counts, last),
        "tail_log_masses": np.where(masses > -(2.0**-4), masses, np.rint(masses * 2.0**17) / 2.0**17),
        "entropies": np.rint(labels.entropies * 256),
        "next_logprobs": np.rint(nexts * 2.0**10) / 2.0**10,
    }
    rows = _ends(positions)
    ends = dict.fromkeys(_TYPES, rows)
    ends |= dict.fromkeys(("head_ids", "head_codes"), heads[rows])
    ends |= dict.fromkeys(("tail_ids", "tail_draws", "tail_codes"), tails[rows])
    lists = {
        name: pa.ListArray.from_arrays(ends[name].astype(np.int32), pa.array(flat[name].astype(kind)))
        for name, kind in _TYPES.items()
    }
    leaves = {name: f"{name}.list.element" for name in _TYPES}
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(lists),
        sink,
        row_group_size=_ROW_GROUP,
        compression="zstd",
        compression_level={leaf: 1 if name.endswith("_ids") else 10 for name, leaf in leaves.items()},
        column_encoding=dict.fromkeys(leaves.values(), "BYTE_STREAM_SPLIT"),
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=False,
    )
    metadata = pq.read_metadata(pa.BufferReader(sink.getvalue()))
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return {name: sum(group.column(i).total_compressed_size for group in groups) for i, name in enumerate(_TYPES)}


def ranked(sample: SoftLabels, vocabulary: int) -> NDArray[np.int32]:
    """(V,) token id of each rank: the ids by how often they occur in a sample."""
    counts = np.bincount(np.concatenate([sample.head_ids, sample.tail_ids]), minlength=vocabulary)
    return np.argsort(-counts, kind="stable").astype(np.int32)


def vocabulary_bytes(ranking: NDArray[np.int32]) -> int:
    """Bytes of the vocabulary file of format 1."""
    sink = pa.BufferOutputStream()
    columns = {"rank": np.arange(len(ranking), dtype=np.int32), "token_id": ranking}
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return int(sink.tell())


def _codes(logprobs: NDArray[np.float32]) -> NDArray[np.int32]:
    codes: NDArray[np.float32] = np.rint(np.clip(logprobs * np.float32(-64), 0, 32767))
    return codes.astype(np.int32)


def _gaps(codes: NDArray[Any], counts: NDArray[np.int32], origins: NDArray[Any]) -> NDArray[Any]:
    """The difference of each code from the one before it in its position, or from the position's origin."""
    gaps = np.diff(codes, prepend=0)
    first = _ends(counts)[:-1][counts > 0]
    gaps[first] = codes[first] - origins[counts > 0]
    return gaps


def _ends(counts: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
