"""The command line: help, typing mistakes, exit codes, and what goes to which stream. No server, no torch."""

import json

import pytest

from softlabel.flows.cli import run

VERBS = ("capture", "train", "evaluate", "distill", "verify", "maintain", "reprocess", "inspect", "history")


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]):
    assert run([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--config" in shown
    assert "--json" in shown


def test_help_explains_settings(capsys: pytest.CaptureFixture[str]):
    run(["capture", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "The model whose predictions are stored" in shown
    assert "--selection.draws INT Samples drawn for the tail" in shown
    assert "[default: 48]" in shown


def test_version(capsys: pytest.CaptureFixture[str]):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["captrue"], 'Did you mean "capture"?'),
        (["capture", "d", "t", "--selection.topk", "64"], "Did you mean --selection.top-k?"),
        (["capture", "d", "t", "--techer.model", "m"], "Did you mean --teacher.model?"),
        (["capture", "d", "t", "--teacher.model", "m", "--teacher.dtype", "fp8"], "bfloat16"),
        (["capture", "d", "t"], "teacher.model is needed"),
        (["train", "t", "s", "--loss.temperature", "0"], "loss.temperature can't be used"),
        (["capture", "d", "t", "x", "--teacher.model", "m"], "x"),
        (["evaluate", "t"], "students is needed"),
        (["distill", "--config", "nowhere.yaml"], "no such configuration file"),
        (["inspect"], "no table is named"),
    ],
)
def test_misuse_exits_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("softlabel: ")
    assert said in err
    assert len(err.splitlines()) < 24


@pytest.mark.parametrize("verb", ["inspect", "history"])
def test_no_table_is_a_failure(verb: str, tmp_path, capsys: pytest.CaptureFixture[str]):
    assert run([verb, str(tmp_path / "nowhere"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == "TableNotFoundError"
    assert "there is no soft-label table here" in err


def test_the_table_may_be_named_in_a_jobs_file(tmp_path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "run.yaml"
    file.write_text(f"table: {tmp_path}/nowhere")
    assert run(["inspect", "--config", str(file)]) == 1
    assert f"{tmp_path}/nowhere" in capsys.readouterr().err
