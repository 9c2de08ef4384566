"""``softlabel verify`` and ``softlabel maintain`` on the command line, with a captured table."""

import shutil
from pathlib import Path

import pytest

from softlabel.flows.cli import run
from softlabel.pipeline.capturing.capture import capture
from softlabel.storage.errors import UsageError
from softlabel.storage.records.versions import tag, untag
from softlabel.storage.table import Table
from softlabel.storage.upkeep.verification import remove_damaged, verify
from tests.flows.commands import shown, softlabel
from tests.pipeline.capturing.test_capture import rows_of, settings, texts, write

pytestmark = pytest.mark.usefixtures("prefect")


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A folder with 150 documents and a table of them in several shards."""
    folder = tmp_path_factory.mktemp("captured")
    capture(settings(tiny_teacher, write(folder / "d.parquet", texts(150)), folder / "table"))
    return folder


@pytest.fixture
def table(captured: Path, tmp_path: Path) -> Path:
    """A copy of the table that a test may damage."""
    shutil.copytree(captured, tmp_path, dirs_exist_ok=True)
    return tmp_path / "table"


def test_an_undamaged_table_is_reported_as_intact(table: Path, capsys: pytest.CaptureFixture[str]):
    code, found, err = softlabel(capsys, "verify", table)
    assert (code, found["findings"], found["rows"]) == (0, [], 150)
    assert "verify" in err
    assert "is intact: " in shown(capsys, "verify", table, "--all-versions")


def test_damaged_shards_are_found_removed_and_captured_again(
    table: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
):
    """A flipped byte and a missing file: the error, the removal, and a capture of only the lost rows."""
    before = sorted(rows_of(table), key=str)
    shards = Table.open(str(table)).shards()
    flipped, missing = (table / shard.path for shard in shards[-2:])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    missing.unlink()

    code, error, err = softlabel(capsys, "verify", table)
    assert (code, error["error"]) == (1, "IntegrityError")
    assert {finding["path"] for finding in error["details"]["findings"]} == {shard.path for shard in shards[-2:]}
    assert err.count(flipped.name) >= 1
    assert "missing" in err
    assert f"softlabel verify {table} --remove-damaged" in err
    assert "Traceback" not in err

    code, report, _ = softlabel(capsys, "verify", table, "--remove-damaged")
    lost = sum(shard.rows for shard in shards[-2:])
    assert (code, report["removed_rows"]) == (0, lost)
    assert len(rows_of(table)) == 150 - lost

    report = capture(settings(tiny_teacher, table.parent / "d.parquet", table))
    assert report.sequences == lost
    assert sorted(rows_of(table), key=str) == before
    assert verify(Table.open(str(table))).findings == ()


def test_versions_are_tagged_opened_and_shown_by_name(table: Path, capsys: pytest.CaptureFixture[str]):
    newest = Table.open(str(table)).version
    code, report, _ = softlabel(capsys, "maintain", table, "--tag", "gold")
    assert (code, report["deletion"]) == (0, None)
    assert [(made["name"], made["version"]) for made in report["tags"]] == [("gold", newest)]
    assert "version 1 is needed by tag first" in shown(capsys, "maintain", table, "--tag", "first=1")
    assert softlabel(capsys, "maintain", f"{table}@1", "--tag", "also")[1]["tags"][0]["version"] == 1
    assert softlabel(capsys, "inspect", f"{table}@first")[1]["inspection"]["version"] == 1
    assert "needed by tag gold" in shown(capsys, "inspect", f"{table}@gold")
    history = softlabel(capsys, "history", table)[1]
    assert {made["name"] for made in history["tags"]} == {"gold", "first", "also"}
    assert "version 1 is needed by tag also, tag first" in shown(capsys, "history", table)

    code, error, _ = softlabel(capsys, "maintain", table, "--tag", "first")
    assert (code, error["error"]) == (1, "TableError")
    assert "a tag never moves" in error["message"]
    assert [made["name"] for made in softlabel(capsys, "maintain", table, "--untag", "also")[1]["tags"]] == [
        "first",
        "gold",
    ]
    code, error, _ = softlabel(capsys, "maintain", table, "--unpin", "nobody")
    assert (code, error["error"]) == (1, "TableNotFoundError")
    code, error, _ = softlabel(capsys, "maintain", f"{table}@99")
    assert (code, error["error"]) == (1, "TableNotFoundError")
    code, error, _ = softlabel(capsys, "inspect", f"{table}@golden")
    assert (code, error["error"]) == (1, "TableNotFoundError")
    assert f"did you mean {table}@gold?" in error["message"]


def test_a_capture_into_an_old_version_is_refused(table: Path, tiny_teacher: Path):
    for name in ("1", "gold"):
        with pytest.raises(UsageError, match="leave out the version or tag"):
            capture(settings(tiny_teacher, table.parent / "d.parquet", Path(f"{table}@{name}")))
    assert sorted(path.name for path in table.parent.glob("table*")) == ["table"]


def test_deleted_files_are_listed_with_their_bytes(table: Path, capsys: pytest.CaptureFixture[str]):
    orphan = table / "split=train" / f"{'0' * 32}.parquet"
    orphan.write_bytes(b"x" * 1234)
    assert f"softlabel maintain {table}" in shown(capsys, "verify", table)
    assert "1 file, 1.2 kB, spared" in shown(capsys, "maintain", table)
    assert "would be deleted" in shown(capsys, "maintain", table, "--grace-hours", "0", "--dry-run")
    assert orphan.exists()
    code, report, _ = softlabel(capsys, "maintain", table, "--grace-hours", "0")
    assert (code, [(gone["path"], gone["bytes"]) for gone in report["deletion"]["deleted"]]) == (
        0,
        [(f"split=train/{orphan.name}", 1234)],
    )
    assert not orphan.exists()
    assert "nothing to delete" in shown(capsys, "maintain", table, "--grace-hours", "0")


def test_a_vacuum_deletes_shards_of_old_versions_unless_tagged(table: Path, capsys: pytest.CaptureFixture[str]):
    damaged = Table.open(f"{table}@1").shards()[0]
    (table / damaged.path).write_bytes(b"x" * damaged.bytes)
    remove_damaged(verify(Table.open(str(table))))
    last = Table.open(str(table)).version
    tag(str(table), last - 1, "before")
    vacuum = ("maintain", table, "--vacuum", "--keep-versions", "1", "--grace-hours", "0")
    assert softlabel(capsys, *vacuum)[1]["deletion"]["deleted"] == []
    untag(str(table), "before")
    text = shown(capsys, *vacuum)
    assert damaged.path in text
    assert "can no longer be opened" in text
    assert f"vacuumed, and can no longer be opened: 1-{last - 1}" in shown(capsys, "history", table)
    code, error, _ = softlabel(capsys, "inspect", f"{table}@{last - 1}")
    assert (code, error["error"]) == (1, "TableNotFoundError")
    assert "was vacuumed" in error["message"]
    assert verify(Table.open(str(table)), all_versions=True).findings == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-versions", "2"], "vacuum"),
        (["--vacuum", "--keep-versions", "0"], "--keep-versions"),
        (["--tag", "a b"], "tag"),
        (["--tag", "gold=x"], "tag"),
        (["--grace-hours", "-1"], "grace_hours"),
    ],
)
def test_wrong_usage_is_refused_on_few_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert run(["maintain", "t", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) < 10


@pytest.mark.parametrize("verb", ["verify", "maintain"])
def test_a_missing_table_is_an_error_and_is_not_created(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, error, _ = softlabel(capsys, verb, tmp_path / "nowhere")
    assert (code, error["error"]) == (1, "TableNotFoundError")
    assert not (tmp_path / "nowhere").exists()
