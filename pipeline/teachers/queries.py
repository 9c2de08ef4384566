"""Inputs of a teacher: the tokens of sequences, the positions to predict, and the seeds of the draws.

Independent of where the rows come from (a plan's file or a table) and of what is done with the teacher's output.
"""

import hashlib

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from softlabel.pipeline.selection.select import position_seeds
from softlabel.pipeline.selection.selection import Selection
from softlabel.pipeline.teachers.kind import Kind
from softlabel.storage.identity import TeacherIdentity


class Queries:
    """Sequences for a teacher.

    Args:
        rows: with at least the columns key, token_ids and loss_mask of ``storage.schema.SEQUENCE``.
        kind: of the teacher; for a classifier, the rows need the column label, too.
    """

    def __init__(self, rows: pa.Table, kind: Kind) -> None:
        masks = (row.values.to_numpy(zero_copy_only=False) for row in rows.column("loss_mask"))
        self.rows = rows
        self.tokens: list[NDArray[np.int32]] = [row.values.to_numpy() for row in rows.column("token_ids")]
        """Token ids of each sequence, (length,)."""
        self.positions: list[NDArray[np.int32]] = [np.flatnonzero(mask).astype(np.int32) for mask in masks]
        """Positions of the tokens to predict in each sequence; see ``teacher.Teacher.logits``."""
        self._keys = rows.column("key").to_pylist()
        self._kind = kind

    def next_ids(self, batch: NDArray[np.int64]) -> torch.Tensor:
        """(P,) int: the actual tokens at the positions of these sequences, one sequence after the other.

        For a classifier, the actual classes of the documents; -1 where the class is not known.
        """
        return torch.from_numpy(self._kind.next_ids(self.rows, batch))

    def seeds(self, batch: NDArray[np.int64], selection: Selection, teacher: TeacherIdentity) -> torch.Tensor:
        """(P,) int64: seeds for the draws at the positions of these sequences."""
        identity = hashlib.blake2b(teacher.model_dump_json().encode(), digest_size=16).digest()
        return torch.cat(
            [position_seeds(selection, identity, self._keys[i], torch.from_numpy(self.positions[i])) for i in batch]
        )
