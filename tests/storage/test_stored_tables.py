"""A table that an earlier version of softlabel wrote in format 2 is read, checked and added to as if made today."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from softlabel.storage.codec import decode
from softlabel.storage.labels import SoftLabels
from softlabel.storage.reader import read
from softlabel.storage.table import Table
from softlabel.storage.upkeep.verification import verify
from tests.numberings import by_id
from tests.storage.tables import CARRIED, add, names_in

ARCHIVE = Path(__file__).parents[1] / "format_2.zip"
"""The table, what was decoded from it, and how both were made."""
NAMES = [*(f"a{i}" for i in range(12)), *(f"b{i}" for i in range(5))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def labels_of(table: Table) -> SoftLabels:
    return SoftLabels.concatenate([decode(read(table, shard), table.numbering) for shard in table.shards()])


def assert_equal(found: SoftLabels, expected: SoftLabels) -> None:
    for name, values in vars(expected).items():
        compare = np.testing.assert_array_equal if values.dtype == np.int32 else np.testing.assert_allclose
        compare(getattr(found, name), values, err_msg=name)


def test_it_is_read_and_verified(folder: Path) -> None:
    table = Table.open(str(folder / "table"))
    assert (table.version, len(table.numbering.lists), table.temperatures) == (2, 3, (1.0, 2.0))
    assert names_in(table) == sorted(NAMES)
    with np.load(folder / "labels.npz") as labels:
        assert_equal(labels_of(table), SoftLabels(**labels))
    assert verify(table).findings == ()


def test_rows_are_added_to_it_that_equal_those_it_has(folder: Path) -> None:
    table = Table.open(str(folder / "table"))
    assert add(table, ["a0", "new"]).sequences == 1
    assert names_in(table.newest()) == sorted([*NAMES, "new"])
    assert verify(table.newest()).findings == ()
    again = Table.create(str(folder / "again"), table.identity, CARRIED, table.numbering, table.tokenizer)
    add(again, NAMES)
    for name in NAMES:
        assert_equal(by_id(of_document(again.newest(), name)), by_id(of_document(table, name)))


def of_document(table: Table, name: str) -> SoftLabels:
    """The soft labels of a document, which has one row."""
    for shard in table.shards():
        rows = read(table, shard)
        if name in (names := rows.column("document_id").to_pylist()):
            return decode(rows.slice(names.index(name), 1), table.numbering)
    raise AssertionError(f"no document {name}")
