"""Evaluation, from student folders and a table to report.html and report.json."""

import json
import shutil
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import StudentConfig, TrainConfig
from softlabel.pipeline.evaluation import partings
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.evaluation.report import page
from softlabel.pipeline.selection.select import select
from softlabel.pipeline.selection.selection import Selection
from softlabel.pipeline.stream import by_column, holdout
from softlabel.pipeline.stream.holdout import Holdout
from softlabel.pipeline.students.record import table_record
from softlabel.storage.errors import StudentError, TableError, UsageError
from softlabel.storage.identity import (
    Identity,
    SelectionIdentity,
    SequencesIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from softlabel.storage.labels import SoftLabels
from softlabel.storage.reader import read
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.writer import ShardWriter
from tests.pipeline.captured import make_table as make_captured

V, PADDED = 500, 512
SELECTION = Selection(top_p=0.9, min_k=1, max_k=16, draws=16, temperatures=(1.0,), seed=0)
TRAIN, EVAL = range(8), range(6, 20)  # documents; 6 and 7 are in both splits, under different names


@pytest.fixture(autouse=True)
def without_drawings(monkeypatch, request):
    """Drawings take most of an evaluation's time; test_report.py looks at them."""
    if "drawings" not in request.fixturenames:
        monkeypatch.setattr(page, "drawings_of", lambda report: {})


@pytest.fixture
def drawings():
    """A test with the drawings."""


@pytest.fixture(scope="module")
def network(tiny_teacher):
    return AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()


def sequence(number):
    return torch.from_numpy(np.random.default_rng(number).integers(0, V, 5 + 3 * number))


def rows(numbers, split):
    return pa.Table.from_pylist(
        [
            {
                "key": f"{number:016}".encode(),
                "document_id": f"{split}-{number}",
                "chunk": 0,
                "chunks": 1,
                "fingerprint": f"{number:016}".encode(),
                "label": None,
                "split": split,
                "token_ids": sequence(number).tolist(),
                "loss_mask": [False] + [True] * (len(sequence(number)) - 1),
                "tokens": len(sequence(number)),
                "positions": len(sequence(number)) - 1,
            }
            for number in numbers
        ],
        SEQUENCE,
    )


@torch.no_grad()
def labels(network, numbers):
    parts = []
    for number in numbers:
        ids = sequence(number)
        seeds = torch.arange(len(ids) - 1) + 1000 * number
        parts.append(select(network(ids[None]).logits[0, :-1], ids[1:], seeds, SELECTION, V))
    return SoftLabels.concatenate(parts)


def identity(**changes):
    parts = {
        "teacher": TeacherIdentity(files={"model.safetensors": "0"}, dtype="float32"),
        "tokenizer": TokenizerIdentity(files="0", chat_template=None, chat_template_date=date(2026, 1, 1)),
        "vocabulary": V,
        "padded_vocabulary": PADDED,
        "selection": SelectionIdentity(top_p=0.9, min_k=1, max_k=16, draws=16, seed=0),
        "temperatures": (1.0,),
        "sequences": SequencesIdentity(max_tokens=64, context=1, mask="all", eval_fraction=0.5),
    }
    return Identity(**{**parts, **changes})


def make_table(folder, tokenizer, network, **splits):
    sample = labels(network, TRAIN)
    table = Table.create(str(folder), identity(), pa.schema([]), sample, tokenizer)
    for split, numbers in splits.items():
        with ShardWriter(table.newest(), row_group=4) as writer:
            writer.append(rows(numbers, split), labels(network, numbers))
            writer.commit({"operation": "capture", "teacher": "models/teach", "parameters": 1234})
    return table.newest()


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory, tokenizer, network):
    return make_table(tmp_path_factory.mktemp("tables") / "table", tokenizer, network, train=TRAIN, eval=EVAL)


def recorded(table):
    """The entry for a table in a student's record."""
    return table_record(table).model_dump(mode="json")


