"""A table of format 1 can be used as ever, except that no rows are added; it becomes one of format 2 at any time."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.tables import ReprocessConfig, VerifyConfig
from softlabel.pipeline.progress import Progress
from softlabel.pipeline.tables.reprocess import reprocess
from softlabel.pipeline.tables.verify import verify
from softlabel.storage.codec import decode
from softlabel.storage.errors import TableError, UsageError
from softlabel.storage.labels import SoftLabels
from softlabel.storage.reader import read, stored
from softlabel.storage.records.versions import remaining, untag
from softlabel.storage.schema import FORMAT
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import inspect
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.views.mixing import make_view
from softlabel.storage.views.row_groups import load, outlines
from tests import format_1
from tests.numberings import by_id, random_numbering

TABLES = ("text", "chats", "classes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return format_1.unpack(tmp_path)


def labels_of(table: Table) -> dict[tuple[str, int], SoftLabels]:
    """The soft labels of each row, by document and chunk."""
    found = {}
    for shard in table.shards():
        rows = read(table, shard)
        for i in range(len(rows)):
            row = rows.slice(i, 1)
            name = row.column("document_id")[0].as_py(), row.column("chunk")[0].as_py()
            found[name] = by_id(decode(row, table.numbering))
    return found


def with_teacher(folder: Path) -> VerifyConfig:
    teacher = {"model": str(folder / "teacher"), "dtype": "float32"}
    return VerifyConfig.model_validate({"table": str(folder / "text"), "teacher": teacher, "sequences": 4})


def assert_same_labels(found: Table, expected: Table) -> None:
    ours, theirs = labels_of(found), labels_of(expected)
    assert ours.keys() == theirs.keys()
    for name, labels in ours.items():
        for field in set(vars(labels)) - {"tail_logprobs"}:
            np.testing.assert_array_equal(getattr(labels, field), getattr(theirs[name], field), err_msg=field)


@pytest.mark.parametrize("name", TABLES)
def test_it_is_read_as_the_first_edition_of_the_specification_says(folder: Path, name: str) -> None:
    table = Table.open(str(folder / name))
    assert table.format == 1
    ours, count = labels_of(table), len(table.temperatures)
    (path,) = (folder / name / "_softlabel").glob("vocabulary-*")
    vocabulary = pq.read_table(path).column("token_id").to_pylist()
    for shard in table.shards():
        for row in stored(table, shard).to_pylist():
            heads, tails, masses, entropies, following = zip(*format_1.decode(row, vocabulary, count), strict=True)
            labels = ours[row["document_id"], row["chunk"]]
            assert [token for head in heads for token, _ in head] == labels.head_ids.tolist()
            np.testing.assert_allclose([x for head in heads for _, x in head], labels.head_logprobs, atol=1e-5)
            sorted_tails = [entry for tail in tails for entry in sorted(tail)]
            assert [entry[0] for entry in sorted_tails] == labels.tail_ids.tolist()
            assert [entry[1] for entry in sorted_tails] == labels.tail_draws.tolist()
            np.testing.assert_array_equal([entry[2] for entry in sorted_tails], labels.tail_logprobs)
            np.testing.assert_array_equal(masses, labels.tail_log_masses.T)
            np.testing.assert_array_equal(entropies, labels.entropies)
            np.testing.assert_array_equal(following, labels.next_logprobs)


def test_it_is_verified_inspected_and_opened_at_its_tag(folder: Path) -> None:
    report = verify(with_teacher(folder))
    assert not report.findings
    assert report.recheck is not None
    assert inspect(Table.open(str(folder / "text"))).columns["tail_codes"].bytes > 0
    assert Table.open(f"{folder}/text@first").version == 1


def test_a_capture_into_it_is_refused_with_the_command_that_changes_it(folder: Path) -> None:
    pq.write_table(pa.table({"id": ["new"], "text": ["A new document."]}), folder / "new.parquet")
    settings = {"documents": str(folder / "new.parquet"), "table": str(folder / "text")}
    settings |= {"teacher": {"model": str(folder / "teacher"), "dtype": "float32"}, "columns": {"id": "id"}}
    with pytest.raises(TableError, match=f"softlabel reprocess {folder}/text"):
        capture(CaptureConfig.model_validate(settings))
    reprocess(ReprocessConfig(source=str(folder / "text")))
    pq.write_table(pa.table({"id": ["new"], "text": ["A new document."], "year": [2030]}), folder / "new.parquet")
    report = capture(CaptureConfig.model_validate(settings))
    assert report.sequences == 1
    table = Table.open(str(folder / "text"))
    assert not verify(VerifyConfig(table=table.location)).findings


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_reprocess_changes_it_in_place_as_one_version(
    folder: Path, name: str, clustered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if clustered:  # as a large table's would be
        monkeypatch.setattr("softlabel.storage.sidecars.fit", lambda sample, vocabulary: random_numbering(vocabulary))
    before = Table.open(str(folder / name))
    report = reprocess(ReprocessConfig(source=before.location))
    after = Table.open(before.location)
    assert (report.operation, after.format, after.version) == ("format", FORMAT, before.version + 1)
    assert after.identity == before.identity
    assert len(after.numbering.lists) == (3 if clustered else 1)
    assert_same_labels(after, before)
    assert not verify(VerifyConfig(table=after.location, all_versions=True)).findings
    with pytest.raises(UsageError, match="nothing to do"):
        reprocess(ReprocessConfig(source=before.location))


def known_draws(table: Table, split: str) -> NDArray[np.bool_]:
    """Whether the table has the log-probability of each draw in a split."""
    values = [decode(read(table, shard), table.numbering).tail_logprobs for shard in table.shards(split)]
    return ~np.isnan(np.concatenate(values))


def test_a_changed_table_keeps_the_draws_log_probabilities_in_the_eval_split(folder: Path) -> None:
    reprocess(ReprocessConfig(source=str(folder / "text")))
    table = Table.open(str(folder / "text"))
    assert known_draws(table, "eval").all()
    assert not known_draws(table, "train").any()
    assert not verify(with_teacher(folder)).findings
    with pytest.raises(UsageError, match=r"selection.tail_logprobs(.|\n)*the only split in which they are stored"):
        reprocess(of_all_draws(folder))


def of_all_draws(folder: Path, **more: object) -> ReprocessConfig:
    settings = {"source": str(folder / "text"), "selection": {"tail_logprobs": "all"}, **more}
    return ReprocessConfig.model_validate(settings)


def test_a_changed_table_keeps_all_log_probabilities_of_draws_if_asked_to(folder: Path) -> None:
    before = Table.open(str(folder / "text"))
    old = labels_of(before)
    reprocess(of_all_draws(folder, destination=str(folder / "new")))
    reprocess(of_all_draws(folder))
    for name in ("text", "new"):
        after = Table.open(str(folder / name))
        assert (after.format, after.identity.tail_logprobs) == (FORMAT, "all")
        assert after.identity.model_copy(update={"tail_logprobs": "eval"}) == before.identity
        for row, labels in labels_of(after).items():
            for field, values in vars(labels).items():
                np.testing.assert_array_equal(values, getattr(old[row], field), err_msg=field)
        assert not verify(VerifyConfig(table=after.location)).findings
    reprocess(of_all_draws(folder, selection={"tail_logprobs": "eval"}))
    after = Table.open(str(folder / "text"))
    assert after.identity == before.identity
    assert known_draws(after, "eval").all()
    assert not known_draws(after, "train").any()


def test_a_dry_run_says_what_the_change_would_do_and_writes_nothing(folder: Path) -> None:
    before = {path: path.stat() for path in (folder / "text").rglob("*")}
    table = Table.open(str(folder / "text"))
    report = reprocess(ReprocessConfig(source=table.location), dry_run=True)
    assert {path: path.stat() for path in (folder / "text").rglob("*")} == before
    assert (report.operation, report.dry_run, report.version) == ("format", True, table.version + 1)
    done = reprocess(ReprocessConfig(source=table.location))
    assert done.version == report.version
    for name in ("sequences", "positions", "left", "dropped", "shards", "replaced"):
        assert getattr(report.rows, name) == getattr(done.rows, name), name


@pytest.mark.parametrize("changes", [{}, {"selection": {"max_k": 2, "draws": 6}}, {"where": "year >= 2005"}])
def test_reprocess_makes_a_new_table_and_continues_if_it_was_killed(folder: Path, changes: dict[str, object]) -> None:
    config = ReprocessConfig.model_validate(
        {"source": str(folder / "text"), "destination": str(folder / "new"), "shards": {"positions": 200}, **changes}
    )

    def killed(progress: Progress) -> None:
        if progress.done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reprocess(config, killed)
    made = {file.name for file in (folder / "new/_softlabel/rewritten").iterdir()}
    assert made
    reprocess(config)
    new = Table.open(str(folder / "new"))
    assert new.format == FORMAT
    assert {name.partition("-")[2] for name in made} <= {Path(shard.path).name for shard in new.shards()}
    if not changes:
        assert_same_labels(new, Table.open(str(folder / "text")))
    assert not verify(VerifyConfig(table=new.location)).findings


def test_a_vacuum_of_a_changed_table_leaves_no_version_without_its_vocabulary(folder: Path) -> None:
    """Not even the first version, which has no rows."""
    location = str(folder / "text")
    untag(location, "first")
    reprocess(ReprocessConfig(source=location))
    foreseen = maintain(location, keep_versions=1, grace_hours=0, dry_run=True).vacuumed
    assert maintain(location, keep_versions=1, grace_hours=0).vacuumed == foreseen == (0, 1, 2)
    for version in remaining(location):
        assert Table.open(f"{location}@{version}").numbering is not None
    with pytest.raises(TableError, match="vacuumed"):
        Table.open(f"{location}@0")


@pytest.mark.parametrize("settings", [{}, {"purge": "gone.txt"}])
def test_maintenance_during_a_long_change_does_not_cost_the_new_vocabulary(
    folder: Path, settings: dict[str, str]
) -> None:
    """No version names it before the commit, so it is deleted if the change takes longer than the grace period."""
    (folder / "gone.txt").write_text("something else\n")
    table = Table.open(str(folder / "text"))

    def delete_unused(progress: Progress) -> None:
        for path in Path(table.location, "_softlabel").glob("vocabulary-*"):
            if path.name != table.vocabulary_name:
                path.unlink()

    given = {name: str(folder / value) for name, value in settings.items()}
    reprocess(ReprocessConfig(source=table.location, **given), delete_unused)
    newest = Table.open(table.location)
    assert newest.format == FORMAT
    assert not verify(VerifyConfig(table=newest.location)).findings
    assert_same_labels(newest, table)


def test_documents_are_taken_down_from_it(folder: Path) -> None:
    table = Table.open(str(folder / "text"))
    gone = next(name for name, _ in labels_of(table))
    (folder / "gone.txt").write_text(f"{gone}\n")
    reprocess(ReprocessConfig(source=table.location, purge=str(folder / "gone.txt")))
    newest = Table.open(table.location)
    assert newest.format == FORMAT
    assert gone not in {name for name, _ in labels_of(newest)}


@pytest.mark.parametrize("how", ["concatenate", "average"])
def test_it_is_mixed_with_a_table_of_format_2(folder: Path, how: str) -> None:
    old = Table.open(str(folder / "text"))
    reprocess(ReprocessConfig(source=old.location, destination=str(folder / "new")))
    view = make_view(str(folder / "view"), [old.location, str(folder / "new")], [1, 1], how)
    columns = ["document_id", "positions", "head_counts", "head_ids", "tail_counts", "tail_ids", "tail_draws"]
    rows = {}
    for group, _ in outlines(view, ["key"]):
        for row in load(view, group, columns).to_pylist():
            rows.setdefault(row["document_id"], []).append(row)
    for found in rows.values():
        if how == "concatenate":
            first, second = (found[: len(found) // 2], found[len(found) // 2 :])
            assert sorted(map(str, first)) == sorted(map(str, second))
        else:
            assert all(row[f"{name}:1"] == row[name] for row in found for name in columns[2:])


def test_its_labels_are_complete_in_memory(folder: Path) -> None:
    """What the tests above compare is not empty."""
    labels = SoftLabels.concatenate(list(labels_of(Table.open(str(folder / "text"))).values()))
    assert labels.tail_log_masses.shape[0] == 2
    assert labels.tail_draws.sum() > 1000
