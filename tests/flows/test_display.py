"""What the command prints for classifiers; the tests of the flows cover language models."""

import os
import re
import subprocess
import sys

import pytest

from softlabel.flows.display.console import console, count, table_of
from softlabel.flows.display.verbs import show_capture, show_distill, show_evaluate, show_train
from softlabel.pipeline.capturing.capture import CaptureReport
from softlabel.pipeline.distillation import DistillReport
from softlabel.pipeline.evaluation.report.classifier_report import ClassEvaluation, ClassScore
from softlabel.pipeline.evaluation.report.scores import EvaluationReport, Score
from softlabel.pipeline.models.pruning import spread
from softlabel.pipeline.training.train import TrainReport


def test_classifiers_are_shown_next_to_their_teacher(capsys: pytest.CaptureFixture[str]):
    captured = CaptureReport("table", 3, 20, 20, 1, 0, None, 2, 0, 0, 0, 0, 0.1)
    trained = TrainReport("runs/student", "table@3", 8, 8, 8, None, 1000, 160, 1.0, {})
    scores = (
        ClassScore("teacher", None, None, None, None, 0.0, None),
        ClassScore("s", 0.5, 0.4, 0.3, 0.2, 0.125, 1000),
    )
    evaluated = ClassEvaluation(
        "report.html", "report.json", "table", 3, 4, 1, 0.25, scores[0], scores[1:], (), "s wins."
    )
    show_distill(DistillReport(captured, {"student": trained}, evaluated))
    shown = capsys.readouterr().out
    for text in (
        "2 documents cut short to the classifier's longest input",
        "1 document left out: taken down earlier",
        "50.0%",
        "s wins.",
        "20.0%",
        "0.125",
        "4 held-out documents; 1 more left out (also in the train split)",
    ):
        assert text in shown
    assert "25.0% of the teacher's probability is on classes without a label" in shown
    # No suggestion to train another student from this one: that would need its labels, which are not known here.
    assert shown.count("  softlabel ") == 1


def test_one_thing_is_shown_in_the_singular():
    assert (count(1, "file"), count(0, "file"), count(2_000, "new shard")) == ("1 file", "0 files", "2,000 new shards")


def test_a_training_that_kept_earlier_weights_says_where_it_stopped(capsys: pytest.CaptureFixture[str]):
    show_train(TrainReport("runs/student", "table@3", 39, 52, 52, None, 1000, 160, 1.0, {}))
    assert "39 steps (the best weights; training stopped at step 52), " in capsys.readouterr().out


def test_the_command_suggested_after_a_capture_works_with_a_teacher_of_two_layers(capsys: pytest.CaptureFixture[str]):
    show_capture(CaptureReport("table", 3, 20, 20, 0, 0, None, 2, 0, 0, 0, 0, 0.1))
    [depth] = re.findall(r"softlabel train table STUDENT --student\.depth (\d+)\n", capsys.readouterr().out)
    assert spread(int(depth), 2) == (0, 1)


def test_a_capture_that_holds_nothing_out_says_so(capsys: pytest.CaptureFixture[str]):
    for held_out in (True, False):
        show_capture(CaptureReport("table", 3, 20, 20, 0, 0, None, 0, 1, 0, 9, 9, 0.1, held_out=held_out))
        assert ("no document is held out" in capsys.readouterr().out) is not held_out


@pytest.mark.parametrize(("kind", "shown"), [("unbiased", " 1.500 ±0.100 "), ("lower bound", " ≥ 1.500 ±0.100 ")])
def test_a_lower_bound_is_shown_as_one(kind: str, shown: str, capsys: pytest.CaptureFixture[str]):
    scores = (Score("t", 9.0, 0.8, 0.0, None, 1.0, 1.0, 1000), Score("s [b]", 12.0, 0.9, 1.5, 0.1, 0.5, 0.6, 500))
    paths = ("report.html", "report.json")
    show_evaluate(EvaluationReport(*paths, "table", 3, 4, 90, 4, 1, 2, scores[0], scores[1:], (), "Close.", kind))
    out = capsys.readouterr().out
    assert shown in out
    assert "≥ 0.000" not in out
    assert ("at least this" in out) is (kind == "lower bound")
    assert "s [b]" in out
    assert (
        "90 positions of 4 held-out sequences of 4 documents; 1 more left out (also in the train split); 2 left" in out
    )


PRINT_A_WIDE_TABLE = """
from softlabel.flows.display.console import console, table_of
table = table_of("a", "b")
table.add_row("x" * 70, "y" * 70)
console.print(table)
"""


def test_nothing_is_cut_off_in_a_pipe():
    """Which has no width: rich would cut cells off at 80 columns."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-c", PRINT_A_WIDE_TABLE]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "y" * 70 in shown


@pytest.mark.parametrize("width", [30, 60, 80])
def test_a_narrow_terminal_loses_neither_numbers_nor_names(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(console, "_width", width)
    table = table_of("", "perplexity", "KL", last="outdone by")
    table.add_row("x" * 70, "1,234.56", "1.500 ±0.042", ", ".join(["other"] * 9))
    console.print(table)
    out = capsys.readouterr().out
    assert "1,234.56  1.500 ±0.042" in out
    assert (out.count("x"), out.count("other"), "…" in out) == (70 + 1, 9, False)
    assert max(map(len, out.splitlines())) <= max(width, 60)
