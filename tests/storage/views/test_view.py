"""Views: the rows they have, which tables can be combined, and that a changed table or damaged view is an error."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabel.storage.codec import decode
from softlabel.storage.errors import IntegrityError, ProvenanceError, TableError, TableNotFoundError, UsageError
from softlabel.storage.identity import SelectionIdentity
from softlabel.storage.reader import read
from softlabel.storage.records.sealed_json import seal, unseal
from softlabel.storage.records.versions import pins
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep.verification import remove_damaged, verify
from softlabel.storage.views import mixing
from softlabel.storage.views.mixing import make_view
from softlabel.storage.views.row_groups import column_of, load, outlines
from softlabel.storage.views.view import View, open_table
from tests.numberings import by_id
from tests.storage.tables import add, identity, make_table

ALL = ["document_id", "key", "token_ids", "positions", *SOFT_LABELS.names]
NAMES = [f"d{i}" for i in range(60)]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Table]:
    """Three tables with different rankings and orders of rows; the last has no draws and only one temperature."""
    folder = tmp_path_factory.mktemp("tables")
    plain = SelectionIdentity(top_p=1.0, min_k=8, max_k=8, draws=0, seed=0)
    made = [
        make_table(folder / "a", identity((1.0, 2.0)), seed=0),
        make_table(folder / "b", identity((1.0, 4.0)), seed=1),
        make_table(folder / "c", identity((1.0,), selection=plain), seed=2),
    ]
    add(made[0], NAMES[:40])
    add(made[1], NAMES[:9:-1])
    add(made[1].newest(), ["e1", "e2"])
    add(made[2], NAMES[:5])
    return [table.newest() for table in made]


def mixed(tables: list[Table], folder: Path, how: str, weights: tuple[float, ...] = (1.0, 1.0)) -> View:
    return make_view(str(folder / "view"), [table.location for table in tables], weights, how)


def rows_by_document(view: View) -> dict[str, list[pa.Table]]:
    found: dict[str, list[pa.Table]] = {}
    for group, small in outlines(view, ["document_id"]):
        rows = load(view, group, ALL)
        assert rows.column("document_id").equals(small.column("document_id"))
        for i, name in enumerate(rows.column("document_id").to_pylist()):
            found.setdefault(name, []).append(rows.slice(i, 1))
    return found


def stored(table: Table) -> dict[str, pa.Table]:
    parts = [read(table, shard, ALL) for shard in table.shards()]
    names = [name for part in parts for name in part.column("document_id").to_pylist()]
    rows = pa.concat_tables(parts)
    return {name: rows.slice(i, 1) for i, name in enumerate(names)}


def assert_same_labels(found: pa.Table, view: View, row: pa.Table, table: Table) -> None:
    ours, theirs = by_id(decode(found, view.numbering)), by_id(decode(row, table.numbering))
    for name in ("head_ids", "head_logprobs", "tail_ids", "tail_draws", "entropies", "next_logprobs"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    wanted = [table.temperatures.index(T) for T in view.temperatures]
    np.testing.assert_array_equal(ours.tail_log_masses, theirs.tail_log_masses[wanted])


def test_a_concatenation_has_every_row_of_every_table(tables, tmp_path):
    view = pickle.loads(pickle.dumps(mixed(tables, tmp_path, "concatenate", (1, 2, 0.5))))
    assert (view.weights, view.temperatures, view.draws) == ((1, 2, 0.5), (1.0,), False)
    assert mixed(tables[:2], tmp_path / "2", "concatenate").draws
    found = rows_by_document(view)
    for table in tables:
        for name, row in stored(table).items():
            assert_same_labels(found[name].pop(0), view, row, table)
    assert not any(found.values())


def test_an_average_has_the_soft_labels_of_all_tables_for_their_common_sequences(tables, tmp_path):
    view = open_table(mixed(tables[:2], tmp_path, "average", (3, 1)).location)
    assert (view.weights, view.temperatures, view.draws) == ((0.75, 0.25), (1.0,), True)
    assert (view.alignment.sequences, view.alignment.left_out) == (30, 32)
    found = rows_by_document(view)
    assert sorted(found) == sorted(NAMES[10:40])
    sources = [stored(table) for table in view.tables]
    for name, (row,) in found.items():
        for number, table in enumerate(view.tables):
            columns = [row.column(column_of(column, number)) for column in SOFT_LABELS.names]
            assert_same_labels(pa.table(columns, SOFT_LABELS.names), view, sources[number][name], table)


def test_a_split_of_a_view_has_the_rows_of_that_split_of_its_tables(tables, tmp_path):
    for how, sources in (("concatenate", tables[:2]), ("average", tables[:1])):
        view = mixed(tables[:2], tmp_path / how, how)
        held = sum(len(rows) for _, rows in outlines(view, ["key"], "eval"))
        expected = sum(shard.rows for table in sources for shard in table.shards("eval"))
        assert 0 < held <= expected
        assert held == expected or how == "average"
        assert {group.shard.split for group, _ in outlines(view, ["key"], "eval")} == {"eval"}


def test_making_a_view_again_changes_nothing_and_a_different_one_is_refused(tables, tmp_path):
    view = mixed(tables[:2], tmp_path, "average")
    before = Path(view.location, "view.json").read_bytes()
    mixed(tables[:2], tmp_path, "average")
    assert Path(view.location, "view.json").read_bytes() == before
    for other in ((tables[:2], "concatenate", (1.0, 1.0)), (tables[:2], "average", (1.0, 2.0))):
        with pytest.raises(UsageError, match="a view never changes"):
            mixed(other[0], tmp_path, other[1], other[2])
    (tmp_path / "else" / "view" / "split=train").mkdir(parents=True)
    (tmp_path / "else" / "view" / "split=train" / "shard").write_text("")
    with pytest.raises(UsageError, match="the folder for the view is not empty"):
        mixed(tables[:2], tmp_path / "else", "average")
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "view").write_text("")
    with pytest.raises(TableError, match="the view can't be written"):
        mixed(tables[:2], tmp_path / "file", "average")
    with pytest.raises(UsageError, match="given twice"):
        mixed([tables[0], tables[0]], tmp_path / "twice", "concatenate")


def test_a_view_pins_the_versions_of_its_tables_and_reads_only_these(tmp_path):
    made = [make_table(tmp_path / name, identity()) for name in "ab"]
    for table in made:
        add(table, NAMES[:5])
    view = mixed(made, tmp_path, "concatenate")
    add(made[0].newest(), NAMES[5:])
    assert len(rows_by_document(open_table(view.location))) == 5
    (pin,) = pins(made[0].location)
    assert (pin.kind, pin.student, pin.version) == ("view", view.location, 1)


@pytest.mark.parametrize("field", ["vocabulary", "tokenizer.files"])
def test_tables_whose_token_ids_differ_in_meaning_are_refused(tables, tmp_path, field):
    tokenizer = identity().tokenizer.model_copy(update={"files": "x1"})
    changes, message = {
        "vocabulary": ({"vocabulary": 299}, "vocabulary: 300 against 299"),
        "tokenizer.files": ({"tokenizer": tokenizer}, "tokenizer.files: f3 against x1"),
    }[field]
    other = make_table(tmp_path / "other", identity(**changes))
    with pytest.raises(ProvenanceError, match=message):
        mixed([tables[0], other], tmp_path, "concatenate")
    assert not (tmp_path / "view").exists()
    assert not pins(other.location)


def test_a_biased_or_empty_average_is_refused(tables, tmp_path):
    with pytest.raises(ProvenanceError, match=r"heads of at most 8 of 300 ids, and no draws"):
        mixed([tables[0], tables[2]], tmp_path, "average")
    chunked = identity().sequences.model_copy(update={"max_tokens": 7})
    other = make_table(tmp_path / "other", identity(sequences=chunked))
    add(other, ["f1", "f2"])
    with pytest.raises(TableError, match=r"no sequence in common(.|\n)*sequences.max_tokens: 1024 against 7"):
        mixed([tables[0], other.newest()], tmp_path, "average")
    assert not (tmp_path / "view").exists()


def test_a_view_can_only_be_read(tables, tmp_path):
    view = mixed(tables[:2], tmp_path, "average")
    assert Table.exists(view.location)
    with pytest.raises(UsageError, match="can only be read"):
        Table.open(view.location)
    with pytest.raises(UsageError, match="can only be read"):
        make_view(str(tmp_path / "nested"), [view.location, tables[0].location], (1, 1), "average")
    assert open_table(f"{view.location}@0").content == view.content
    with pytest.raises(TableNotFoundError, match="no versions"):
        open_table(f"{view.location}@3")


def test_a_changed_table_or_a_damaged_view_is_an_error(tmp_path):
    made = [make_table(tmp_path / name, identity()) for name in "ab"]
    for table in made:
        add(table, NAMES[:5])
    view = mixed([table.newest() for table in made], tmp_path, "average")
    (tmp_path / "a").rename(tmp_path / "away")
    with pytest.raises(TableNotFoundError, match="no soft-label table here"):
        open_table(view.location)
    add(make_table(tmp_path / "a", identity()), NAMES[:6])
    with pytest.raises(IntegrityError, match="has changed since the view was made"):
        open_table(view.location)
    file = Path(view.location, "view.json")
    content = unseal(file.read_bytes())
    weightless = [{**part, "weight": 0} for part in content["parts"]]
    broken = ({**content, "parts": [{"table": "a"}]}, {"format": 1}, {**content, "parts": []}, {**content, "how": "?"})
    heavier = file.read_bytes().replace(b'"weight": 1.0', b'"weight": 2.0')
    assert heavier != file.read_bytes()
    for damage in (b"{", b"[]", b"null", heavier, *map(seal, broken), seal({**content, "parts": weightless})):
        file.write_bytes(damage)
        with pytest.raises(IntegrityError, match="the view can't be read"):
            open_table(view.location)
    file.write_bytes(seal({**content, "format": 2}))
    with pytest.raises(TableError, match="another version of softlabel"):
        open_table(view.location)


@pytest.mark.parametrize("quicker", ["before the pins", "before the file"])
def test_of_two_different_views_at_one_location_one_is_made(tables, tmp_path, monkeypatch, quicker: str):
    """The other gets an error, and each table keeps the pin that the view needs, or none."""
    a, b, c = (table.location for table in tables)
    location, step = str(tmp_path / "view"), {"before the pins": "pin", "before the file": "_write"}[quicker]
    real = getattr(mixing, step)

    def late(*args: object) -> object:
        monkeypatch.setattr(mixing, step, real)
        make_view(location, [f"{b}@1", c], (1, 1), "concatenate")
        return real(*args)

    monkeypatch.setattr(mixing, step, late)
    with pytest.raises(UsageError, match="a different view here already"):
        make_view(location, [a, b], (1, 1), "concatenate")
    assert [table.version for table in open_table(location).tables] == [1, 1]
    held = {name: [pin.version for pin in pins(name) if pin.student == location] for name in (a, b, c)}
    assert held == {a: [], b: [1], c: [1]}


def test_a_view_that_cannot_be_made_leaves_no_pin(tables, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match="can't be written"):
        make_view(str(tmp_path / "file" / "view"), [table.location for table in tables[:2]], (1, 1), "concatenate")
    assert not [pin for table in tables for pin in pins(table.location) if str(tmp_path) in pin.student]


def test_a_damaged_shard_of_any_table_stops_the_reader(tmp_path):
    made = [make_table(tmp_path / name, identity()) for name in "ab"]
    for table in made:
        add(table, NAMES[:20], "train")
    view = mixed(made, tmp_path, "average")
    shard = view.tables[1].shards()[0]
    path = Path(view.tables[1].location, shard.path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=path.name):
        rows_by_document(open_table(view.location))
    remove_damaged(verify(Table.open(view.tables[1].location)))
    with pytest.raises(IntegrityError, match=path.name):
        rows_by_document(open_table(view.location))
