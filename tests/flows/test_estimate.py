"""``softlabel estimate`` on the command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from softlabel.flows.cli import run
from softlabel.flows.display.verbs import show_estimate
from softlabel.pipeline.estimation.estimate import Estimate, Preview, Seconds, Segment

pytestmark = pytest.mark.usefixtures("prefect")


def test_people_and_programs_get_the_same_estimate(
    tiny_teacher: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["estimate", str(documents), "--teacher.model", str(tiny_teacher), "--selection.top-k", "5"]
    command += ["--sample.batches", "1", "--gpu", "l4"]
    assert run([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "read" in err
    assert "estimate" in err
    assert [selection["name"] for selection in found["selections"]] == [
        "requested",
        "default",
        "top-16",
        "top-64",
        "50 draws",
    ]
    assert run(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        f"{found['sequences']:,} sequences, {found['positions']:,} positions",
        "on cpu",
        "one l4",
        "lost (KL)",
    ):
        assert text in shown


def test_an_unknown_gpu_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]):
    assert run(["estimate", "d", "--teacher.model", "t", "--gpu", "abacus"]) == 2
    assert "h100" in capsys.readouterr().err


def test_a_partial_sample_is_reported_to_overestimate_repeated_passages(capsys: pytest.CaptureFixture[str]):
    seconds = Seconds(0.0, copy=61.0)
    found = Estimate(9, pending=9, rejects=0, tokenized=1.0, seconds=seconds, gpu="h100", gpu_utilization=0.4)
    show_estimate(replace(found, sequences=5, copied=4))
    shown = capsys.readouterr().out
    assert "4 sequences copied from other documents" in shown
    assert "copying 0:01:01" in shown
    assert "the real number of sequences" not in shown
    show_estimate(replace(found, sequences=5, tokenized=0.9))
    assert "the real number of sequences and positions and the teacher's time are lower" in capsys.readouterr().out


def test_documents_without_new_sequences_are_not_reported_as_captured(capsys: pytest.CaptureFixture[str]):
    found = Estimate(9, pending=3, rejects=0, tokenized=1.0, seconds=Seconds(0.0), gpu="h100", gpu_utilization=0.4)
    show_estimate(found)
    assert "3 documents are not in the table" in capsys.readouterr().out
    show_estimate(replace(found, copied=4, bytes=5000))
    assert "would only copy about 4 sequences, 5.0 kB" in capsys.readouterr().out
    show_estimate(replace(found, pending=0))
    assert "the table already holds all 9 documents" in capsys.readouterr().out


def test_documents_are_shown_as_the_teacher_will_read_them_without_their_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    segments = (
        Segment("user\x1b[2J [red]Hi\u202e", False),
        Segment("Hello\nthere\x07\u27e7", True),
        Segment("!", False),
    )
    found = Estimate(1, pending=1, rejects=0, tokenized=1.0, seconds=Seconds(0.0), gpu="h100", gpu_utilization=0.4)
    show_estimate(replace(found, previews=(Preview("d\x1b[31m1", segments),), answers=100, partial_answers=41))
    shown = capsys.readouterr().out
    assert "41 of 100 answers incomplete" in shown
    for line in (
        r"document d\x1b[31m1: what is between ⟦ and ⟧ is captured",
        r"  | user\x1b[2J [red]Hi\u202e⟦Hello",
        r"  | there\x07\u27e7⟧!",
    ):
        assert line in shown.splitlines()
    assert "\x1b" not in shown
