"""A capture into an existing table takes what is left out from the table, and refuses what is given and differs."""

import json
import pickle
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from softlabel.flows.arguments import resolve as with_flags
from softlabel.flows.arguments import settings as all_settings
from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.capturing.job import CaptureJob, resolve
from softlabel.pipeline.config.capture import CaptureConfig, SelectionConfig, SequencesConfig, ShardsConfig
from softlabel.pipeline.config.capture import TeacherConfig as Teacher
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.config.tables import ReprocessConfig
from softlabel.pipeline.estimation.estimate import estimate
from softlabel.pipeline.tables.inspect import inspect
from softlabel.pipeline.tables.reprocess import reprocess
from softlabel.storage.errors import ProvenanceError, TeacherError, UsageError
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import last_capture
from tests.pipeline.capturing.test_capture import texts
from tests.pipeline.classifiers import CLASSES, save_classifier, save_documents
from tests.pipeline.teachers import test_engine

OWN = {
    "teacher": {"dtype": "float32"},
    "columns": {"id": "name", "text": "body", "carry": ("source",)},
    "sequences": {"max_tokens": 100, "context": 3, "special_tokens": "parse", "chat_template_date": "2025-05-05"},
    "selection": {"top_p": 0.9, "min_k": 2, "max_k": 9, "draws": 7, "temperatures": (1.0, 2.0), "seed": 5},
    "shards": {"eval_fraction": 0.25},
}
"""Settings that all differ from their defaults."""
GENERATION = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def given(documents: Path, table: Path, /, **more: Any) -> CaptureConfig:
    """A capture with these settings, and nothing else given."""
    return CaptureConfig.model_validate({"documents": str(documents), "table": str(table), **more})


