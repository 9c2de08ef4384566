"""Small tables to write to and read from."""

from pathlib import Path

import pytest

from softlabel.storage.table import Table
from tests.storage.tables import add, identity, make_table


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """A table without rows."""
    return make_table(tmp_path / "table", identity())


@pytest.fixture
def filled(table: Table) -> Table:
    """A table of two commits of 40 rows each."""
    add(table, [f"a{i}" for i in range(40)])
    add(table.newest(), [f"b{i}" for i in range(40)])
    return table.newest()
