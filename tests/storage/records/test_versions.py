"""Tags never move, pins protect versions, and vacuumed versions stay recorded."""

import json
from multiprocessing.queues import SimpleQueue as Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from softlabel.storage.errors import IntegrityError, TableError, TableNotFoundError, UsageError
from softlabel.storage.records import versions
from softlabel.storage.records.versions import Tag, parse, pin, pins, retire, spans, tag, tags, unpin, untag
from softlabel.storage.table import Table
from tests.storage.tables import PROCESSES, add, names_in, process


def at(table: Table, version: int) -> Table:
    return Table.open(f"{table.location}@{version}")


def test_a_tag_opens_its_version_for_good(filled: Table):
    tag(filled.location, 1, "gold")
    add(filled, ["c"])
    opened = Table.open(f"{filled.location}@gold")
    assert (opened.version, opened.location) == (1, filled.location)
    assert names_in(opened) == names_in(at(filled, 1))
    assert {name: made.version for name, made in tags(filled.location).items()} == {"gold": 1}


def test_a_tag_never_moves_silently(filled: Table):
    made = tag(filled.location, 1, "gold")
    assert tag(filled.location, 1, "gold") == made
    with pytest.raises(TableError, match=r"gold is already in use(.|\n)*version 1, tagged(.|\n)*--untag gold"):
        tag(filled.location, filled.version, "gold")
    assert untag(filled.location, "gold") == made
    assert tag(filled.location, filled.version, "gold").version == 2
    assert Table.open(f"{filled.location}@gold").version == 2


def test_an_unknown_tag_is_reported_with_the_closest_one(filled: Table):
    tag(filled.location, filled.version, "gold")
    with pytest.raises(TableNotFoundError, match=r"no tag golf(.|\n)*did you mean .*@gold\?"):
        Table.open(f"{filled.location}@golf")
    with pytest.raises(TableNotFoundError, match="no tag silver"):
        untag(filled.location, "silver")


@pytest.mark.parametrize("name", ["", "1st", "a/b", "../x", "a b", "ä", ".hidden", "a@b"])
def test_invalid_tag_names_are_refused(filled: Table, name: str):
    with pytest.raises(UsageError, match="not a valid name for a tag"):
        tag(filled.location, filled.version, name)
    assert tags(filled.location) == {}


def test_a_folder_with_an_at_in_its_name_is_a_folder(tmp_path: Path):
    (tmp_path / "a@b").mkdir()
    assert parse(f"{tmp_path}/a@b") == (f"{tmp_path}/a@b", None)
    assert parse(f"{tmp_path}/a@b@7") == (f"{tmp_path}/a@b", 7)
    assert parse(f"{tmp_path}/a@c") == (f"{tmp_path}/a", "c")


def tag_often(location: str, version: int, start: Barrier, results: Queue) -> None:
    """Give ten names to a version, each at the moment at which another process gives it to another version."""
    table, won, lost = Table.open(f"{location}@{version}"), [], []
    for n in range(10):
        start.wait(60)
        try:
            tag(table.location, table.version, f"tag{n}")
            won.append(n)
        except TableError as error:
            lost.append("a tag never moves" in str(error))
    results.put((won, lost))


def test_of_two_processes_that_want_one_tag_one_gets_it(filled: Table):
    """One gets the tag, the other an error; no tag is partly written or moved."""
    start, results = PROCESSES.Barrier(2), [PROCESSES.SimpleQueue() for _ in range(2)]
    for version, queue in enumerate(results, 1):
        process(tag_often, filled.location, version, start, queue).start()
    won, lost = zip(*(queue.get() for queue in results), strict=True)
    assert sorted(won[0] + won[1]) == list(range(10))
    assert lost[0] + lost[1] == [True] * 10
    for version, names in enumerate(won, 1):
        assert all(tags(filled.location)[f"tag{n}"].version == version for n in names)


