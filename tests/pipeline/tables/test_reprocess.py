"""A table is narrowed, filtered and split again without its teacher, and equals what a capture would have made."""

import random
import signal
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from softlabel.pipeline import CaptureConfig, ReprocessConfig, ReprocessReport, reprocess
from softlabel.pipeline.progress import Progress
from softlabel.pipeline.sequences.chunking import split_of
from softlabel.storage.codec import decode
from softlabel.storage.errors import ProvenanceError, PurgedError, UsageError
from softlabel.storage.reader import index, read
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import last_capture
from tests.storage.tables import PROCESSES, add, identity, make_table, names_in

A = [f"a{i}" for i in range(40)]
B = [f"b{i}" for i in range(40)]
SMALL = {"positions": 150, "row_group_sequences": 16}


def two_sources(folder: Path) -> Table:
    """80 rows in two commits, of the sources a and b, with two temperatures."""
    made = make_table(folder, identity((1.0, 2.0)))
    add(made, A)
    add(made.newest(), B)
    return made.newest()


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return two_sources(tmp_path / "table")


def run(source: object, destination: object = None, **settings: Any) -> ReprocessReport:
    where = {"source": str(source), "destination": destination and str(destination)}
    return reprocess(ReprocessConfig.model_validate({**where, "shards": SMALL, **settings}))


def listed(path: Path, names: list[str]) -> str:
    path.write_text("".join(f"{name}\n" for name in names))
    return str(path)


def rows_of(table: Table, columns: list[str] | None = None) -> pa.Table:
    parts = [read(table, shard, columns) for shard in table.shards()]
    return pa.concat_tables(parts).sort_by("document_id")


def test_a_table_is_narrowed_to_fewer_ids_draws_and_temperatures(table: Table, tmp_path: Path) -> None:
    small = tmp_path / "small"
    report = run(table.location, small, selection={"max_k": 4, "draws": 3, "temperatures": [1.0]})
    assert (report.operation, report.version, report.rows.sequences) == ("narrow", 1, 80)
    made = Table.open(str(small))
    selection = made.identity.selection
    assert (selection.max_k, selection.min_k, selection.draws) == (4, 1, 3)
    assert made.identity.derived_from == table.identity.selection
    assert made.temperatures == (1.0,)
    before, after = (decode(rows_of(t), t.numbering) for t in (table, made))
    assert (after.head_counts == np.minimum(before.head_counts, 4)).all()
    assert set(after.tail_draws.tolist()) <= {1, 2, 3}
    assert (after.tail_log_masses[0] >= before.tail_log_masses[0]).all()
    for name in ("entropies", "next_logprobs", "token_ids"):
        assert rows_of(made, ["document_id", name]).equals(rows_of(table, ["document_id", name]))


def test_a_narrowed_table_is_never_mixed_with_captures(table: Table, tmp_path: Path) -> None:
    run(table.location, tmp_path / "small", selection={"max_k": 4})
    small = Table.open(str(tmp_path / "small"))
    captured = identity((1.0, 2.0), selection=small.identity.selection)
    with pytest.raises(ProvenanceError, match="derived_from"):
        small.identity.require(captured, "here")
    with pytest.raises(ProvenanceError, match="derived_from"):
        run(make_and_fill(tmp_path / "captured", captured), small.location)
    run(table.location, tmp_path / "colder", selection={"temperatures": [1.0]})
    Table.open(str(tmp_path / "colder")).identity.require(identity((1.0,)), "fewer temperatures are a capture's")


def make_and_fill(path: Path, what: Any) -> str:
    made = make_table(path, what)
    add(made, ["c1"])
    return made.location


def test_another_eval_fraction_splits_as_a_capture_would(table: Table, tmp_path: Path) -> None:
    run(table.location, tmp_path / "split", shards={**SMALL, "eval_fraction": 0.5})
    made = Table.open(str(tmp_path / "split"))
    assert made.identity.sequences.eval_fraction == 0.5
    found = index(made, ["document_id"]).to_pydict()
    assert found["split"] == [split_of(name, 0.5) for name in found["document_id"]]
    assert made.identity.derived_from is None, "as a capture would have split them"


def test_small_shards_are_merged_in_place(table: Table) -> None:
    before = rows_of(table)
    report = run(table.location, compact=True, shards={"positions": 100_000})
    newest = Table.open(table.location)
    assert [shard.split for shard in newest.shards()] == ["eval", "train"]
    assert rows_of(newest).select(before.column_names).equals(before)
    assert (report.rows.shards, report.rows.replaced) == (2, 4)
    again = run(table.location, compact=True, shards={"positions": 100_000})
    assert again.version == newest.version


