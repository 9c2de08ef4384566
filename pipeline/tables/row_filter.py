"""Which rows of a table stay when it is reprocessed: by SQL expression, list of documents, or current documents.

Each row is judged independently of the others; soft labels are never read.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.pipeline.config.capture import ColumnsConfig
from softlabel.pipeline.config.table_settings import complete_columns, table_settings
from softlabel.pipeline.config.tables import ReprocessConfig
from softlabel.pipeline.documents.documents import Documents
from softlabel.pipeline.tables.row_expression import row_expression
from softlabel.storage.errors import UsageError
from softlabel.storage.schema import PARTITION, SEQUENCE
from softlabel.storage.table import Table

Predicate = Callable[[pa.Table], NDArray[np.bool_]]


class RowFilter:
    """True for the rows that stay.

    Args:
        source: table that the rows are from.
        config: settings that say what to drop.

    Raises:
        UsageError: if the expression can't be evaluated, or a file can't be read.
        DocumentsError: if the documents can't be read.
    """

    def __init__(self, source: Table, config: ReprocessConfig) -> None:
        self._predicates: list[Predicate] = []
        self._dropped = listed(config.drop) if config.drop else frozenset[str]()
        self._found: set[str] = set()
        self.columns: tuple[str, ...] = ("document_id", "fingerprint")
        """Columns that the filter reads, besides the split."""
        if config.drop:
            self._predicates.append(self._not_dropped)
        if config.stale:
            known = table_settings(source)
            known.pop("columns.carry", None)
            self._predicates.append(_unless_stale(config.stale, complete_columns(config.columns, known)))
        if config.where is not None:
            predicate, columns = row_expression(config.where, pa.schema([*SEQUENCE, *source.carried]))
            self.columns = (*self.columns, *(columns - {PARTITION}))
            self._predicates.append(predicate)

    def __call__(self, rows: pa.Table) -> NDArray[np.bool_]:
        """(R,) which of R rows stay; the rows must have ``columns`` and the split."""
        mask = np.ones(len(rows), bool)
        for holds in self._predicates:
            mask &= holds(rows)
        return mask

    @property
    def unknown(self) -> int:
        """Number of documents in the list that no row belonged to."""
        return len(self._dropped - self._found)

    def _not_dropped(self, rows: pa.Table) -> NDArray[np.bool_]:
        documents = rows.column("document_id").to_pylist()
        self._found |= self._dropped.intersection(documents)
        return np.array([name not in self._dropped for name in documents], bool)


def listed(path: str) -> frozenset[str]:
    """The document ids in a file with one id per line.

    Raises:
        UsageError: if the file can't be read or holds no id.
    """
    try:
        lines = frozenset(line.rstrip("\r") for line in Path(path).read_text(encoding="utf-8").split("\n")) - {""}
        found = "no ids" if not lines else ""
    except (OSError, UnicodeDecodeError) as error:
        lines, found = frozenset(), str(error)
    if found:
        raise UsageError(
            "the list of documents can't be used", expected="one document id per line", found=found, where=path
        )
    return lines


def _unless_stale(paths: str | tuple[str, ...], columns: ColumnsConfig) -> Predicate:
    """Keeps the rows of current versions, and of documents that are not among those at the paths."""
    current: dict[str, bytes] = {}
    for batch in Documents(paths, columns).batches():
        pair = (batch.documents.column(name).to_pylist() for name in ("document_id", "fingerprint"))
        current.update(zip(*pair, strict=True))

    def holds(rows: pa.Table) -> NDArray[np.bool_]:
        pairs = zip(rows.column("document_id").to_pylist(), rows.column("fingerprint").to_pylist(), strict=True)
        return np.array([current.get(name, fingerprint) == fingerprint for name, fingerprint in pairs], bool)

    return holds