def test_a_student_pins_the_version_that_it_read_last(filled: Table, tmp_path: Path):
    pin(filled.location, 1, tmp_path / "a")
    pin(filled.location, filled.version, tmp_path / "b")
    assert [(held.student, held.version) for held in pins(filled.location)] == [
        (str(tmp_path / "a"), 1),
        (str(tmp_path / "b"), 2),
    ]
    pin(filled.location, filled.version, tmp_path / "a")
    assert [held.version for held in pins(filled.location)] == [2, 2]
    assert unpin(filled.location, str(tmp_path / "a")).version == 2
    assert [held.student for held in pins(filled.location)] == [str(tmp_path / "b")]
    with pytest.raises(TableNotFoundError, match=str(tmp_path / "b")):
        unpin(filled.location, str(tmp_path / "a"))


def test_a_pin_is_released_by_the_path_that_was_typed(filled: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    pin(filled.location, filled.version, Path("runs/a"))
    unpin(filled.location, "runs/a")
    assert pins(filled.location) == []


def test_a_vacuumed_version_says_when_and_which_remain(filled: Table):
    add(filled, ["c"])
    retire(filled.location, [0, 2])
    with pytest.raises(TableNotFoundError, match=r"vacuumed(.|\n)*remains: 1, 3(.|\n)*vacuumed 20") as error:
        at(filled, 2)
    assert len(str(error.value).splitlines()) < 10
    assert at(filled, 1).version == 1
    assert filled.newest().version == 3


def test_a_version_with_a_tag_or_pin_is_not_retired(filled: Table, tmp_path: Path):
    tag(filled.location, 1, "gold")
    pin(filled.location, filled.version, tmp_path / "a")
    for needed in (1, 2):
        with pytest.raises(TableError, match="tagged or pinned a moment ago"):
            retire(filled.location, [0, needed])
    assert at(filled, 0).version == 0


@pytest.mark.parametrize(
    "hold",
    [
        lambda table: tag(table.location, table.version, "gold"),
        lambda table: pin(table.location, table.version, Path("a")),
    ],
)
def test_a_tag_or_pin_just_after_a_vacuum_is_refused_and_removed(filled: Table, hold):
    opened = at(filled, 1)
    retire(filled.location, [1])
    with pytest.raises(TableNotFoundError, match="vacuumed"):
        hold(opened)
    assert versions.needed(filled.location) == set()


def tag_each_version(location: str, start: Barrier, results: Queue) -> None:
    """Try to tag each of ten versions at the moment at which another process retires it."""
    held = []
    for version in range(10):
        table = Table.open(f"{location}@{version}")
        start.wait(60)
        try:
            held.append(tag(table.location, table.version, f"tag{version}"))
        except TableNotFoundError:
            held.append(None)
    results.put(held)


def test_no_version_is_both_tagged_and_vacuumed(table: Table):
    for n in range(10):
        add(table, [f"a{n}"])
    start, results = PROCESSES.Barrier(2), PROCESSES.SimpleQueue()
    PROCESSES.Process(target=tag_each_version, args=(table.location, start, results)).start()
    retired = []
    for version in range(10):
        start.wait(60)
        try:
            retire(table.location, [version])
            retired.append(version)
        except TableError:
            continue
    held: list[Tag | None] = results.get()
    for version in range(10):
        assert held[version] is None or version not in retired
        assert (f"tag{version}" in tags(table.location)) == (held[version] is not None)


def test_a_damaged_record_is_named(filled: Table):
    tag(filled.location, filled.version, "gold")
    path = Path(filled.location, "_softlabel/tags/gold.json")
    for content in ("", json.dumps({"name": "gold"})):
        path.write_text(content)
        with pytest.raises(IntegrityError, match=r"gold\.json"):
            Table.open(f"{filled.location}@gold")


def test_unwritable_records_are_reported(filled: Table, tmp_path: Path):
    for kind in ("tags", "pins"):
        Path(filled.location, "_softlabel", kind).write_text("a file where the folder should be")
    for hold in (
        lambda: tag(filled.location, filled.version, "gold"),
        lambda: pin(filled.location, filled.version, tmp_path / "a"),
    ):
        with pytest.raises(TableError, match="can't be written"):
            hold()


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2, 5"), ([5, 1, 2, 9, 8], "1-2, 5, 8-9")]
)
def test_versions_are_written_as_ranges(numbers, text):
    assert spans(numbers) == text
