"""Batch of one forward pass: sequences laid out in rows, and their soft labels.

``Sequences`` holds the columns that were read; ``collate`` copies a batch's part of them, once. Nothing here loops over
positions, decodes soft labels or knows the order of the sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.pipeline.loss.averaging import AveragedTargets
from softlabel.pipeline.loss.targets import CompactTargets
from softlabel.pipeline.stream.epoch_plan import Ints
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.views.row_groups import column_of, flat
from softlabel.storage.views.view import AnyTable, View

COLUMNS = ("token_ids", "loss_mask", *SOFT_LABELS.names)
"""Columns that a batch needs."""

_LONG_SEQUENCE = 128
"""Mean tokens per sequence from which on copying sequences one by one is worth it."""
_TYPES = {field.name: field.type.value_type.to_pandas_dtype() for field in SOFT_LABELS}


@dataclass(frozen=True)
class Batch:
    """Rows of L tokens, of one or several whole sequences each, and soft labels at their N captured positions."""

    input_ids: Tensor
    """(rows, L) int64; 0 in the padding at a row's end."""
    position_ids: Tensor
    """(rows, L) int64: from 0 in each sequence, and again from 0 in the padding."""
    positions: Tensor
    """(N,) int64: index in rows x L of the hidden state that predicts each captured token, one before the token."""
    next_ids: Tensor
    """(N,) int64: the captured tokens."""
    targets: CompactTargets | AveragedTargets
    """Soft labels of the teacher, or of each of several, at the captured positions."""
    sequences: int
    """Number of sequences in these rows."""
    global_positions: int
    """Captured positions of the whole optimizer step, over all ranks and micro-batches: the divisor of its loss."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of a transformers model that keep attention within each sequence.

        With neither a mask nor a cache, transformers starts a new sequence wherever ``position_ids`` do not increase by
        one (``masking_utils.find_packed_sequence_indices``). A cache, which most models use by default, silently
        disables this.
        """
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy to another device."""
        tensors = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()}
        return replace(self, targets=self.targets.to(device, non_blocking), **tensors)

    def pin_memory(self) -> Self:
        """Copy to page-locked memory; called by a DataLoader with ``pin_memory``."""
        tensors = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, targets=self.targets.pin_memory(), **tensors)

    def _tensors(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class Sequences:
    """List columns from which any selection of sequences can be copied at once.

    Each list is held as one binary value, because Arrow copies those whole but the numbers of a list one by one. A
    selection from several parts takes one step per sequence, which only pays for long sequences: the parts of short
    ones are concatenated first.

    Args:
        parts: rows with token_ids, as they are read; columns that are not lists are ignored.
    """

    def __init__(self, parts: Sequence[pa.Table]) -> None:
        self._types: dict[str, np.dtype[Any]] = {}
        self._counts: dict[str, Ints] = {}
        self._columns: dict[str, list[pa.LargeBinaryArray]] = {}
        for name in [field.name for field in parts[0].schema if pa.types.is_list(field.type)]:
            lists = [flat(part, name) for part in parts]
            self._types[name] = lists[0][0].dtype
            self._counts[name] = np.concatenate([np.diff(starts) for _, starts in lists], dtype=np.int64)
            self._columns[name] = [_as_bytes(values, starts) for values, starts in lists]
        if self._counts["token_ids"].sum() < _LONG_SEQUENCE * len(self._counts["token_ids"]):
            self._columns = {name: [pa.concat_arrays(column)] for name, column in self._columns.items()}
        self._firsts = np.cumsum([0, *map(len, self._columns["token_ids"])])

    def counts(self, name: str, rows: Ints) -> Ints:
        """(n,) list length of each of n sequences in a column."""
        return self._counts[name][rows]

    def values(self, name: str, rows: Ints) -> NDArray[Any]:
        """The concatenated lists of n sequences in a column."""
        column = self._columns[name]
        if len(column) == 1:
            taken = column[0].take(pa.array(rows))
        else:
            numbers = np.searchsorted(self._firsts, rows, side="right") - 1
            places = zip(numbers.tolist(), (rows - self._firsts[numbers]).tolist(), strict=True)
            taken = pa.concat_arrays([column[0].slice(0, 0), *(column[number].slice(row, 1) for number, row in places)])
        return np.frombuffer(taken.buffers()[2], self._types[name])


def _as_bytes(values: NDArray[Any], starts: NDArray[np.int32]) -> pa.LargeBinaryArray:
    buffers = [None, pa.py_buffer(starts.astype(np.int64) * values.itemsize), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.large_binary(), len(starts) - 1, buffers)


class Pack(NamedTuple):
    """Sequences that share a training row."""

    sequences: Sequences
    rows: Ints
    """(n,) indices of the pack's sequences."""

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return int(self.sequences.counts("token_ids", self.rows).sum())


def collate(packs: Sequence[Pack], max_length: int | None, table: AnyTable, global_positions: int) -> Batch:
    """Lay out packs as a batch.

    Args:
        packs: pack of each row; without any, the batch is one row of padding.
        max_length: row length L; None for that of the longest pack.
        table: table or view that the sequences are from.
        global_positions: captured positions of the whole optimizer step.
    """
    row_ends = np.array([pack.tokens for pack in packs] or [0])
    shape = len(row_ends), max_length or max(1, int(row_ends.max()))
    groups = [list(group) for _, group in groupby(packs, lambda pack: id(pack.sequences))]
    selections = [Pack(group[0].sequences, np.concatenate([pack.rows for pack in group])) for group in groups]
    counts = [part.sequences.counts("token_ids", part.rows) for part in selections]
    tokens = np.concatenate([np.zeros(0, np.int64), *counts])
    padding = np.arange(shape[0]) * shape[1] - (np.cumsum(row_ends) - row_ends)  # of all rows before each row
    # Each token's index in its sequence, and in rows x L.
    within = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    index = np.arange(len(within)) + np.repeat(padding, row_ends)
    input_ids, captured = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    position_ids = np.arange(shape[1]) - row_ends[:, None]
    input_ids.ravel()[index] = _values(selections, "token_ids", np.int32)
    captured.ravel()[index] = _values(selections, "loss_mask", np.bool_)
    position_ids.ravel()[index] = within
    places = np.flatnonzero(captured)
    targets = _targets(selections, table)
    assert targets.positions == len(places), "each captured token has its soft labels"
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        positions=torch.from_numpy(places - 1),  # a sequence's first token is never captured
        next_ids=torch.from_numpy(input_ids.ravel()[places]),
        targets=targets,
        sequences=len(tokens),
        global_positions=global_positions,
    )


def _targets(selections: Sequence[Pack], table: AnyTable) -> CompactTargets | AveragedTargets:
    if isinstance(table, View) and table.average:
        parts = (_compact(selections, len(table.temperatures), number) for number in range(len(table.tables)))
        return AveragedTargets(tuple(parts), table.weights)
    return _compact(selections, len(table.temperatures), 0)


def _compact(selections: Sequence[Pack], temperatures: int, table: int) -> CompactTargets:
    flat = {name: _values(selections, column_of(name, table), kind) for name, kind in _TYPES.items()}
    flat["tail_log_masses"] = np.ascontiguousarray(flat["tail_log_masses"].reshape(-1, temperatures).T)
    return CompactTargets(**{name: torch.from_numpy(values) for name, values in flat.items()})


def _values(selections: Sequence[Pack], column: str, kind: Any) -> NDArray[Any]:
    """The concatenated lists of the selected sequences in a column."""
    parts = [part.sequences.values(column, part.rows) for part in selections]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, kind), *parts])