def named(path: Path, count: int, start: int = 0) -> Path:
    """Documents in columns of other names than the usual."""
    rows = [{"name": name, "body": text, "source": "here"} for name, text in texts(count, start).items()]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def plain(path: Path, count: int, start: int = 0) -> Path:
    rows = [{"id": name, "text": text} for name, text in texts(count, start).items()]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def chats(path: Path, count: int, start: int = 0) -> Path:
    """Chats with two answers each, in the column talk."""
    lines = []
    for name, text in texts(count, start).items():
        turns = [("user", "Say something."), ("assistant", text), ("user", "Again?"), ("assistant", f"No, {name}.")]
        lines.append({"id": name, "talk": [{"role": role, "content": content} for role, content in turns]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def own(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table captured with ``OWN``; tests work on copies of it."""
    folder = tmp_path_factory.mktemp("own")
    of_teacher = OWN["teacher"] | {"model": str(tiny_teacher)}
    capture(given(named(folder / "d.parquet", 4), folder / "t", **OWN | {"teacher": of_teacher}))
    return folder / "t"


@pytest.fixture
def table(own: Path, tmp_path: Path) -> Path:
    return shutil.copytree(own, tmp_path / "t")


def flags_in(error: Exception) -> dict[tuple[str, ...], Any]:
    """The flags that an error says would match, as the command line reads them."""
    return read_flags(" ".join(re.findall(r"\(to match: (.*)\)", str(error))))


def read_flags(line: str) -> dict[tuple[str, ...], Any]:
    known = {setting.flag: setting for setting in all_settings(CaptureConfig)}
    found: dict[tuple[str, ...], Any] = {}
    setting = None
    for word in shlex.split(line):
        if word.startswith("--"):
            setting = known[word]
            found[setting.path] = () if "tuple" in str(setting.type) else True
        elif setting:
            several = isinstance(found[setting.path], tuple)
            found[setting.path] = (*found[setting.path], word) if several else word
    return found


def test_everything_that_is_left_out_is_taken_from_the_table(table: Path, tiny_teacher: Path, tmp_path: Path):
    before = Table.open(str(table))
    report = capture(given(named(tmp_path / "d.parquet", 6), table))
    assert (report.unchanged, report.sequences) == (4, 2)
    assert Table.open(str(table)).identity == before.identity
    recorded = last_capture(Table.open(str(table)))
    assert recorded.teacher == str(tiny_teacher)
    for section, values in OWN.items():
        recorded_values = recorded.config[section]
        assert json.loads(json.dumps(values)).items() <= recorded_values.items(), "the whole settings are recorded"


CHANGED = [
    (SelectionConfig, {"top_p": 0.5, "max_k": 8, "draws": 3, "temperatures": (1.0, 3.0), "seed": 9}),
    (SequencesConfig, {"max_tokens": 64, "context": 2, "special_tokens": "parse"}),
    (ShardsConfig, {"eval_fraction": 0.5}),
    (Teacher, {"dtype": "float32"}),
]


@pytest.fixture
def other_defaults() -> Iterator[Any]:
    """Call it to change the defaults of settings, as another version of softlabel may."""
    sections = {"selection": SelectionConfig, "sequences": SequencesConfig, "shards": ShardsConfig, "teacher": Teacher}

    def change(values: list[tuple[type, dict[str, Any]]]) -> list[tuple[type, dict[str, Any]]]:
        before = []
        for model, defaults in values:
            before.append((model, {name: model.model_fields[name].default for name in defaults}))
            for name, default in defaults.items():
                model.model_fields[name].default = default
            model.model_rebuild(force=True)
        for name, model in sections.items():
            CaptureConfig.model_fields[name].default = model()
        CaptureConfig.model_rebuild(force=True)
        changed.append(before)
        return before

    changed: list[Any] = []
    yield change
    change(changed[0])


def test_a_changed_default_does_not_end_a_nightly_capture(tiny_teacher: Path, tmp_path: Path, other_defaults: Any):
    teacher = {"model": str(tiny_teacher)}
    capture(given(plain(tmp_path / "a.parquet", 3), tmp_path / "t", teacher=teacher))
    before = Table.open(str(tmp_path / "t")).identity
    other_defaults(CHANGED)
    for teacher_given in ({}, teacher):
        nightly = given(plain(tmp_path / "b.parquet", 5), tmp_path / "t", teacher=teacher_given)
        assert (nightly.selection.max_k, nightly.teacher.dtype) == (8, "float32")
        capture(nightly)
    assert Table.open(str(tmp_path / "t")).identity == before
    assert sum(shard.rows for shard in Table.open(str(tmp_path / "t")).shards()) == 5
    capture(given(tmp_path / "b.parquet", tmp_path / "new", teacher=teacher))
    assert Table.open(str(tmp_path / "new")).identity.selection.max_k == 8, "a new table has the new defaults"


DIFFERENT = [
    {"selection": {"top_p": 0.95}},  # the default
    {"selection": {"min_k": 1, "max_k": 10, "seed": 0}, "shards": {"eval_fraction": 0.05}},
    {"selection": {"temperatures": (1.0,)}, "sequences": {"max_tokens": 1024, "context": 1}},
    {"sequences": {"special_tokens": "text", "chat_template_date": "2026-01-01"}, "teacher": {"dtype": "bfloat16"}},
    {"columns": {"carry": ()}, "selection": {"draws": 0}},
    {"columns": {"carry": ("source", "body")}},
    {"selection": {"top_k": 5}},
]


@pytest.mark.parametrize("different", DIFFERENT, ids=str)
def test_what_is_given_and_differs_is_refused_with_the_flags_that_match(
    table: Path, tmp_path: Path, different: dict[str, dict[str, Any]]
):
    documents, before = named(tmp_path / "d.parquet", 6), Table.open(str(table)).version
    with pytest.raises(ProvenanceError) as error:
        capture(given(documents, table, **different))
    assert Table.open(str(table)).version == before
    message = str(error.value)
    for section, values in different.items():
        for name, value in values.items():
            if name == "top_k":
                assert (
                    "selection.max_k: the table has 9, this run 5 (to match: --selection.max-k 9 instead of" in message
                )
                return
            assert f"--{section}.{name}".replace("_", "-") in message
            field = {"temperatures": "temperatures", "eval_fraction": "sequences.eval_fraction"}.get(name, f"{name}:")
            line = next(line for line in message.splitlines() if field in line)
            assert "the table has" in line
            assert "this run" in line
            assert str(value) in line or name in ("temperatures", "carry")
    flags = {**flags_in(error.value), ("documents",): str(documents), ("table",): str(table)}
    assert capture(with_flags(CaptureConfig, flags, None)).sequences == 2, "these flags do match"


def test_every_difference_is_listed_at_once(table: Path, tiny_teacher: Path, tmp_path: Path):
    other = shutil.copytree(tiny_teacher, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    model.model.norm.weight.data *= 1.5
    model.save_pretrained(other)
    different = {
        "teacher": {"model": str(other), "dtype": "bfloat16"},
        "selection": {"top_p": 0.95, "max_k": 10},
        "sequences": {"max_tokens": 99},
        "columns": {"carry": ()},
    }
    with pytest.raises(ProvenanceError) as error:
        capture(given(named(tmp_path / "d.parquet", 6), table, **different))
    for line in (
        "selection.top_p: the table has 0.9, this run 0.95 (to match: --selection.top-p 0.9)",
        "selection.max_k: the table has 9, this run 10 (to match: --selection.max-k 9)",
        "sequences.max_tokens: the table has 100, this run 99 (to match: --sequences.max-tokens 100)",
        "columns.carry: the table has source, this run none (to match: --columns.carry source)",
        "teacher.dtype: the table has float32, this run bfloat16 (to match: --teacher.dtype float32)",
        f"(to match: --teacher.model {tiny_teacher})",
    ):
        assert line in str(error.value)
    flags = {**flags_in(error.value), ("documents",): str(tmp_path / "d.parquet"), ("table",): str(table)}
    assert capture(with_flags(CaptureConfig, flags, None)).sequences == 2


@pytest.mark.parametrize(
    ("own_settings", "given_settings"),
    [
        ({"max_tokens": 2000, "context": 1500}, {"sequences": {"context": 1500}}),
        ({}, {"selection": {"max_k": 9}, "sequences": {"context": 3}}),
    ],
)
def test_what_is_given_fits_what_is_taken_and_not_the_defaults(
    tiny_teacher: Path, tmp_path: Path, own_settings: dict[str, Any], given_settings: dict[str, Any]
):
    """A context of 1500 is more than the default of max_tokens."""
    base = OWN | {
        "sequences": OWN["sequences"] | own_settings,
        "teacher": OWN["teacher"] | {"model": str(tiny_teacher)},
    }
    capture(given(named(tmp_path / "a.parquet", 2), tmp_path / "t", **base))
    assert capture(given(named(tmp_path / "b.parquet", 3), tmp_path / "t", **given_settings)).sequences == 1


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"sequences": {"context": 100}}, "sequences.context: the table has 3, this run 100"),
        ({"selection": {"min_k": 10}}, "selection.min_k: the table has 2, this run 10"),
    ],
)
def test_a_contradiction_with_the_table_names_what_the_table_has(
    table: Path, tmp_path: Path, wrong: dict[str, Any], found: str
):
    with pytest.raises(UsageError) as error:
        capture(given(named(tmp_path / "d.parquet", 6), table, **wrong))
    assert found in str(error.value)
    assert flags_in(error.value)


def test_a_plain_top_k_table_matches_top_k_and_what_it_is_short_for(tiny_teacher: Path, tmp_path: Path):
    teacher = {"model": str(tiny_teacher)}
    capture(given(plain(tmp_path / "a.parquet", 2), tmp_path / "t", teacher=teacher, selection={"top_k": 6}))
    long = {"top_p": 1.0, "min_k": 6, "max_k": 6, "draws": 0}
    for count, selection in enumerate(({"top_k": 6}, {}, long, {"max_k": 6}), 3):
        report = capture(given(plain(tmp_path / "b.parquet", count), tmp_path / "t", selection=selection))
        assert report.sequences == 1
    with pytest.raises(ProvenanceError, match=r"\(to match: --selection\.top-k 6\)"):
        capture(given(tmp_path / "b.parquet", tmp_path / "t", selection={"top_k": 7}))


def test_the_columns_may_be_named_differently_each_time_but_hold_the_same_kind_of_documents(
    table: Path, tmp_path: Path
):
    rows = [{"key": name, "words": text, "source": "there"} for name, text in texts(9, start=6).items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "other.parquet")
    columns = {"id": "key", "text": "words"}
    assert capture(given(tmp_path / "other.parquet", table, columns=columns)).sequences == 9
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "again.parquet")
    assert capture(given(tmp_path / "again.parquet", table)).unchanged == 1, "as the newest capture named them"
    talk = chats(tmp_path / "chats.jsonl", 2)
    with pytest.raises(ProvenanceError, match=r"mask: the table has text, this run assistant \(to match: --columns"):
        capture(given(talk, table, columns={"id": "id", "messages": "talk", "carry": ()}))


@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_table_of_chats_takes_more_chats_without_flags(tiny_teacher: Path, tmp_path: Path, turns: str):
    base = {"teacher": {"model": str(tiny_teacher)}, "columns": {"messages": "talk"}}
    first = chats(tmp_path / "a.jsonl", 2)
    capture(given(first, tmp_path / "t", **base, sequences={"assistant_turns": turns}))
    more = chats(tmp_path / "b.jsonl", 4)
    assert capture(given(more, tmp_path / "t")).sequences == 2
    assert capture(given(more, tmp_path / "t", sequences={"assistant_turns": turns})).unchanged == 4
    other = {"all": "last", "last": "all"}[turns]
    with pytest.raises(ProvenanceError, match=rf"to match: --sequences\.assistant-turns {turns}"):
        capture(given(more, tmp_path / "t", sequences={"assistant_turns": other}))
    with pytest.raises(ProvenanceError, match=r"to match: --columns\.messages talk"):
        capture(given(more, tmp_path / "t", columns={"text": "id"}, sequences={"assistant_turns": "all"}))


def test_assistant_turns_without_chats_are_refused(tiny_teacher: Path, table: Path, tmp_path: Path):
    last, teacher = {"assistant_turns": "last"}, {"model": str(tiny_teacher)}
    for location in (table, tmp_path / "new"):
        with pytest.raises(UsageError, match="applies only to chats"):
            capture(given(named(tmp_path / "d.parquet", 1), location, teacher=teacher, sequences=last))


def test_a_new_table_needs_a_teacher(documents: Path, tmp_path: Path):
    for work in (lambda: capture(given(documents, tmp_path / "t")), lambda: estimate(nothing_but(documents))):
        with pytest.raises(UsageError, match=r"the setting teacher\.model is missing") as error:
            work()
        assert "pass --teacher.model, or set it in a --config file" in str(error.value)


def nothing_but(documents: Path, table: Path | None = None, **more: Any) -> EstimateConfig:
    location = None if table is None else str(table)
    return EstimateConfig.model_validate({"documents": str(documents), "table": location, **more})


def test_a_teacher_that_has_moved_is_missed_with_the_flag_that_finds_it(tiny_teacher: Path, tmp_path: Path):
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    capture(given(plain(tmp_path / "a.parquet", 2), tmp_path / "t", teacher={"model": str(teacher)}))
    documents = plain(tmp_path / "b.parquet", 3)
    moved = teacher.rename(tmp_path / "moved")
    with pytest.raises(TeacherError, match=r"(?s)the teacher of the table's newest capture.*teacher.*--teacher\.model"):
        capture(given(documents, tmp_path / "t"))
    assert capture(given(documents, tmp_path / "t", teacher={"model": str(moved)})).sequences == 1
    assert capture(given(plain(tmp_path / "b.parquet", 4), tmp_path / "t")).sequences == 1, "it is known from then on"


def test_another_model_at_the_teachers_place_is_refused_with_the_flag(tiny_teacher: Path, tmp_path: Path):
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    capture(given(plain(tmp_path / "a.parquet", 2), tmp_path / "t", teacher={"model": str(teacher)}))
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.model.norm.weight.data *= 1.5
    model.save_pretrained(teacher)
    with pytest.raises(ProvenanceError, match=r"model\.safetensors.*to match: --teacher\.model with the files that"):
        capture(given(plain(tmp_path / "b.parquet", 3), tmp_path / "t"))


def test_a_teacher_is_found_from_any_folder(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    capture(given(plain(tmp_path / "a.parquet", 2), tmp_path / "t", teacher={"model": "teacher"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert capture(given(plain(tmp_path / "b.parquet", 3), tmp_path / "t")).sequences == 1


def test_no_code_runs_because_a_table_names_it(tiny_teacher: Path, documents: Path, tmp_path: Path):
    config = CaptureConfig.model_validate(test_engine.settings(tiny_teacher, documents, tmp_path / "t"))
    capture(config)
    with pytest.raises(UsageError) as error:
        capture(given(documents, tmp_path / "t"))
    [advice] = re.findall(r"add (--teacher\.engine \S+); or, to run it with transformers, (.*)", str(error.value))
    for flags in map(read_flags, advice):
        located = {("documents",): str(documents), ("table",): str(tmp_path / "t")}
        assert capture(with_flags(CaptureConfig, flags | located, None)).unchanged == 60


@pytest.mark.parametrize("labels", [False, True], ids=["classifier", "the documents' labels"])
def test_a_table_of_a_classifier_takes_more_without_flags(tiny_teacher: Path, tmp_path: Path, labels: bool):
    teacher = save_classifier(tmp_path / "teacher", tiny_teacher)
    documents = save_documents(tmp_path / "d.parquet", 20)
    of_labels = {"labels": CLASSES} if labels else {}
    base = {"teacher": {"model": str(teacher), **of_labels}, "columns": {"label": "label", "carry": ("source",)}}
    first = capture(given(documents, tmp_path / "t", **base))
    before = Table.open(str(tmp_path / "t")).identity
    more = capture(given(save_documents(tmp_path / "d.parquet", 25), tmp_path / "t"))
    assert more.documents > first.documents
    assert more.sequences == more.documents - more.unchanged > 0
    assert Table.open(str(tmp_path / "t")).identity == before
    whole = given(tmp_path / "d.parquet", tmp_path / "t", sequences={"max_tokens": 1024})
    assert capture(whole).unchanged == more.documents, "the classifier's own limit is lower"
    if labels:
        wrong = given(tmp_path / "d.parquet", tmp_path / "t", teacher={"labels": CLASSES[::-1]})
        with pytest.raises(ProvenanceError, match=f"to match: --teacher.labels {' '.join(CLASSES)}"):
            capture(wrong)


def test_an_estimate_for_a_table_takes_what_is_left_out_from_it(table: Path, tmp_path: Path):
    found = estimate(nothing_but(named(tmp_path / "d.parquet", 6), table))
    assert (found.documents, found.pending, found.sequences) == (6, 2, 2)
    with pytest.raises(ProvenanceError, match=r"to match: --selection\.max-k 9"):
        estimate(nothing_but(tmp_path / "d.parquet", table, selection={"max_k": 16}))


def test_stale_rows_are_found_with_the_columns_of_the_capture(table: Path, tmp_path: Path):
    named(tmp_path / "d.parquet", 4)
    config = {"source": str(table), "stale": str(tmp_path / "d.parquet"), "destination": str(tmp_path / "new")}
    assert reprocess(ReprocessConfig.model_validate(config)).rows.dropped == 0


PASSES = [
    lambda config: CaptureConfig.model_validate(config.model_dump()),
    lambda config: CaptureConfig.model_validate_json(config.model_dump_json()),
    lambda config: CaptureConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))),
    lambda config: pickle.loads(pickle.dumps(config)),
    lambda config: config.model_copy(),
]


@pytest.mark.parametrize("passed", PASSES)
def test_what_is_given_is_remembered_wherever_settings_are_passed_on(table: Path, tmp_path: Path, passed: Any):
    documents = named(tmp_path / "d.parquet", 4)
    capture(passed(given(documents, table)))
    with pytest.raises(ProvenanceError, match=r"selection\.top_p: the table has 0\.9, this run 0\.95"):
        capture(passed(given(documents, table, selection={"top_p": 0.95})))


def test_a_job_is_the_same_in_another_process(table: Path, tmp_path: Path):
    job = resolve(given(named(tmp_path / "d.parquet", 4), table))
    assert CaptureJob.from_json(job.to_json()) == job
    assert CaptureJob.from_json(job.on("cpu").to_json()).settings.teacher.device == "cpu"


def test_the_settings_that_inspect_reports_are_all_that_a_capture_takes(table: Path):
    report: Any = inspect(str(table))
    for section, values in OWN.items():
        for name, value in values.items():
            found = report.settings[f"{section}.{name}"]
            assert (str(found) if name == "chat_template_date" else found) == value


def test_the_error_about_values_for_the_chat_template_names_their_flag(tiny_teacher: Path, tmp_path: Path) -> None:
    documents, base = (
        chats(tmp_path / "d.jsonl", 2),
        {"teacher": {"model": str(tiny_teacher)}, "columns": {"messages": "talk", "id": "id"}},
    )
    values = {"sequences": {"chat_template_kwargs": '{"thinks": false}'}}
    for name, first, second, flags in (
        ("without", {}, values, "--sequences.chat-template-kwargs left out"),
        ("with", values, {"sequences": {"chat_template_kwargs": "{}"}}, "--sequences.chat-template-kwargs '{"),
    ):
        capture(given(documents, tmp_path / name, **base, **first))
        with pytest.raises(ProvenanceError, match=re.escape(f"(to match: {flags}")):
            capture(given(documents, tmp_path / name, **base, **second))
