"""A table has a card that says what it is, names its version, and keeps what a user writes into it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from softlabel.pipeline.config.tables import MaintainConfig, ReprocessConfig, VerifyConfig
from softlabel.pipeline.tables.maintain import maintain
from softlabel.pipeline.tables.reprocess import reprocess
from softlabel.pipeline.tables.verify import verify
from softlabel.storage.errors import TableError
from softlabel.storage.table import Table
from softlabel.storage.upkeep.card import keeping_card, update_card
from tests.pipeline.tables.conftest import captured
from tests.storage.tables import add, identity, make_table

FIRST, SECOND = [[{"id": f"{name}-{i}", "text": f"Words {i}."} for i in range(3)] for name in "ab"]


def card(table: Table) -> str:
    return Path(table.location, "README.md").read_text()


def test_a_capture_writes_the_card_of_its_version_and_keeps_what_a_user_wrote(tiny_teacher: Path, tmp_path: Path):
    table = captured(tmp_path / "table", tiny_teacher, FIRST)
    assert f"describes its version {table.version}." in card(table)
    assert "Teacher: `teacher`, in float32" in card(table)
    assert str(tmp_path) not in card(table)
    assert str(tiny_teacher) not in card(table)
    head, _, body = card(table).removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head)["license"] == "unknown"
    path = tmp_path / "table" / "README.md"
    path.write_text(f"---\nlicense: apache-2.0\n---\nMine above.\n{body}Mine below.\n")
    newer = captured(tmp_path / "table", tiny_teacher, SECOND)
    assert newer.version > table.version
    assert f"describes its version {newer.version}." in card(newer)
    assert card(newer).startswith("---\nlicense: apache-2.0\n---\nMine above.\n")
    assert card(newer).endswith("Mine below.\n")
    assert card(newer).count("describes its version") == 1
    assert not verify(VerifyConfig(table=table.location)).orphans


def test_a_card_of_someone_else_stays_as_it_is(tiny_teacher: Path, tmp_path: Path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "README.md").write_text("# Mine\n")
    assert card(captured(tmp_path / "table", tiny_teacher, FIRST)) == "# Mine\n"


def test_reprocess_writes_the_card_of_a_new_table_and_maintain_that_of_an_old_one(tmp_path: Path):
    table = make_table(tmp_path / "table", identity())
    add(table, ["a", "b", "c"], "train")
    maintain(MaintainConfig(table=table.location), dry_run=True)
    assert not Path(table.location, "README.md").exists()
    maintain(MaintainConfig(table=table.location))
    assert "describes its version 1." in card(table)
    assert "| train | 3 |" in card(table)
    reprocess(ReprocessConfig(source=table.location, where="document_id = 'a'"))
    assert "describes its version 2." in card(table)
    assert "| train | 1 |" in card(table)
    report = reprocess(
        ReprocessConfig(source=table.location, destination=str(tmp_path / "new"), selection={"max_k": 2})
    )
    made = card(Table.open(str(tmp_path / "new")))
    assert f"describes its version {report.version}." in made
    assert "Reduced from a larger table" in made


def damage(table: Table) -> None:
    path = Path(table.location, table.shards()[0].path)
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)


@pytest.mark.parametrize(
    "change",
    [
        {"drop": "GONE"},
        {"where": "year > 0 AND document_id <> 'a'"},
        {"selection": {"max_k": 2}},
        {"shards": {"eval_fraction": 0.5}},
        {"purge": "GONE"},
        {"remove_damaged": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_verb_that_makes_a_version_writes_its_card_and_a_dry_run_does_not(tmp_path: Path, change: dict[str, Any]):
    table = make_table(tmp_path / "table", identity())
    add(table, ["a", "b", "c"], "train")
    add(table, ["d"], "train")
    maintain(MaintainConfig(table=table.location))
    (tmp_path / "gone").write_text("a\n")
    settings = {name: str(tmp_path / "gone") if value == "GONE" else value for name, value in change.items()}
    before, version = card(table), table.newest().version
    for dry_run in (True, False):
        if "remove_damaged" in change:
            damage(table.newest())
            verify(VerifyConfig(table=table.location, **settings), dry_run=dry_run)
        else:
            reprocess(ReprocessConfig.model_validate({"source": table.location, **settings}), dry_run=dry_run)
        assert (card(table) == before) is dry_run
    newest = Table.open(table.location)
    assert newest.version > version
    assert f"describes its version {newest.version}." in card(table)


def test_a_card_is_written_even_if_the_work_fails_after_a_commit_and_not_if_nothing_has_changed(tmp_path: Path):
    table = make_table(tmp_path / "table", identity())

    def stopped() -> None:
        with keeping_card(table.location):
            add(table, ["a"], "train")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert "describes its version 1." in card(table)
    Path(table.location, "README.md").unlink()
    with keeping_card(table.location):
        pass
    assert not Path(table.location, "README.md").exists()


def test_names_that_mean_something_in_markdown_are_escaped(tmp_path: Path):
    table = make_table(tmp_path / "<b>*x*|[y](z)`\n<!--", identity())
    update_card(table.location)
    _, _, body = card(table).partition("version; write above or below it -->")
    assert not {"<b>", "*x*", "[y](z)", "<!--"} & {part for part in ("<b>", "*x*", "[y](z)") if part in body}
    update_card(table.location)
    assert card(table).count("describes its version") == 1


@pytest.mark.parametrize("kind", ["a folder", "a link", "no text"])
def test_what_is_no_text_file_under_the_name_of_the_card_stays_as_it_is(tmp_path: Path, kind: str):
    table = make_table(tmp_path / "table", identity())
    path = Path(table.location, "README.md")
    (tmp_path / "elsewhere").write_text("mine")
    match kind:
        case "a folder":
            path.mkdir()
        case "a link":
            path.symlink_to(tmp_path / "elsewhere")
        case _:
            path.write_bytes(b"\xff\xfe")
    before = path.lstat()
    update_card(table.location)
    assert path.lstat() == before
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_card_that_can_not_be_written_is_an_error_that_says_that_the_rows_are_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table = make_table(tmp_path / "table", identity())
    add(table, ["a"], "train")

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(table.place), "write", fails)
    with pytest.raises(TableError, match=r"card can't be written; its rows are not affected(.|\n)*No space left"):
        update_card(table.location)
