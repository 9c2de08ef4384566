"""Looking at rows: what is shown is what the teacher computes and what the documents say."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from softlabel.pipeline.config.show import ShowConfig
from softlabel.pipeline.config.tables import MixConfig
from softlabel.pipeline.tables.find_rows import of_document
from softlabel.pipeline.tables.mix import mix
from softlabel.pipeline.tables.show import ShownRow, ShowReport, show
from softlabel.storage.errors import IntegrityError, UsageError
from softlabel.storage.log.state import Shard
from softlabel.storage.reader import index, outline, read
from softlabel.storage.table import Table
from softlabel.storage.views.row_groups import load
from softlabel.storage.writer import ShardWriter
from tests.pipeline.classifiers import save_classifier
from tests.pipeline.tables.conftest import HOSTILE, TEXT, captured
from tests.storage import tables as storage_tables


def shown(table: Table | str, **settings: object) -> ShowReport:
    location = table if isinstance(table, str) else table.location
    return show(ShowConfig.model_validate({"table": location, **settings}))


def reading(row: ShownRow) -> str:
    return "".join(token.reading for token in row.tokens)


def test_probabilities_and_choices_are_those_of_the_teacher(texts: Table, tiny_teacher: Path):
    """Computed once more from the teacher itself."""
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    [row] = shown(texts, document="short-3", choices=4).rows
    ids = torch.tensor([token.id for token in row.tokens])
    with torch.no_grad():
        expected = torch.softmax(model(ids[None]).logits[0, :, :500].double(), -1)
    assert [token.captured for token in row.tokens] == [False] + [True] * (len(ids) - 1)
    for i, token in enumerate(row.tokens[1:], 1):
        [prediction] = token.predictions
        order = np.argsort(-expected[i - 1].numpy(), kind="stable")
        assert [choice.id for choice in prediction.choices] == order[:4].tolist()
        assert token.probability == pytest.approx(expected[i - 1, token.id].item(), rel=2e-3)
        for choice in prediction.choices:
            assert choice.probability == pytest.approx(expected[i - 1, choice.id].item(), rel=0.02)
        place = order.tolist().index(token.id) + 1
        assert prediction.rank == (place if place <= prediction.stored else None)
        assert prediction.outside == pytest.approx(
            1 - expected[i - 1, order[: prediction.stored]].sum().item(), abs=1e-4
        )


def test_the_text_of_a_row_is_the_text_of_the_document(texts: Table):
    [row] = shown(texts, where="year = 1 AND chunk = 0").rows
    assert TEXT.startswith(reading(row))
    assert (row.document, row.carried["source"], row.carried["year"]) == (HOSTILE, f"{HOSTILE}|`*", 1)


def test_a_document_is_shown_chunk_by_chunk_and_each_of_its_texts(texts: Table):
    report = shown(texts, document="long", limit=100)
    first, second = dict.fromkeys(row.fingerprint for row in report.rows)
    assert report.matching == len(report.rows)
    assert [(row.text, row.texts) for row in report.rows] == [
        (1 if row.fingerprint == first else 2, 2) for row in report.rows
    ]
    starts = set()
    for text in (first, second):
        rows = [row for row in report.rows if row.fingerprint == text]
        assert [row.chunk for row in rows] == list(range(rows[0].chunks))
        starts.add(reading(rows[0])[:8])
        for row in rows[1:]:  # what a chunk repeats of the one before is its context
            assert [token.captured for token in row.tokens[:5]] == [False] * 4 + [True]
    assert starts == {"One of m", "Some oth"}
    assert shown(texts, document="long", limit=2).matching == report.matching
    assert [row.chunk for row in shown(texts, document="long", where="chunk = 1").rows] == [1, 1]


def test_the_chunks_of_a_document_are_in_order_wherever_their_shards_are(tmp_path: Path):
    """Shards are named by a hash of their content, and a document may have got its chunks in several captures."""
    table = storage_tables.make_table(tmp_path / "table", storage_tables.identity())
    for chunk in range(6):
        rows = storage_tables.sequences(["a"], [5], "train")
        for name, value in (("chunk", chunk), ("chunks", 6)):
            at = rows.schema.get_field_index(name)
            rows = rows.set_column(at, rows.schema.field(at), pa.array([value], pa.int32()))
        with ShardWriter(table.newest()) as writer:
            writer.append(rows, storage_tables.random_labels(5, chunk))
            writer.commit({})
    newest = table.newest()
    found = of_document(newest, "a", 4)
    chunks = [load(newest, place.group, ["chunk"]).column("chunk")[place.row].as_py() for place in found.places]
    assert (chunks, found.matching) == ([0, 1, 2, 3], 6)


def test_only_the_answers_of_a_chat_are_marked_as_captured(chats: Table):
    [row] = shown(chats, document="a").rows
    answers = "".join(token.reading if token.captured else "\0" for token in row.tokens)
    assert [part for part in answers.split("\0") if part] == ["It is one.<|im_end|>", "Two.<|im_end|>"]
    assert all((token.probability is None) == (not token.captured) for token in row.tokens)


def test_an_expression_selects_rows_and_the_report_says_how_many_match(texts: Table):
    report = shown(texts, where="source = 'web'", limit=2)
    assert (len(report.rows), report.matching) == (2, 6)
    drawn = [shown(texts, where="source = 'web'", random=3, seed=seed) for seed in range(8)]
    assert all(len(report.rows) == 3 for report in drawn)
    assert {row.document for report in drawn for row in report.rows} == {f"short-{i}" for i in range(6)}


def test_a_random_row_is_the_same_for_a_seed_and_any_row_is_drawn_for_some_seed(texts: Table):
    def drawn(seed: int) -> list[tuple[str, int, str]]:
        return [(row.document, row.chunk, row.fingerprint) for row in shown(texts, random=4, seed=seed).rows]

    assert drawn(1) == drawn(1)
    assert len({row for seed in range(30) for row in drawn(seed)}) == len(index(texts, ["chunk"]))
    assert len(shown(texts).rows) == 1


def test_a_row_is_found_without_reading_the_soft_labels_of_other_shards(texts: Table, tmp_path: Path):
    """Damage in the soft labels of all other shards is not even noticed."""
    copy = Table.open(str(shutil.copytree(texts.location, tmp_path / "copy")))
    damaged = []
    for shard in copy.shards():
        path = Path(copy.location, shard.path)
        if "short-2" not in _names(copy, shard):
            content = bytearray(path.read_bytes())
            at = _start_of_soft_labels(path)
            content[at : at + 8] = bytes(8)
            path.write_bytes(content)
            damaged.append(shard)
    assert damaged
    for shard in damaged:
        with pytest.raises(IntegrityError):
            read(copy, shard)
    assert shown(copy, document="short-2").rows[0].document == "short-2"


def _names(table: Table, shard: Shard) -> list[str]:
    return [name for part in outline(table, shard, ["document_id"]) for name in part.column("document_id").to_pylist()]


def _start_of_soft_labels(path: Path) -> int:
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    column = next(column for column in columns if column.path_in_schema.startswith("head_codes"))
    return int(column.data_page_offset) + 40


def test_an_older_version_shows_what_it_had(texts: Table):
    versions = [
        shown(f"{texts.location}@{version}", document="long", limit=100)
        for version in range(1, 9)
        if version <= texts.version
    ]
    assert len({row.fingerprint for row in versions[-1].rows}) == 2
    assert versions[-1].version == texts.version
    with pytest.raises(UsageError):
        shown(f"{texts.location}@0")


@pytest.mark.parametrize("how", ["concatenate", "average"])
def test_a_view_shows_the_rows_of_its_tables(texts: Table, tiny_teacher: Path, tmp_path: Path, how: str):
    documents = [{"id": f"short-{i}", "text": f"This is text {i}.", "source": "web", "year": 0} for i in range(3)]
    settings = {"sequences": {"max_tokens": 64, "context": 4}, "selection": {"top_p": 0.5, "max_k": 3}}
    other = captured(tmp_path / "other", tiny_teacher, documents, columns={"carry": ["source", "year"]}, **settings)
    view = str(tmp_path / "view")
    mix(MixConfig(view=view, tables=(texts.location, other.location), how=how, weights=(3, 1)))
    report = shown(view, document="short-1", choices=3)
    if how == "concatenate":
        assert [row.table for row in report.rows] == [f"{table.location}@{table.version}" for table in (texts, other)]
        assert [row.carried["year"] for row in report.rows] == [2001, 0]
    else:
        [row] = report.rows
        assert {len(token.predictions) for token in row.tokens if token.captured} == {2}
        alone = shown(texts, document="short-1").rows[0]
        for token, one in zip(row.tokens, alone.tokens, strict=True):
            assert token.probability == pytest.approx(one.probability)  # it is the same teacher twice
            assert all(each.choices[0].id == one.predictions[0].choices[0].id for each in token.predictions)
    assert shown(view, random=2).rows
    assert shown(view, where="document_id = 'short-2'").matching == (2 if how == "concatenate" else 1)


def test_a_classifiers_row_shows_its_classes(tiny_teacher: Path, tmp_path: Path):
    save_classifier(tmp_path / "classifier", tiny_teacher)
    table = captured(
        tmp_path / "table", tmp_path / "classifier", [{"id": "a", "text": "Words."}, {"id": "b", "text": TEXT}]
    )
    [row] = shown(table, document="a", choices=9).rows
    assert {choice.text for choice in row.classes} == set(table.identity.classes)
    assert sum(choice.probability for choice in row.classes) == pytest.approx(1, abs=1e-3)
    assert "Words." in reading(row)
    assert not any(token.captured for token in row.tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"document": "SHORT"}, r"no row of this document(.|\n)*such as short-., short-., short-."),
        ({"document": "short-1", "where": "year = 1999"}, "no row of this document that matches"),
        ({"where": "year = 1999"}, "no row to show"),
        ({"where": "colour = 'red'"}, "can't be filtered"),
        ({"random": 1, "where": "year ="}, "can't be filtered"),
    ],
)
def test_what_can_not_be_shown_is_refused(texts: Table, settings: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        shown(texts, **settings)


@pytest.mark.parametrize(
    "settings", [{"html": "page.txt"}, {"html": "s3://b/page.html"}, {"document": "a", "random": 1}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object]):
    with pytest.raises(ValueError, match=r"ends in \.html|leave out random"):
        ShowConfig.model_validate({"table": "table", **settings})