def test_all_changes_can_be_combined(table: Table, tmp_path: Path) -> None:
    report = run(
        table.location,
        tmp_path / "all",
        where="source = 'a'",
        drop=listed(tmp_path / "ids", ["a1"]),
        compact=True,
        selection={"max_k": 2},
        shards={**SMALL, "eval_fraction": 0.0},
    )
    assert report.operation == "narrow + filter + drop + split + compact"
    made = Table.open(str(tmp_path / "all"))
    assert names_in(made) == sorted({*A} - {"a1"})
    assert {shard.split for shard in made.shards()} == {"train"}
    assert Table.open(table.location).version == 2


def test_run_again_reprocess_adds_only_new_rows(table: Table, tmp_path: Path) -> None:
    settings = {"where": "source = 'a'", "selection": {"max_k": 4}}
    first = run(table.location, tmp_path / "t", **settings)
    assert run(table.location, tmp_path / "t", **settings).version == first.version
    add(table, ["a-new", "b-new"])
    more = run(table.location, tmp_path / "t", **settings)
    assert (more.rows.sequences, more.rows.left, more.version) == (1, 40, first.version + 1)
    with pytest.raises(ProvenanceError, match=r"selection\.max_k"):
        run(table.location, tmp_path / "t", selection={"max_k": 3})


def test_an_old_version_can_be_copied_to_another_table_but_not_changed_in_place(table: Table, tmp_path: Path) -> None:
    run(f"{table.location}@1", tmp_path / "t")
    assert names_in(Table.open(str(tmp_path / "t"))) == sorted(A)
    with pytest.raises(UsageError, match="old version can't be changed in place"):
        run(f"{table.location}@1", where="source = 'a'")
    with pytest.raises(UsageError, match="the same folder"):
        run(table.location, f"{table.location}/../table", where="source = 'a'")


