"""One forward pass of a student: sequences side by side in rows, and what the teacher said of them.

``RowGroup`` gives what a Parquet row group holds of one sequence, without copying; ``collate`` copies it once, to
where it belongs in a ``Batch``. Nothing here loops over positions, decodes soft labels or knows in which order
sequences come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.averaging import AveragedTargets
from pipeline.targets import CompactTargets
from storage.groups import column_of
from storage.schema import SOFT_LABELS
from storage.view import AnyTable, View

COLUMNS = ("token_ids", "loss_mask", *SOFT_LABELS.names)
"""What is read of a row once its turn has come."""

_EMPTY = {field.name: np.zeros(0, field.type.value_type.to_pandas_dtype()) for field in SOFT_LABELS}


@dataclass(frozen=True)
class Batch:
    """Rows of L tokens, of one or several whole sequences each, and soft labels at their N captured positions."""

    input_ids: Tensor
    """(rows, L) int64; 0 in the padding at a row's end."""
    position_ids: Tensor
    """(rows, L) int64: from 0 in each sequence, and again from 0 in the padding."""
    positions: Tensor
    """(N,) int64: where in rows x L the hidden state is that predicts each captured token: at the one before it."""
    next_ids: Tensor
    """(N,) int64: the captured tokens."""
    targets: CompactTargets | AveragedTargets
    """What the teacher, or each of several, said at each."""
    sequences: int
    """Sequences in these rows."""
    global_positions: int
    """Captured positions of the whole optimiser step, over all ranks and micro-batches: what its loss is divided by."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What a transformers model is called with for attention to stay inside each sequence.

        With neither a mask nor a cache, transformers takes each place where ``position_ids`` do not go up by one for
        the start of another sequence (``masking_utils.find_packed_sequence_indices``). A cache, which most models
        make unless told not to, turns that off without a word.
        """
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device."""
        tensors = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()}
        return replace(self, targets=self.targets.to(device, non_blocking), **tensors)

    def pin_memory(self) -> Self:
        """The same in page-locked memory; a DataLoader with ``pin_memory`` calls it."""
        tensors = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, targets=self.targets.pin_memory(), **tensors)

    def _tensors(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class RowGroup:
    """What columns of lists hold, as flat numpy arrays and where each sequence's part of them begins.

    Args:
        rows: of one row group; other columns are passed over.
    """

    def __init__(self, rows: pa.Table) -> None:
        self._columns: dict[str, tuple[NDArray[Any], list[int]]] = {}
        for name in [field.name for field in rows.schema if pa.types.is_list(field.type)]:
            lists = rows.column(name).combine_chunks()
            values = lists.values.to_numpy(zero_copy_only=False)
            self._columns[name] = values, lists.offsets.to_numpy().tolist()

    def sequence(self, row: int) -> dict[str, NDArray[Any]]:
        """Each column's values for one sequence, as views."""
        return {name: values[starts[row] : starts[row + 1]] for name, (values, starts) in self._columns.items()}


def collate(
    packs: Sequence[Sequence[dict[str, NDArray[Any]]]], row_tokens: int | None, table: AnyTable, global_positions: int
) -> Batch:
    """Lay out packs as a batch.

    Args:
        packs: for each row, its sequences; without any row, the batch is one row of padding.
        row_tokens: L; None for as many as the longest row has.
        table: what they are of.
        global_positions: of the whole optimiser step.
    """
    if row_tokens is None:
        row_tokens = max((tokens_of(pack) for pack in packs), default=1)
    shape = max(1, len(packs)), row_tokens
    input_ids, position_ids, captured = np.zeros(shape, np.int64), np.empty(shape, np.int64), np.zeros(shape, np.bool_)
    counting = np.arange(row_tokens)
    position_ids[:] = counting
    sequences = []
    for row, pack in enumerate(packs):
        end = 0
        for sequence in pack:
            start, end = end, end + len(sequence["token_ids"])
            input_ids[row, start:end] = sequence["token_ids"]
            captured[row, start:end] = sequence["loss_mask"]
            position_ids[row, start:] = counting[: row_tokens - start]
            sequences.append(sequence)
        position_ids[row, end:] = counting[: row_tokens - end]
    places = np.flatnonzero(captured)
    targets = _targets(sequences, table)
    assert targets.positions == len(places), "each captured token has its soft labels"
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        positions=torch.from_numpy(places - 1),  # a sequence's first token is never captured
        next_ids=torch.from_numpy(input_ids.ravel()[places]),
        targets=targets,
        sequences=len(sequences),
        global_positions=global_positions,
    )


def tokens_of(pack: Sequence[dict[str, NDArray[Any]]]) -> int:
    """Tokens of a row, without padding."""
    return sum(len(sequence["token_ids"]) for sequence in pack)


def _targets(sequences: Sequence[dict[str, NDArray[Any]]], table: AnyTable) -> CompactTargets | AveragedTargets:
    if isinstance(table, View) and table.average:
        parts = (_compact(sequences, len(table.temperatures), number) for number in range(len(table.tables)))
        return AveragedTargets(tuple(parts), table.weights)
    return _compact(sequences, len(table.temperatures), 0)


def _compact(sequences: Sequence[dict[str, NDArray[Any]]], temperatures: int, table: int) -> CompactTargets:
    names = {name: column_of(name, table) for name in _EMPTY}
    flat = {name: np.concatenate([_EMPTY[name], *(s[column] for s in sequences)]) for name, column in names.items()}
    flat["tail_log_masses"] = np.ascontiguousarray(flat["tail_log_masses"].reshape(-1, temperatures).T)
    return CompactTargets(**{name: torch.from_numpy(values) for name, values in flat.items()})
