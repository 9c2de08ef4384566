"""An export holds what the table holds, is whole or not there, and explains itself."""

import re
import shutil
import subprocess
import sys
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from softlabel.pipeline.config.export import ExportConfig
from softlabel.pipeline.config.tables import MixConfig
from softlabel.pipeline.tables import export as module
from softlabel.pipeline.tables import export_files
from softlabel.pipeline.tables.export import ExportReport, export
from softlabel.pipeline.tables.mix import mix
from softlabel.storage.codec import decode
from softlabel.storage.errors import UsageError
from softlabel.storage.labels import SoftLabels
from softlabel.storage.reader import read
from softlabel.storage.table import Table
from tests.conftest import ROOT
from tests.pipeline.classifiers import save_classifier
from tests.pipeline.tables.conftest import HOSTILE, captured


def exported(table: Table | str, output: Path, **settings: Any) -> ExportReport:
    location = table if isinstance(table, str) else table.location
    return export(ExportConfig.model_validate({"table": location, "output": str(output), **settings}))


def rows_of(output: Path, split: str = "*") -> list[dict[str, Any]]:
    """All rows of an export in Parquet, by document, chunk and tokens."""
    rows = pl.read_parquet(output / "data" / f"{split}-*.parquet").to_dicts()
    return sorted(
        rows, key=lambda row: (row.get("document_id"), row.get("chunk"), row.get("token_ids") or row["input_ids"])
    )


def stored(table: Table, split: str | None = None) -> list[tuple[dict[str, Any], SoftLabels]]:
    """All rows of a table in the same order, each with its soft labels."""
    found = []
    for shard in table.shards(split):
        rows = read(table, shard)
        found += [
            (rows.slice(i, 1).to_pylist()[0], decode(rows.slice(i, 1), table.numbering)) for i in range(len(rows))
        ]
    return sorted(found, key=lambda pair: (pair[0]["document_id"], pair[0]["chunk"], pair[0]["token_ids"]))


def by_position(counts: Any, values: Any) -> list[list[Any]]:
    return [part.tolist() for part in np.split(values, np.cumsum(counts)[:-1])]


def test_plain_parquet_has_every_value_of_the_table(texts: Table, tmp_path: Path):
    report = exported(texts, tmp_path / "out")
    found, expected = rows_of(tmp_path / "out"), stored(texts)
    assert len(found) == len(expected) == sum(split.sequences for split in report.splits.values())
    for row, (own, labels) in zip(found, expected, strict=True):
        for name in ("document_id", "chunk", "chunks", "label", "token_ids", "loss_mask", "source", "year"):
            assert row[name] == own[name]
        for name, counts in (("head_ids", labels.head_counts), ("tail_ids", labels.tail_counts)):
            assert row[name] == by_position(counts, getattr(labels, name))
        assert row["head_logprobs"] == by_position(labels.head_counts, labels.head_logprobs)
        assert row["tail_draws"] == by_position(labels.tail_counts, labels.tail_draws)
        assert row["tail_log_masses"] == labels.tail_log_masses.T.tolist()
        assert row["entropies"] == labels.entropies.tolist()
        assert row["next_logprobs"] == labels.next_logprobs.tolist()
    for split in ("train", "eval"):
        assert {row["document_id"] for row in rows_of(tmp_path / "out", split)} == {
            own["document_id"] for own, _ in stored(texts, split)
        }