def make_student(folder, tiny_teacher, trained_on, noise=0.0, history=()):
    """A student equal to the teacher, or with noise added to its weights."""
    shutil.copytree(tiny_teacher, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(folder)
    config = TrainConfig(table="t", output="o", student=StudentConfig(layers=(0,)))
    content = {
        "config": config.model_dump(mode="json"),
        "objective": "forward KL",
        "table": trained_on,
        "parameters": model.num_parameters(),
        "history": list(history),
        "circumstances": {"torch": "2"},
    }
    (folder / "softlabel.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def students(tmp_path_factory, tiny_teacher, table):
    folder = tmp_path_factory.mktemp("students")
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_kl": 1.0}]
    exact = make_student(folder / "exact", tiny_teacher, recorded(table), history=history)
    noisy = make_student(folder / "<script>", tiny_teacher, recorded(table), noise=0.05, history=history)
    return exact, noisy


def run(table, *folders, report, **changes):
    location = table if isinstance(table, str) else table.location
    config = EvaluateConfig(
        table=location, students=tuple(map(str, folders)), report=str(report), device="cpu", **changes
    )
    seen = []
    return evaluate(config, seen.append), seen


def test_students_are_compared_with_their_teacher(table, students, tmp_path):
    result, seen = run(table, *students, report=tmp_path, batch_tokens=128)
    exact, noisy = result.students
    assert (result.sequences, result.left_out) == (12, 2)
    assert result.positions == sum(len(sequence(number)) - 1 for number in EVAL[2:])
    assert exact.kl == pytest.approx(0, abs=0.15)  # the sampled tail's own noise
    assert exact.agreement == 1
    assert exact.perplexity == pytest.approx(result.teacher.perplexity, rel=1e-3)
    assert noisy.kl > exact.kl + 0.3
    assert noisy.agreement < 1
    assert (result.teacher.name, result.teacher.parameters) == ("teach", 1234)
    last = seen[-1]
    assert (last.done, last.total) == (result.positions, result.positions)


@pytest.mark.usefixtures("drawings")
def test_the_report_has_the_returned_numbers(table, students, tmp_path):
    result, _ = run(table, *students, report=tmp_path)
    content, html = json.loads(Path(result.json).read_text()), Path(result.html).read_text()
    assert [entry["metrics"]["kl"]["mean"] for entry in content["students"]] == [s.kl for s in result.students]
    assert content["version"] == table.version
    assert content["left_out"] == 2
    assert "2 of 14 sequences of the eval split" in html
    assert {"bits_per_byte", "reverse_kl", "acceptance", "calibration"} <= set(content["students"][0]["metrics"])
    assert len(content["comparisons"]) == 1
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert html.count("<svg") == 6  # size, entropy, calibration, by position, and two curves of the training
    assert {column["name"] for column in content["columns"]} >= {"head_ids", "token_ids", "entropies"}
    assert content["identity"]["vocabulary"] == V


def test_the_batch_size_does_not_change_the_metrics(table, students, tmp_path):
    one, _ = run(table, students[1], report=tmp_path / "one", batch_tokens=64)
    many, _ = run(table, students[1], report=tmp_path / "many", batch_tokens=100_000)
    assert one.students[0].kl == pytest.approx(many.students[0].kl, abs=1e-5)
    assert one.positions == many.positions


@pytest.mark.parametrize("packing", [True, False])
def test_each_held_out_sequence_comes_once(table, packing):
    batches = [held.batch for held in Holdout.of(table).batches(128, packing)]
    assert (sum(len(batch.input_ids) for batch in batches) == 12) is not packing
    rows = [batch.input_ids.flatten()[batch.position_ids.flatten() == 0] for batch in batches]
    assert sum(batch.sequences for batch in batches) == 12
    assert sum(len(batch.positions) for batch in batches) == Holdout.of(table).positions
    assert all(batch.input_ids.numel() <= 128 for batch in batches)
    assert {int(sequence(number)[0]) for number in EVAL[2:]} <= set(torch.cat(rows).tolist())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"tokenizer": TokenizerIdentity(files="1", chat_template=None, chat_template_date=date(2026, 1, 1))},
            "tokenizer",
        ),
        ({"teacher": TeacherIdentity(files={"model.safetensors": "1"}, dtype="float32")}, "teacher"),
    ],
)
def test_a_student_of_another_tokenizer_or_teacher_is_refused(table, tiny_teacher, tmp_path, changes, what):
    record = {**recorded(table), "identity": identity(**changes).model_dump(mode="json")}
    folder = make_student(tmp_path / "student", tiny_teacher, record)
    with pytest.raises(StudentError, match=f"another {what}") as caught:
        run(table, folder, report=tmp_path / "report")
    for part in ("expected:", "found:", "where:", "what to do:"):
        assert part in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_a_student_of_another_table_gets_a_warning(table, tiny_teacher, tmp_path):
    other = identity(selection=SelectionIdentity(top_p=1.0, min_k=4, max_k=4, draws=0, seed=0))
    record = {
        "location": "/elsewhere",
        "version": 7,
        "content": "0",
        "identity": other.model_dump(mode="json"),
    }
    folder = make_student(tmp_path / "student", tiny_teacher, record)
    result, _ = run(table, folder, report=tmp_path / "report")
    html = Path(result.html).read_text()
    assert "trained on /elsewhere@7" in html
    assert "selection.draws" in html