def test_no_table_is_made_if_no_row_is_left(table: Table, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no row would be left; nothing was changed"):
        run(table.location, tmp_path / "t", where="source = 'nowhere'")
    assert not (tmp_path / "t").exists()


def test_a_copy_records_the_sources_teacher(table: Table, tmp_path: Path) -> None:
    from softlabel.storage.writer import ShardWriter
    from tests.storage.tables import rows

    with ShardWriter(table) as writer:
        writer.append(*rows(["c1"], temperatures=2))
        writer.commit({"operation": "capture", "teacher": "models/large", "parameters": 7})
    run(table.location, tmp_path / "t")
    about = last_capture(Table.open(str(tmp_path / "t")))
    assert (about.teacher, about.parameters, about.operation) == ("models/large", 7, "copy")
    assert about.source == f"{table.location}@3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"purge": "ids", "selection": {"max_k": 4}}, "leave out selection.max_k"),
        (
            {"purge": "ids", "compact": True},
            "purge can't be combined with other changes or a destination; leave out compact",
        ),
        ({"purge": "ids", "destination": "t"}, "leave out the destination"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ReprocessConfig.model_validate({"source": "t", **settings})


@pytest.mark.parametrize(
    "selection",
    [{"max_k": 9}, {"draws": 7}, {"max_k": 0, "draws": 0}, {"temperatures": [1.0, 3.0]}, {"temperatures": [2.0, 1.0]}],
)
def test_a_selection_larger_than_the_tables_is_refused(table: Table, tmp_path: Path, selection: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="can't be used to narrow this table"):
        run(table.location, tmp_path / "t", selection=selection)
    assert not (tmp_path / "t").exists()


def test_progress_reaches_the_total(table: Table, tmp_path: Path) -> None:
    seen: list[Progress] = []
    reprocess(ReprocessConfig(source=table.location, destination=str(tmp_path / "t")), seen.append)
    assert (seen[-1].done, seen[-1].total) == (80, 80)
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)


def test_purged_documents_are_gone_and_stay_refused(table: Table, tmp_path: Path) -> None:
    report = run(table.location, purge=listed(tmp_path / "ids", ["a1"]))
    assert report.purged is not None
    assert (report.operation, report.purged.found, report.rows.dropped) == ("purge", 1, 1)
    with pytest.raises(PurgedError):
        Table.open(f"{table.location}@2")
    run(table.location, tmp_path / "t")
    assert add(Table.open(str(tmp_path / "t")), ["a1"]).sequences == 0, "a table made from it refuses the document, too"


def in_a_process(settings: dict[str, Any]) -> None:
    reprocess(ReprocessConfig.model_validate(settings))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_killed_run_leaves_the_table_usable_and_finishes_when_run_again(in_place: bool, tmp_path: Path) -> None:
    """Until everything is done, the destination is empty, or the source unchanged; the result is as if never killed."""
    source = make_table(tmp_path / "source", identity())
    for start in range(0, 400, 80):
        add(source.newest(), [f"d{i}" for i in range(start, start + 80)])
    settings = {"source": source.location, "selection": {"max_k": 3}, "shards": SMALL}
    reprocess(ReprocessConfig.model_validate({**settings, "destination": str(tmp_path / "whole")}))
    chance, died, window, result = random.Random(0), 0, 0.05, source.location
    if not in_place:
        settings["destination"] = result = str(tmp_path / "t")
    for _ in range(6):
        worker = PROCESSES.Process(target=in_a_process, args=(settings,))
        worker.start()
        time.sleep(chance.uniform(0, window))
        worker.kill()
        worker.join()
        died += worker.exitcode == -signal.SIGKILL
        window *= 1.6  # however fast or busy the machine is, the first dies, and later ones get further
        if Table.exists(result):
            newest = Table.open(result)
            assert len(names_in(newest)) in ((400,) if in_place else (0, 400))
            if len(newest.shards()):
                heads = decode(rows_of(newest), newest.numbering).head_counts
                assert heads.max() == newest.identity.selection.max_k, "labels and identity change together"
    assert died
    in_a_process(settings)
    made, whole = Table.open(result), Table.open(str(tmp_path / "whole"))
    assert made.identity == whole.identity
    assert [shard.path for shard in made.shards()] == [shard.path for shard in whole.shards()]


def few_documents(folder: Path) -> Path:
    path = folder / "documents.parquet"
    texts = [f"Number {i} is what this document is about, and {i * i} is its square. " * (1 + i % 3) for i in range(12)]
    pq.write_table(pa.table({"id": [f"d{i}" for i in range(12)], "text": texts}), path)
    return path


def capture_settings(teacher: Path, documents: Path, table: Path, top_k: int) -> CaptureConfig:
    return CaptureConfig.model_validate(
        {
            "documents": str(documents),
            "table": str(table),
            "teacher": {"model": str(teacher), "dtype": "float32"},
            "sequences": {"max_tokens": 128, "chat_template_date": date(2026, 1, 1)},
            "selection": {"top_k": top_k, "temperatures": [1.0, 2.0]},
        }
    )


def test_a_narrowed_table_equals_a_capture_with_fewer_ids(tiny_teacher: Path, tmp_path: Path) -> None:
    from softlabel.pipeline import capture

    for k in (64, 16):
        capture(capture_settings(tiny_teacher, few_documents(tmp_path), tmp_path / f"k{k}", k))
    run(tmp_path / "k64", tmp_path / "from-64", selection={"max_k": 16})
    derived, captured = (Table.open(str(tmp_path / name)) for name in ("from-64", "k16"))
    ids = [decode(rows_of_capture(t), t.numbering) for t in (derived, captured)]
    assert (ids[0].head_ids == ids[1].head_ids).all()
    for name in set(SOFT_LABELS.names) - {"tail_log_masses", "head_ids"}:
        assert rows_of_capture(derived).column(name).equals(rows_of_capture(captured).column(name)), name
    assert np.abs(ids[0].tail_log_masses - ids[1].tail_log_masses).max() <= 1 / 64


def rows_of_capture(table: Table) -> pa.Table:
    parts = [read(table, shard) for shard in table.shards()]
    return pa.concat_tables(parts).sort_by([("document_id", "ascending"), ("chunk", "ascending")])


def test_a_capture_obeys_the_refuse_list(tiny_teacher: Path, tmp_path: Path) -> None:
    from softlabel.pipeline import capture

    settings = capture_settings(tiny_teacher, few_documents(tmp_path), tmp_path / "t", 8)
    first = capture(settings)
    name = names_in(Table.open(first.table))[0]
    run(first.table, purge=listed(tmp_path / "ids", [name]))
    again = capture(settings.model_copy(update={"strict": True}))
    assert (again.sequences, again.taken_down, again.unchanged) == (0, 1, first.documents - 1)
    assert (again.rejects, again.rejects_file) == (0, None), "it can be used, and its name is written nowhere"
    assert name not in names_in(Table.open(first.table))
