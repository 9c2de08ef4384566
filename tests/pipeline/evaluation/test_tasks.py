"""Tasks of lm-eval: their scores are lm-eval's own, what can't be run is named at once, and nothing runs unasked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation import tasks as module
from softlabel.pipeline.evaluation.evaluate import evaluate, preview_evaluate
from softlabel.storage.errors import UsageError
from tests.conftest import ROOT, topics
from tests.pipeline.evaluation.test_evaluate import make_student, recorded

PROGRAMS = ROOT / ".venv" / "programs"

CHOICE = """
task: choice
tag: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
num_fewshot: 2
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
filter_list:
  - {{name: first, filter: [{{function: regex, regex_pattern: "(\\\\w)"}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity}}
"""
GROUP = "group: ours_together\ntask: [choice]\naggregate_metric_list: [{{metric: acc}}]\n"
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef process(docs): return docs\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    texts = [text[:60] for text in topics().values() if len(text) > 60][:24]
    rows = [
        {"question": text[:40], "choices": [text[40:46], "zz", f"{number}"], "answer": number % 2}
        for number, text in enumerate(texts)
    ]
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def students(tiny_teacher, table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    names = {"good": 0.0, "noisy": 0.2}
    return [str(make_student(folder / name, tiny_teacher, recorded(table), noise=n)) for name, n in names.items()]


def folder_of(folder, data, **files):
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return str(folder)


def config(table, students, folder, **tasks):
    settings = {"table": table.location, "students": students, "report": str(folder / "report"), "device": "cpu"}
    return {**settings, "tasks": tasks, "cost": {"measure": False}}


def in_a_process(folder, *calls):
    """The results of ``lm_eval_runs``, offline."""
    assert PROGRAMS.is_dir(), "make test-long installs lm-eval"
    paths = {"PYTHONPATH": f"{PROGRAMS}:{ROOT}", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.pipeline.evaluation.lm_eval_runs"]
    asked, environment = json.dumps(calls), os.environ | paths
    done = subprocess.run(command, input=asked, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_missing_lm_eval_is_named_before_anything_is_measured(table, students, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for tasks in ({"names": ("arc_easy",)}, {"include": (str(tmp_path),)}):
        settings = EvaluateConfig(**config(table, students, tmp_path, **tasks))
        for verb in (evaluate, preview_evaluate):
            with pytest.raises(UsageError, match=r"not installed(.|\n)*pip install 'softlabel\[lm-eval\]'"):
                verb(settings)
    assert not (tmp_path / "report").exists()


@pytest.mark.long
def test_scores_are_those_of_lm_eval_itself(table, students, tiny_teacher, data, tmp_path):
    """Of students and of the teacher, for choices, generated answers and whole texts."""
    include = folder_of(tmp_path / "tasks", data, choice=CHOICE, written=WRITTEN, rolling=ROLLING, group=GROUP)
    models = [*students, str(tiny_teacher)]
    names = ["choice", "written", "rolling"]
    report, grouped, *wanted = in_a_process(
        tmp_path,
        ("evaluated", {"config": config(table, models, tmp_path, include=[include])}),
        (
            "evaluated",
            {"config": config(table, models, tmp_path / "group", include=[include], names=["ours_together"])},
        ),
        *(("expected", {"model": model, "include": include, "tasks": names}) for model in models),
    )
    content = json.loads(Path(report["json"]).read_text())
    for student, own in zip(content["students"], wanted, strict=True):
        scores = {(each["task"], each["metric"]): each for each in student["tasks"]}
        assert set(scores) == {
            ("choice", "acc"),
            ("choice", "acc_norm"),
            ("written", "exact_match (first)"),
            ("rolling", "word_perplexity"),
        }
        for (task, metric), score in scores.items():
            name = metric.removesuffix(" (first)")
            assert score["value"] == pytest.approx(own[task][f"{name},{'first' if '(' in metric else 'none'}"])
            assert score["documents"] == 24
        assert scores["choice", "acc"]["error"] == pytest.approx(own["choice"]["acc_stderr,none"])
        assert scores["choice", "acc"]["few_shot"] == 2
        assert scores["rolling", "word_perplexity"]["error"] is None  # lm-eval gives none
    pairs = {
        (each["student"], each["other"], each["task"], each["metric"]): each for each in content["task_comparisons"]
    }
    found = pairs["good", "noisy", "choice", "acc"]["difference"]
    assert found["mean"] == pytest.approx(wanted[0]["choice"]["acc,none"] - wanted[1]["choice"]["acc,none"])
    assert found["interval"][0] < found["mean"] < found["interval"][1]
    assert mean(found["interval"]) == pytest.approx(found["mean"])
    same = pairs["good", "teacher", "choice", "acc"]["difference"]
    assert (same["mean"], same["error"]) == (0, 0)  # that student has the teacher's weights
    assert not any(task == "rolling" for _, _, task, _ in pairs)  # its score is no mean over documents
    assert content["circumstances"]["lm-eval"]
    assert "word_perplexity" in Path(report["json"]).with_suffix(".html").read_text()
    group = json.loads(Path(grouped["json"]).read_text())["students"][0]["tasks"]
    assert [(each["task"], each["few_shot"]) for each in group if each["metric"] == "acc"] == [
        ("choice", 2),
        ("ours_together", 2),
    ]


@pytest.mark.long
def test_what_cannot_be_run_is_named_before_anything_is_measured(table, students, data, tmp_path):
    folders = {
        "function": {"choice": CHOICE + "process_docs: !function code.process\n"},
        "template": {"choice": CHOICE.replace("question}", "question.__class__.__mro__}", 1)},
        "missing": {"choice": CHOICE.replace("{data}", "/nowhere/data.jsonl")},
        "unsafe": {"choice": CHOICE + "unsafe_code: true\n"},
    }
    for name, files in folders.items():
        folder_of(tmp_path / name, data, **files)
        (tmp_path / name / "code.py").write_text(CODE)

    def asked(**tasks):
        return "evaluated", {"config": config(table, students[:1], tmp_path, **tasks)}

    trusted = {"include": [str(tmp_path / "function")], "trust_code": True}
    unknown, offline, missing, function, unsafe, template, ran = in_a_process(
        tmp_path,
        asked(names=["arc_eazy"]),
        asked(names=["arc_easy"]),
        *(asked(include=[str(tmp_path / name)]) for name in ("missing", "function", "unsafe", "template")),
        asked(**trusted),
    )
    for found, texts in (
        (unknown, ("no task arc_eazy", "arc_easy")),
        (offline, ("arc_easy can't be loaded", "HF_HUB_OFFLINE")),
        (missing, ("choice can't be loaded", "/nowhere/data.jsonl")),
        (function, ("would run Python code", "!function code.process", "choice.yaml", "tasks.trust_code")),
        (unsafe, ("would run Python code", "unsafe_code")),
        (template, ("choice can't be loaded", "SecurityError")),
    ):
        assert found["error"] == "UsageError"
        assert all(text in found["text"] for text in texts), found["text"]
        assert found["stages"] == []
    assert "json" in ran
    assert (tmp_path / "function" / "ran").exists()


@pytest.mark.long
def test_an_evaluation_that_was_killed_keeps_the_scores_of_finished_models(table, students, data, tmp_path):
    include = folder_of(tmp_path / "tasks", data, choice=CHOICE)
    settings = config(table, students, tmp_path, include=[include])
    whole, killed, resumed = in_a_process(
        tmp_path,
        ("evaluated", {"config": settings | {"report": str(tmp_path / "whole")}}),
        ("evaluated", {"config": settings, "dies_at": "tasks noisy"}),
        ("evaluated", {"config": settings}),
    )
    assert "tasks good" in killed["stages"]
    assert "json" not in killed
    assert [each for each in resumed["stages"] if each.startswith("tasks")] == ["tasks noisy"]
    scores = [
        [student["tasks"] for student in json.loads(Path(each["json"]).read_text())["students"]]
        for each in (whole, resumed)
    ]
    assert scores[0] == scores[1]
