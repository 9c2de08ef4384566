"""What ``softlabel inspect`` prints for people."""

from pathlib import Path

import pyarrow as pa
import pytest

from softlabel.storage.table import Table
from softlabel.storage.writer import ShardWriter
from tests.flows.commands import shown
from tests.storage.tables import add, identity, make_table, random_labels, rows, sequences

HOSTILE = "\x1b[31m\u202e[bold]"


def test_the_contents_are_described_and_nothing_in_them_acts_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table = make_table(tmp_path / "table", identity())
    with ShardWriter(table) as writer:
        found = sequences(["a", "b"], [5, 7], "train")
        at = found.schema.get_field_index("source")
        writer.append(found.set_column(at, found.schema.field(at), pa.array([HOSTILE, "web"])), random_labels(12))
        writer.commit({"operation": "capture"})
    text = shown(capsys, "inspect", table.location)
    assert "source string, 2 values sequences positions web 1 7 \\x1b[31m\\u202e[bold] 1 5" in text
    assert "means of 12 positions" in text
    assert "the teacher's entropy: " in text
    assert "newest commit" in text
    assert "more than one text" not in text
    assert "\x1b" not in text


def test_changed_documents_are_named_with_the_command_that_drops_their_earlier_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table = make_table(tmp_path / "table", identity())
    add(table, ["a", "b"], "train")
    made, labels = rows(["a"], "train")
    for name in ("key", "fingerprint"):
        at = made.schema.get_field_index(name)
        made = made.set_column(at, made.schema.field(at), pa.array([b"x" * 16]))
    with ShardWriter(Table.open(table.location)) as writer:
        writer.append(made, labels)
        writer.commit({"operation": "capture"})
    text = shown(capsys, "inspect", table.location)
    assert "1 document stored with more than one text" in text
    assert f"softlabel reprocess {table.location} --stale DOCUMENTS" in text