def test_a_student_of_another_version_of_the_table_gets_no_warning(table, tiny_teacher, tmp_path):
    record = {**recorded(table), "version": 0, "content": "of version 0"}
    folder = make_student(tmp_path / "student", tiny_teacher, record)
    result, _ = run(table, folder, report=tmp_path / "report")
    assert json.loads(Path(result.json).read_text())["students"][0]["warnings"] == []


def test_a_student_trained_when_less_was_held_out_gets_a_warning(table, tiny_teacher, tmp_path):
    record = {**recorded(table), "version": 0, "content": "of version 0"}
    record["identity"]["sequences"]["eval_fraction"] /= 2
    folder = make_student(tmp_path / "student", tiny_teacher, record)
    result, _ = run(table, folder, report=tmp_path / "report")
    warnings = json.loads(Path(result.json).read_text())["students"][0]["warnings"]
    [warning] = [text for text in warnings if text.startswith("trained on ") and "may include" in text]
    assert f"{table.location}@0" in warning


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_a_folder_that_is_not_a_student_is_refused(table, tmp_path, content):
    folder = tmp_path / "student"
    folder.mkdir()
    if content is not None:
        (folder / "softlabel.json").write_text(content)
    with pytest.raises(StudentError, match="a student that softlabel trained"):
        run(table, folder, report=tmp_path / "report")


def test_a_table_without_held_out_sequences_says_what_to_do(tmp_path, tokenizer, network, students):
    table = make_table(tmp_path / "table", tokenizer, network, train=TRAIN)
    with pytest.raises(TableError, match=r"shards\.eval_fraction"):
        run(table, students[0], report=tmp_path / "report")


def test_a_table_whose_held_out_sequences_are_all_in_train_is_refused(tmp_path, tokenizer, network, students):
    table = make_table(tmp_path / "table", tokenizer, network, train=TRAIN, eval=[6, 7])
    with pytest.raises(TableError, match="2 sequences, all of which also occur"):
        run(table, students[0], report=tmp_path / "report")


def test_an_evaluation_without_students_is_refused(table, tmp_path):
    with pytest.raises(UsageError, match="no student to evaluate"):
        run(table, report=tmp_path)


def dies(progress):
    """Interrupts the evaluation in the middle of the second student."""
    if progress.stage == "evaluate <script>" and progress.done >= 200:
        raise KeyboardInterrupt


def test_an_interrupted_evaluation_goes_on_where_it_was(table, students, tmp_path, monkeypatch):
    monkeypatch.setattr(holdout, "PART_TOKENS", 1)  # keep the measurements after each row group
    config = EvaluateConfig(
        table=table.location, students=tuple(map(str, students)), device="cpu", report=str(tmp_path / "cut")
    )
    whole, _ = run(table, *students, report=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, dies)
    assert not (tmp_path / "cut" / "report.json").exists()
    after = []
    resumed = evaluate(config, after.append)
    assert (resumed.students, resumed.verdict) == (whole.students, whole.verdict)
    first = {stage: next(each.done for each in after if each.stage == stage) for stage in {p.stage for p in after}}
    assert first["evaluate exact"] == whole.positions  # nothing of it is measured again
    assert 0 < first["evaluate <script>"] < whole.positions
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize("change", ["damaged", "truncated", "other weights"])
def test_measurements_that_do_not_fit_are_made_again(table, tiny_teacher, tmp_path, monkeypatch, change):
    monkeypatch.setattr(holdout, "PART_TOKENS", 1)
    folder = make_student(tmp_path / "<script>", tiny_teacher, recorded(table), noise=0.05)
    config = EvaluateConfig(table=table.location, students=(str(folder),), device="cpu", report=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, dies)
    [kept] = (tmp_path / "cut").glob("unfinished/*.safetensors")
    if change == "other weights":
        shutil.copy(tiny_teacher / "model.safetensors", folder / "model.safetensors")
    else:
        content = bytearray(kept.read_bytes())
        content[-3] ^= 1
        kept.write_bytes(content[: -1 if change == "truncated" else None])
    seen = []
    resumed = evaluate(config, seen.append)
    fresh, _ = run(table, folder, report=tmp_path / "fresh")
    assert seen[0].done == 0
    assert resumed.students == fresh.students