@pytest.mark.parametrize("draws", [True, False])
def test_the_targets_for_a_trainer_stand_where_the_token_is_predicted(
    texts: Table, chats: Table, tmp_path: Path, draws: bool
):
    for table in (texts, chats):
        out = tmp_path / Path(table.location).parent.name
        exported(table, out, format="axolotl", draws=draws)
        expected = sorted(stored(table), key=lambda pair: pair[0]["token_ids"])
        for row, (own, labels) in zip(sorted(rows_of(out), key=lambda row: row["input_ids"]), expected, strict=True):
            assert row["input_ids"] == own["token_ids"]
            assert row["labels"] == [t if m else -100 for t, m in zip(own["token_ids"], own["loss_mask"], strict=True)]
            assert len(row["target_token_ids"]) == len(row["target_logprobs"]) == own["tokens"]
            heads = by_position(labels.head_counts, labels.head_ids)
            tails = by_position(labels.tail_counts, labels.tail_ids) if draws else [[]] * labels.positions
            times = by_position(labels.tail_counts, labels.tail_draws)
            position = 0
            for i in range(own["tokens"]):
                if i + 1 == own["tokens"] or not own["loss_mask"][i + 1]:
                    assert row["target_token_ids"][i] == row["target_mask"][i] == []
                    continue
                assert row["target_token_ids"][i] == heads[position] + tails[position]
                shares = [exp(value) for value in row["target_logprobs"][i]]
                outside = exp(labels.tail_log_masses[0, position])
                kept = sum(shares[: len(heads[position])])
                assert kept == pytest.approx(1 - outside, abs=1e-5)
                for share, drawn in zip(shares[len(heads[position]) :], times[position], strict=False):
                    assert log(share) == pytest.approx(log(outside * drawn / sum(times[position])), abs=1e-4)
                assert not draws or sum(shares) == pytest.approx(1, abs=1e-5)
                position += 1
            assert position == labels.positions


def test_only_the_tokens_and_labels_are_written_for_a_trainer_without_soft_labels(chats: Table, tmp_path: Path):
    exported(chats, tmp_path / "out", format="trl")
    row = rows_of(tmp_path / "out")[0]
    assert row.keys() == {"input_ids", "attention_mask", "labels"}
    assert {*row["labels"]} > {-100}


def test_arrow_files_have_the_same_rows_as_parquet_files(texts: Table, tmp_path: Path):
    for kind in ("datasets", "parquet"):
        exported(texts, tmp_path / kind, format=kind)
    for split in ("train", "eval"):
        with (tmp_path / "datasets" / split / "data-00000.arrow").open("rb") as file:
            arrow = pa.ipc.open_stream(file).read_all()
        parquet = pq.read_table(tmp_path / "parquet" / "data" / f"{split}-00000.parquet")
        assert arrow.to_pylist() == parquet.to_pylist()


def test_a_filter_a_split_and_a_version_are_respected(texts: Table, tmp_path: Path):
    exported(texts, tmp_path / "a", where="source = 'web' AND year > 2003")
    assert {row["document_id"] for row in rows_of(tmp_path / "a")} == {"short-4", "short-5"}
    assert exported(texts, tmp_path / "b", split="eval").splits.keys() == {"eval"}
    assert not list((tmp_path / "b" / "data").glob("train*"))
    assert len(rows_of(tmp_path / "b")) == len(stored(texts, "eval"))
    old = Table.open(f"{texts.location}@1")
    report = exported(f"{texts.location}@1", tmp_path / "c")
    assert report.version == 1
    assert len(rows_of(tmp_path / "c")) == len(stored(old)) < len(stored(texts))


def test_many_rows_go_to_several_files(texts: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export_files, "_FILE_BYTES", 1)
    report = exported(texts, tmp_path / "out")
    assert report.splits["train"].files > 1
    assert len(rows_of(tmp_path / "out")) == len(stored(texts))
    files = list((tmp_path / "out" / "data").iterdir())
    assert sum(file.stat().st_size for file in files) == sum(split.bytes for split in report.splits.values())


