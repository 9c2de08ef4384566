"""The columns of an export: what a row of a table becomes in each format, as Arrow tables of whole row groups."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.storage.labels import SoftLabels
from softlabel.storage.views.row_groups import flat

_IGNORED = -100
"""Label of a token that is not trained on, for torch and everything that is built on it."""


@dataclass(frozen=True)
class Columns:
    """How rows are written in one format."""

    make: Callable[[pa.Table, SoftLabels, pa.Schema], pa.Table]
    """The columns of R rows, from the stored rows, their soft labels, and the carried columns."""
    about: dict[str, str]
    """What each column is, for the card; carried columns are left out."""


def everything(rows: pa.Table, labels: SoftLabels, carried: pa.Schema) -> pa.Table:
    """All that the table holds, with lists of lists: an outer entry for each captured position."""
    ends = _ends(rows.column("positions").to_numpy())
    heads, tails = _ends(labels.head_counts), _ends(labels.tail_counts)
    temperatures, positions = labels.tail_log_masses.shape
    per_temperature = np.arange(positions + 1) * temperatures
    columns = {
        name: rows.column(name) for name in ("document_id", "chunk", "chunks", "label", "token_ids", "loss_mask")
    }
    columns |= {
        "head_ids": _nested(ends, heads, labels.head_ids),
        "head_logprobs": _nested(ends, heads, labels.head_logprobs),
        "tail_ids": _nested(ends, tails, labels.tail_ids),
        "tail_draws": _nested(ends, tails, labels.tail_draws),
        "tail_log_masses": _nested(ends, per_temperature, labels.tail_log_masses.T.ravel()),
        "entropies": _lists(ends, labels.entropies),
        "next_logprobs": _lists(ends, labels.next_logprobs),
    }
    return pa.table(columns | {name: rows.column(name) for name in carried.names})


def targets(rows: pa.Table, labels: SoftLabels, *, draws: bool) -> pa.Table:
    """Tokens and labels, and for each token the teacher's distribution of the token after it.

    Args:
        rows: the stored rows.
        labels: their soft labels.
        draws: whether the draws from outside the head are among the targets, each with its share of what is left.
    """
    mask, offsets = flat(rows, "loss_mask")
    ids, logprobs, per_position = _targets(labels, draws)
    counts = np.zeros(len(mask), np.int64)
    counts[np.flatnonzero(mask) - 1] = per_position  # the first token of a row is never captured
    inner = _ends(counts)
    kept = tokens(rows)
    for name, values in (
        ("target_token_ids", ids),
        ("target_logprobs", logprobs),
        ("target_mask", np.ones(len(ids), np.int8)),
    ):
        kept = kept.append_column(name, _nested(offsets, inner, values))
    return kept


def tokens(rows: pa.Table) -> pa.Table:
    """Tokens and labels; a label is the token itself, where it is captured."""
    ids, offsets = flat(rows, "token_ids")
    mask, _ = flat(rows, "loss_mask")
    labels = np.where(mask, ids, _IGNORED).astype(np.int32)
    return pa.table(
        {
            "input_ids": _lists(offsets, ids),
            "attention_mask": _lists(offsets, np.ones(len(ids), np.int8)),
            "labels": _lists(offsets, labels),
        }
    )


def _targets(labels: SoftLabels, draws: bool) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    """Ids and log-probabilities, position after position, and how many each position has."""
    if not draws:
        return labels.head_ids, labels.head_logprobs, labels.head_counts.astype(np.int64)
    position = np.arange(labels.positions)
    of_tail = np.repeat(position, labels.tail_counts)
    drawn = np.bincount(of_tail, labels.tail_draws, labels.positions)
    log_mass = labels.tail_log_masses[0].astype(np.float64)
    shares = np.log(labels.tail_draws / drawn[of_tail]) + log_mass[of_tail]
    of_each = np.concatenate([np.repeat(position, labels.head_counts), of_tail])
    order = np.argsort(of_each, kind="stable")
    ids = np.concatenate([labels.head_ids, labels.tail_ids])[order]
    logprobs = np.concatenate([labels.head_logprobs, shares]).astype(np.float32)[order]
    return ids, logprobs, (labels.head_counts + labels.tail_counts).astype(np.int64)


def _ends(counts: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _lists(ends: NDArray[Any], values: NDArray[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values))


def _nested(ends: NDArray[Any], inner: NDArray[Any], values: NDArray[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), _lists(inner, values))


_TOKENS = {
    "input_ids": "all token ids that the teacher read",
    "attention_mask": "1 for each token",
    "labels": "the token id where the table has captured the token, and -100 elsewhere",
}
EVERYTHING = Columns(
    everything,
    {
        "document_id": "id of the document",
        "chunk": "which of the document's sequences this is, from 0",
        "chunks": "how many sequences the document has",
        "label": "class of the document, if it has one",
        "token_ids": "all token ids that the teacher read",
        "loss_mask": "which tokens are captured, each predicted from those before it; the lists below have an entry for"
        " each of these, in order",
        "head_ids": "the teacher's likeliest ids, the likeliest first",
        "head_logprobs": "their log-probabilities, in nats",
        "tail_ids": "ids drawn from all others, in proportion to their probability",
        "tail_draws": "how often each was drawn. With M draws in all and a probability r outside the head, each draw"
        " stands for r / M: head and draws are an unbiased estimate of the distribution",
        "tail_log_masses": "log r, the log-probability of everything outside the head, at each stored temperature",
        "entropies": "entropy of the whole distribution, in nats",
        "next_logprobs": "log-probability of the captured token itself",
    },
)
TOKENS = Columns(lambda rows, labels, carried: tokens(rows), _TOKENS)


def trained_on(draws: bool) -> Columns:
    """The columns that axolotl's KD plugin reads."""
    what = (
        "their log-probabilities: of the head as the teacher has them, and for an id drawn from outside it the log of"
        " its share of the remaining probability; they add up to 1"
        if draws
        else "their log-probabilities, which add up to less than 1"
    )
    return Columns(
        lambda rows, labels, carried: targets(rows, labels, draws=draws),
        _TOKENS
        | {
            "target_token_ids": "for each token, ids of the token after it; empty where that one is not captured",
            "target_logprobs": what,
            "target_mask": "1 for each target",
        },
    )
