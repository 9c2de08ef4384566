"""A capture brings a table up to date: nothing twice and nothing lost, even if it is interrupted."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.capturing.job import resolve
from softlabel.pipeline.capturing.plan import plan
from softlabel.pipeline.capturing.shard import capture_shard
from softlabel.pipeline.config.capture import CaptureConfig, TeacherConfig
from softlabel.pipeline.config.tables import ReprocessConfig, VerifyConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.progress import Progress
from softlabel.pipeline.tables.reprocess import reprocess
from softlabel.pipeline.tables.verify import verify
from softlabel.pipeline.teachers.teacher import TransformersTeacher
from softlabel.storage.codec import decode
from softlabel.storage.errors import ProvenanceError, TableError, TeacherError, UsageError
from softlabel.storage.reader import read
from softlabel.storage.schema import ROW_KEY, row_keys
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import history
from tests.conftest import topics
from tests.pipeline.bigrams import MEETING

DENSE = {"top_p": 1.0, "min_k": 500, "max_k": 500, "draws": 0}
"""Stores every id, so that the table can be compared with the model."""


def settings(teacher: Path, documents: Path, table: Path, /, **more: object) -> CaptureConfig:
    return CaptureConfig.model_validate(
        {
            "documents": str(documents),
            "table": str(table),
            "teacher": {"model": str(teacher), "dtype": "float32", "batch_tokens": 1024},
            "sequences": {"max_tokens": 128},
            "shards": {"positions": 2000, "eval_fraction": 0.2, "row_group_sequences": 8},
            **more,
        }
    )


def write(path: Path, texts: dict[str, str]) -> Path:
    pq.write_table(pa.table({"id": list(texts), "text": list(texts.values())}), path)
    return path


def texts(count: int, start: int = 0) -> dict[str, str]:
    return {
        f"d{i}": f"Document number {i} says that {i * i} is the square of {i}." for i in range(start, start + count)
    }


def test_a_table_that_cannot_be_written_is_refused_before_the_teacher_runs(tiny_teacher, documents):
    stages = []
    with pytest.raises(TableError, match="could not be written"):
        capture(settings(tiny_teacher, documents, Path("/proc/table")), lambda progress: stages.append(progress.stage))
    assert set(stages) == {"plan"}


def rows_of(table: Path) -> list[tuple[object, ...]]:
    opened = Table.open(str(table))
    return [key for shard in opened.shards() for key in row_keys(read(opened, shard, ROW_KEY))]


def test_stored_log_probabilities_are_those_of_the_model_at_the_same_positions(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    """Also for a document that is cut into chunks."""
    documents = write(tmp_path / "d.parquet", texts(6) | {"long": "word " * 300})
    capture(settings(tiny_teacher, documents, tmp_path / "t", selection=DENSE))
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    table = Table.open(str(tmp_path / "t"))
    seen = 0
    for shard in table.shards():
        rows = read(table, shard)
        for i in range(len(rows)):
            row = rows.slice(i, 1)
            ids = torch.tensor(row.column("token_ids")[0].as_py())
            captured = np.flatnonzero(row.column("loss_mask")[0].as_py())
            with torch.no_grad():
                dense = model(ids[None]).logits[0, :, :500].log_softmax(-1)[captured - 1].numpy()
            labels = decode(row, table.numbering)
            stored = np.full_like(dense, np.nan)
            stored[np.repeat(np.arange(len(captured)), labels.head_counts), labels.head_ids] = labels.head_logprobs
            np.testing.assert_allclose(stored, dense, atol=1 / 64 + 1e-4)
            following = dense[np.arange(len(captured)), ids[captured].numpy()]
            np.testing.assert_allclose(labels.next_logprobs, following, atol=1e-3)
            seen += len(captured)
    assert seen == sum(entry.positions for entry in history(table))


def test_a_second_run_captures_only_new_documents(tiny_teacher: Path, tmp_path: Path) -> None:
    first = capture(settings(tiny_teacher, write(tmp_path / "a.parquet", texts(20)), tmp_path / "t"))
    again = capture(settings(tiny_teacher, tmp_path / "a.parquet", tmp_path / "t"))
    assert (again.sequences, again.copied, again.unchanged, again.version) == (0, 0, 20, first.version)
    more = capture(settings(tiny_teacher, write(tmp_path / "b.parquet", texts(30)), tmp_path / "t"))
    assert (more.sequences, more.unchanged) == (10, 20)
    assert len(rows_of(tmp_path / "t")) == len(set(rows_of(tmp_path / "t"))) == 30


def test_soft_labels_do_not_depend_on_the_order_of_the_documents(tiny_teacher: Path, tmp_path: Path) -> None:
    mixed = list(texts(20).items())
    random.Random(0).shuffle(mixed)
    # One sequence per batch: other batches would change the last digits of the logits.
    one_per_batch = {"teacher": {"model": str(tiny_teacher), "dtype": "float32", "batch_tokens": 1}}
    capture(settings(tiny_teacher, write(tmp_path / "a.parquet", texts(20)), tmp_path / "a", **one_per_batch))
    capture(settings(tiny_teacher, write(tmp_path / "b.parquet", dict(mixed)), tmp_path / "b", **one_per_batch))
    one, other = (Table.open(str(tmp_path / name)).scan().sort("document_id").collect() for name in "ab")
    assert one.equals(other), "the samples of the tail are the same, too"
    assert capture(settings(tiny_teacher, tmp_path / "b.parquet", tmp_path / "a")).sequences == 0


def test_other_batches_change_soft_labels_by_no_more_than_the_teachers_noise(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    """In bf16 a sum depends on the order of its terms, and so on the padding; the k-th highest logit varies no more."""
    texts = {str(i): text[: 60 * i] for i, text in enumerate(topics().values()) if i < 20}
    documents = write(tmp_path / "d.parquet", texts | {"0": "the first"})
    tables = []
    for name, batch_tokens in (("single", 1), ("together", 8192)):
        teacher = {"model": str(tiny_teacher), "dtype": "bfloat16", "batch_tokens": batch_tokens}
        config = settings(tiny_teacher, documents, tmp_path / name, selection={"top_k": 16})
        capture(config.model_copy(update={"teacher": TeacherConfig.model_validate(teacher)}))
        table = Table.open(str(tmp_path / name))
        rows = pa.concat_tables([read(table, shard) for shard in table.shards()])
        rows = rows.sort_by([("document_id", "ascending"), ("chunk", "ascending")])
        tables.append((rows, decode(rows, table.numbering)))
    (single, one), (together, other) = tables
    assert single.column("key").equals(together.column("key"))
    noise = _noise(tiny_teacher, single)
    assert noise < 0.5
    differences = np.abs(one.head_logprobs - other.head_logprobs)
    assert differences.max() <= noise + 1 / 64 + 1e-4
    # Where neighbours differ by more than that, noise can not swap them.
    gaps = np.abs(np.diff(one.head_logprobs.reshape(-1, 16), axis=1))
    distinct = np.pad(gaps, ((0, 0), (1, 1)), constant_values=(np.inf, 0)) > 2 * (noise + 1 / 64)
    certain = distinct[:, :-1] & distinct[:, 1:]
    assert certain.sum() > 1000
    same = (one.head_ids == other.head_ids).reshape(-1, 16)
    assert same[certain].all()


def _noise(teacher: Path, rows: pa.Table) -> float:
    """Largest difference between log-probabilities in one batch and with one sequence per batch."""
    model = TransformersTeacher(TeacherConfig(model=str(teacher)))
    tokens = [row.values.to_numpy() for row in rows.column("token_ids")]
    positions = [np.flatnonzero(row.as_py()).astype(np.int32) for row in rows.column("loss_mask")]
    together = torch.cat(list(model.logits(tokens, positions)))
    single = torch.cat([torch.cat(list(model.logits([t], [p]))) for t, p in zip(tokens, positions, strict=True)])
    return float((together.log_softmax(1) - single.log_softmax(1)).abs().max())


def test_a_repeated_text_goes_to_the_teacher_once_and_is_stored_for_each_document(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    twins = texts(3) | {"twin-0": texts(1)["d0"], "twin-1": texts(1)["d0"]}
    report = capture(settings(tiny_teacher, write(tmp_path / "a.parquet", twins), tmp_path / "t"))
    assert (report.sequences, report.copied) == (3, 2)
    later = capture(settings(tiny_teacher, write(tmp_path / "b.parquet", {"twin-2": texts(1)["d0"]}), tmp_path / "t"))
    assert (later.sequences, later.copied) == (0, 1)
    table = Table.open(str(tmp_path / "t"))
    rows = pa.concat_tables([read(table, shard) for shard in table.shards()])
    same = [i for i, name in enumerate(rows.column("document_id").to_pylist()) if name in ("d0",) or "twin" in name]
    assert len(same) == 4
    for name in set(rows.column_names) - {"document_id"}:
        assert len({str(rows.column(name)[i].as_py()) for i in same}) == 1, name


def test_a_changed_document_adds_its_new_sequences_and_keeps_the_old(tiny_teacher: Path, tmp_path: Path) -> None:
    capture(settings(tiny_teacher, write(tmp_path / "a.parquet", texts(5)), tmp_path / "t"))
    changed = texts(5) | {"d3": "Something else entirely."}
    report = capture(settings(tiny_teacher, write(tmp_path / "b.parquet", changed), tmp_path / "t"))
    assert (report.sequences, report.unchanged) == (1, 4)
    assert Counter(row[0] for row in rows_of(tmp_path / "t"))["d3"] == 2


def test_carried_columns_are_stored_and_required_of_later_captures(
    tiny_teacher: Path, documents: Path, tmp_path: Path
) -> None:
    config = settings(tiny_teacher, documents, tmp_path / "t", columns={"carry": ["source", "year"]})
    capture(config)
    counts = Table.open(str(tmp_path / "t")).scan().group_by("source").len().collect()
    assert set(counts["source"]) == {"short", "long"}
    with pytest.raises(ProvenanceError, match=r"columns\.carry"):
        capture(config.model_copy(update={"columns": config.columns.model_copy(update={"carry": ()})}))


def test_timestamps_decimals_and_nested_values_are_stored_and_rows_filtered_beside_them(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    rich = {
        "at": pa.array([datetime(2024, 2, 29, 5, tzinfo=UTC), None, None], pa.timestamp("us", "UTC")),
        "local": pa.array([datetime(2024, 2, 29, 5), None, None], pa.timestamp("us")),
        "price": pa.array([Decimal("1.50"), None, Decimal("2.25")], pa.decimal128(20, 2)),
        "tags": pa.array([["p", None], [], None], pa.list_(pa.string())),
        "meta": pa.array([{"a": [{"n": 1}]}, {"a": None}, None]),
    }
    documents = pa.table({"id": ["a", "b", "c"], "text": ["A text.", "Another.", "A third."], **rich})
    pq.write_table(documents, tmp_path / "d.parquet")
    config = settings(tiny_teacher, tmp_path / "d.parquet", tmp_path / "t", columns={"carry": list(rich)})
    capture(config)
    assert capture(config).unchanged == 3, "the types are those of the table"
    verify(VerifyConfig(table=config.table))
    reprocess(ReprocessConfig(source=config.table, destination=str(tmp_path / "n"), where="document_id <> 'b'"))
    for table, names in ((tmp_path / "t", ["a", "b", "c"]), (tmp_path / "n", ["a", "c"])):
        rows = Table.open(str(table)).scan().collect().to_arrow().select(["document_id", *rich]).to_pylist()
        expected = documents.drop_columns(["text"]).rename_columns({"id": "document_id"}).to_pylist()
        kept = sorted(rows, key=lambda row: row["document_id"])
        assert kept == [row for row in expected if row["document_id"] in names]
    with pytest.raises(UsageError, match="column price of type Decimal"):
        reprocess(ReprocessConfig(source=config.table, where="price > 1"))


def test_documents_of_several_paths_without_ids_are_captured_once_each(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "Mars is red."}, {"text": "Venus is hot."}]')
    (tmp_path / "b.csv").write_text("text\nVenus is hot.\nThe sun is far.\n")
    config = settings(tiny_teacher, tmp_path / "a.json", tmp_path / "t", columns={"id": "none"})
    assert capture(config).documents == 2
    both = config.model_copy(update={"documents": (config.documents, str(tmp_path / "b.csv"))})
    report = capture(both)
    assert (report.documents, report.unchanged, report.repeated, report.rejects, report.sequences) == (3, 2, 1, 0, 1)
    assert capture(both).sequences == 0
    assert CaptureConfig.model_validate_json(both.model_dump_json()) == both


def test_another_selection_is_refused_and_named_by_field(tiny_teacher: Path, tmp_path: Path) -> None:
    documents = write(tmp_path / "a.parquet", texts(3))
    capture(settings(tiny_teacher, documents, tmp_path / "t"))
    before = rows_of(tmp_path / "t")
    with pytest.raises(ProvenanceError, match=r"selection\.max_k: the table has 16, this run 8"):
        capture(settings(tiny_teacher, documents, tmp_path / "t", selection={"top_k": 8}))
    assert rows_of(tmp_path / "t") == before


def test_a_teacher_that_changes_after_the_plan_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    capture(settings(teacher, write(tmp_path / "a.parquet", texts(3)), tmp_path / "t"))
    config = settings(teacher, write(tmp_path / "b.parquet", texts(6)), tmp_path / "t")
    job = resolve(config)
    [shard] = plan(job, tmp_path / "plan").shards
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.model.norm.weight.data *= 1.001
    model.save_pretrained(teacher)
    with pytest.raises(ProvenanceError, match=r"teacher\.files\.model\.safetensors"):
        capture_shard(job, shard)
    assert len(rows_of(tmp_path / "t")) == 3


def test_only_completions_are_captured_and_the_mask_is_part_of_the_identity(tiny_teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    pairs = [{"id": i, "prompt": f"What is {i} squared?", "completion": f" It is {i * i}."} for i in range(5)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    columns = {"prompt": "prompt", "completion": "completion"}
    report = capture(settings(tiny_teacher, path, tmp_path / "t", columns=columns))
    table = Table.open(str(tmp_path / "t"))
    rows = pa.concat_tables([read(table, shard) for shard in table.shards()])
    ids, masks = rows.column("token_ids").to_pylist(), rows.column("loss_mask").to_pylist()
    tokenizer = Checkpoint.find(settings(tiny_teacher, path, tmp_path).teacher).tokenizer
    texts = [tokenizer.decode([i for i, m in zip(*row, strict=True) if m]) for row in zip(ids, masks, strict=True)]
    assert sorted(texts) == sorted(f"{pair['completion']}<|im_end|>" for pair in pairs)
    assert report.positions == sum(map(sum, masks))
    again = capture(settings(tiny_teacher, path, tmp_path / "t", columns=columns))
    assert (again.sequences, again.unchanged) == (0, 5)
    with pytest.raises(ProvenanceError, match="mask: the table has completion, this run text"):
        capture(settings(tiny_teacher, path, tmp_path / "t", columns={"text": "prompt"}))
    parse = {"max_tokens": 128, "special_tokens": "parse"}
    with pytest.raises(ProvenanceError, match="special_tokens: the table has text, this run parse"):
        capture(settings(tiny_teacher, path, tmp_path / "t", columns=columns, sequences=parse))


def test_nan_logits_are_an_error_that_names_the_document(tiny_teacher: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    model.model.norm.weight.data.fill_(float("nan"))
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    for file in tiny_teacher.glob("tokenizer*"):
        (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(TeacherError, match="document d0"):
        capture(settings(broken, write(tmp_path / "a.parquet", texts(1)), tmp_path / "t"))
    assert not [path for path in (tmp_path / "t").rglob("*") if path.is_file()]


def test_progress_reaches_the_total(tiny_teacher: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = capture(settings(tiny_teacher, write(tmp_path / "a.parquet", texts(200)), tmp_path / "t"), seen.append)
    captured = [progress for progress in seen if progress.stage == "capture"]
    assert captured[-1].done == captured[-1].total == report.positions
    assert [p.done for p in captured] == sorted(p.done for p in captured)
    assert len(Table.open(str(tmp_path / "t")).history()) > 2  # several shards, each with its own commit


CAPTURE = """
import sys
from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig

print(capture(CaptureConfig.model_validate_json(sys.argv[1])).sequences)
"""


def test_two_captures_at_once_write_every_row_once(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have planned to capture everything before either has captured anything."""
    config = settings(tiny_teacher, write(tmp_path / "a.parquet", texts(150)), tmp_path / "t")
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"engine": MEETING})})
    (tmp_path / "meeting").mkdir()
    monkeypatch.setenv("MEETING", str(tmp_path / "meeting"))
    command = [sys.executable, "-c", CAPTURE, config.model_dump_json(exclude_unset=True)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        captured = capture(config).sequences
        captured += int(other.communicate(timeout=120)[0])
    rows = rows_of(tmp_path / "t")
    assert len(rows) == len(set(rows)) == 150
    assert captured == 150  # each sequence is counted by the run that committed it