def test_a_view_is_exported_with_the_columns_that_its_tables_share(texts: Table, tiny_teacher: Path, tmp_path: Path):
    documents = [{"id": "other", "text": "More words.", "source": "x", "pages": 3}]
    other = captured(tmp_path / "other", tiny_teacher, documents, columns={"carry": ["source", "pages"]})
    mix(MixConfig(view=str(tmp_path / "concatenate"), tables=(texts.location, other.location)))
    exported(str(tmp_path / "concatenate"), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert len(rows) == len(stored(texts)) + 1
    assert "source" in rows[0]
    assert not {"year", "pages"} & rows[0].keys()
    own = dict(zip(("row", "labels"), stored(other)[0], strict=True))
    [found] = [row for row in rows if row["document_id"] == "other"]
    assert found["head_ids"] == by_position(own["labels"].head_counts, own["labels"].head_ids)


def test_a_view_that_averages_its_tables_is_refused(texts: Table, tmp_path: Path):
    copy = str(shutil.copytree(texts.location, tmp_path / "copy"))
    mix(MixConfig(view=str(tmp_path / "view"), tables=(texts.location, copy), how="average"))
    with pytest.raises(UsageError, match=r"averages teachers(.|\n)*export its tables"):
        exported(str(tmp_path / "view"), tmp_path / "out")


def test_a_classifiers_table_is_exported_with_its_classes(tiny_teacher: Path, tmp_path: Path):
    save_classifier(tmp_path / "classifier", tiny_teacher)
    table = captured(tmp_path / "table", tmp_path / "classifier", [{"id": "a", "text": "Words."}])
    exported(table, tmp_path / "out")
    [row] = rows_of(tmp_path / "out")
    assert sum(map(exp, row["head_logprobs"][0])) == pytest.approx(1, abs=1e-5)
    assert all(name in (tmp_path / "out" / "README.md").read_text() for name in table.identity.classes or ())
    with pytest.raises(UsageError, match="for language models"):
        exported(table, tmp_path / "other", format="axolotl")


def test_what_is_there_is_never_overwritten_and_an_empty_folder_is_used(texts: Table, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(UsageError, match="not overwritten"):
            exported(texts, tmp_path / name)
    exported(texts, tmp_path / "empty")
    with pytest.raises(UsageError, match="not overwritten"):
        exported(texts, tmp_path / "empty")


@pytest.mark.parametrize("how", ["no row", "a full disk", "a damaged shard"])
def test_an_export_that_fails_leaves_nothing_behind(
    texts: Table, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "new" / "out"
    settings = {"where": "year = 7"} if how == "no row" else {}

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if how == "a full disk":
        monkeypatch.setattr(module.durable, "publish", fails)
    elif how == "a damaged shard":
        monkeypatch.setattr(module, "decode", fails)
    with pytest.raises(UsageError, match=r"no row to export|can't be written(.|\n)*No space left"):
        exported(texts, out, **settings)
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.undo()
    exported(texts, out)


def test_the_card_says_what_it_is_and_names_nothing_of_this_machine(texts: Table, tmp_path: Path):
    exported(texts, tmp_path / "out", format="axolotl", license="cc-by-4.0", where="source = 'web'")
    text = (tmp_path / "out" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["license"] == "cc-by-4.0"
    assert {each["split"]: each["path"] for each in found["configs"][0]["data_files"]}[
        "train"
    ] == "data/train-*.parquet"
    assert "softlabel" in found["tags"]
    for column in pq.read_schema(next((tmp_path / "out" / "data").iterdir())).names:
        assert f"`{column}`" in body
    assert f"@{texts.version}" in body
    assert "source = &#39;web&#39;" in body or "source = 'web'" in body
    assert str(tmp_path.parent) not in text
    assert str(Path(texts.location).parent) not in text


def test_hostile_names_are_escaped_in_the_card(texts: Table, tmp_path: Path):
    folder = tmp_path / "<b>`|[x](y)\n---\nlicense: mine"
    folder.symlink_to(texts.location)
    exported(str(folder), tmp_path / "out", where=f"source <> '{HOSTILE}'", license="x: [y]\n---")
    text = (tmp_path / "out" / "README.md").read_text()
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert head is not None
    assert yaml.safe_load(head[1])["license"] == "x: [y]\n---"
    body = text[head.end() :]
    assert "\n---" not in body.split("## How to read it")[0].replace("\n| ---", "")
    assert not re.search(r"<(?!/?code>)", body)
    assert "\x1b" not in text
    assert "[x](y)" not in body


@pytest.mark.long
def test_an_export_that_was_killed_leaves_nothing_in_its_place_and_the_next_one_cleans_up(texts: Table, tmp_path: Path):
    code = (
        "import os; from softlabel.pipeline.tables import export as e; e._card = lambda *a: os._exit(9);"
        f"e.export(e.ExportConfig(table={texts.location!r}, output={str(tmp_path / 'out')!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    exported(texts, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