@pytest.fixture(scope="module")
def captured(tiny_teacher, tmp_path_factory):
    """A table that knows the hashes of its teacher's files."""
    return make_captured(tmp_path_factory.mktemp("captured") / "table", tiny_teacher, train=10, held_out=12)


def test_the_teacher_and_models_trained_elsewhere_are_measured_like_students(captured, tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "elsewhere")
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    model.model.norm.weight.data *= 0.7
    model.save_pretrained(tmp_path / "elsewhere")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_teacher), lora).save_pretrained(tmp_path / "adapter")
    own = make_student(tmp_path / "own", tiny_teacher, recorded(captured), noise=0.05)
    models = (own, tiny_teacher, tmp_path / "elsewhere", tmp_path / "adapter")
    result, _ = run(captured, *models, report=tmp_path / "report")
    noisy, teacher, elsewhere, adapter = json.loads(Path(result.json).read_text())["students"]
    assert [each["kind"] for each in (noisy, teacher, elsewhere, adapter)] == ["student", "teacher", "other", "other"]
    assert abs(result.students[1].kl) < 2e-3  # its draws' own noise cancels
    assert result.students[1].agreement == 1
    assert result.students[1].parameters == elsewhere["parameters"] == model.num_parameters()
    assert min(each.kl for each in result.students[2:]) > 0.005
    assert "the teacher itself" in teacher["objective"]
    assert f"on {tiny_teacher}" in adapter["objective"]
    assert not teacher["warnings"]
    assert "trained elsewhere" in elsewhere["warnings"][0]
    assert not result.verdict.startswith(result.students[1].name)


def test_a_model_of_another_tokenizer_is_refused_before_anything_is_measured(captured, tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    tokenizer.add_tokens(["entirely new"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(StudentError, match="tokenizer differs"):
        run(captured, tiny_teacher, tmp_path / "other", report=tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_results_are_shown_by_a_column(captured, tiny_teacher, tmp_path):
    result, _ = run(captured, tiny_teacher, report=tmp_path / "report", by=("document_id",))
    groups = json.loads(Path(result.json).read_text())["students"][0]["metrics"]["by_column"]["document_id"]
    assert sorted(int(group["name"]) for group in groups) == list(range(10, 22))
    assert sum(group["positions"] for group in groups) == result.positions
    assert [group["positions"] for group in groups] == sorted((group["positions"] for group in groups), reverse=True)
    with pytest.raises(UsageError, match="no such column"):
        run(captured, tiny_teacher, report=tmp_path / "report", by=("source",))


def test_places_where_students_part_from_the_teacher_are_shown(captured, tiny_teacher, students, tmp_path):
    own = make_student(tmp_path / "own", tiny_teacher, recorded(captured), noise=0.1)
    result, _ = run(captured, own, tiny_teacher, report=tmp_path / "report")
    places = json.loads(Path(result.json).read_text())["places"]
    assert len(places) == partings.PLACES
    model, tokenizer = AutoModelForCausalLM.from_pretrained(own).eval(), AutoTokenizer.from_pretrained(own)
    texts = {row["document_id"]: row["token_ids"] for row in read(captured, captured.shards("eval")[0]).to_pylist()}
    assert max(Counter(place["document"] for place in places).values()) == 2
    for place in places:
        ids = texts[place["document"]]
        ends = [i for i in range(1, len(ids)) if tokenizer.decode(ids[max(0, i - 24) : i]) == place["before"]]
        with torch.no_grad():
            top = model(torch.tensor(ids)[None]).logits[0, ends[0] - 1, :V].softmax(0).topk(3)
        assert tokenizer.decode([ids[ends[0]]]) == place["token"]
        mine, teachers = place["students"]
        assert [each["token"] for each in mine] == [tokenizer.decode([token]) for token in top.indices]
        assert [each["probability"] for each in mine] == pytest.approx(top.values.tolist(), rel=1e-3)
        for each, itself in zip(place["teacher"], teachers, strict=False):
            assert each["token"] == itself["token"]


def test_values_of_a_column_beyond_the_largest_count_together(captured, monkeypatch):
    monkeypatch.setattr(by_column, "LARGEST_GROUPS", 4)
    held = Holdout.of(captured, ("document_id",))
    assert len(held.groups["document_id"]) == 4
    assert held.groups["document_id"][-1] == by_column.OTHERS
    numbers = np.concatenate([batch.groups["document_id"] for batch in held.batches(10_000, packing=True)])
    assert np.bincount(numbers).tolist() == [1, 1, 1, 9]
