"""The command line: help, typing mistakes, exit codes, stdout and stderr. Needs no server and no torch."""

import json
import re
from pathlib import Path

import pytest

from softlabel.flows.cli import run

VERBS = (
    "capture",
    "train",
    "evaluate",
    "compare",
    "distill",
    "verify",
    "maintain",
    "reprocess",
    "inspect",
    "history",
    "show",
    "export",
)


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]):
    assert run([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--config" in shown
    assert "--json" in shown


def test_help_explains_settings(capsys: pytest.CaptureFixture[str]):
    run(["capture", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "The model whose predictions are stored" in shown
    assert "--selection.draws INT Samples of the tail: at each position" in shown
    assert "[default: 48]" in shown


def test_version_is_printed(capsys: pytest.CaptureFixture[str]):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["captrue"], 'Did you mean "capture"?'),
        (["capture", "d", "t", "--selection.topk", "64"], "Did you mean --selection.top-k?"),
        (["capture", "d", "t", "--techer.model", "m"], "Did you mean --teacher.model?"),
        (["capture", "d", "t", "--teacher.model", "m", "--teacher.dtype", "fp8"], "bfloat16"),
        (["train", "t", "s", "--loss.temperature", "0"], "invalid value for loss.temperature"),
        (["capture", "d", "t"], "the setting teacher.model is missing"),
        (["train", "t", "s", "x"], "too many arguments: x\n"),
        (["capture", "d", "--documents", "e", "--table", "t"], "documents are given twice"),
        (["capture", "d", __file__, "--teacher.model", "m"], "the last of several arguments is the table, but it is a"),
        (["estimate", "d", str(Path(__file__).parent)], "but it is a folder with other files, such as "),
        (["capture", "d", str(Path(__file__).parent)], "write --documents before them"),
        (["estimate", "d", "e", __file__, "--teacher.model", "m"], "put a glob in quotes"),
        (["evaluate", "t"], "the setting students is missing"),
        (["distill", "--config", "nowhere.yaml"], "the configuration file does not exist"),
        (["inspect"], "no table was given"),
    ],
)
def test_misuse_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("softlabel: ")
    assert message in err
    assert len(err.splitlines()) < 24


@pytest.mark.parametrize(
    ("arguments", "name", "problem"),
    [
        (["train", "t", "s", "--student.depth", "0"], "student.depth", "greater than 0"),
        (["train", "t", "s", "--optimizer.processes", "0"], "optimizer.processes", "greater than"),
        (["train", "t", "s", "--student.model", "~nouser/x"], "student.model", "does not know that user"),
        (["maintain", "t", "--keep-versions", "0"], "keep_versions", "greater than 0"),
        (["maintain", "t", "--tag", "1a"], "tag", "must be NAME or NAME=VERSION, where NAME is a letter"),
        (["mix", "v", "a", "b", "--weights", "0"], "weights", "greater than 0"),
        (
            ["capture", "d", "t", "--teacher.model", "m", "--selection.temperatures", "0"],
            "selection.temperatures",
            "0.001",
        ),
        (["reprocess", "t", "~nouser/x"], "destination", "does not know that user"),
    ],
)
def test_a_refused_value_is_explained_with_its_flag(
    arguments: list[str], name: str, problem: str, capsys: pytest.CaptureFixture[str]
):
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert re.match(rf"softlabel: invalid (value for )?{re.escape(name)}[\n:]", err)
    assert problem in err
    assert err.endswith(f"\n  where:       --{name.replace('_', '-')}\n")
    assert "pydantic" not in err
    assert "match pattern" not in err


@pytest.mark.parametrize("verb", ["inspect", "history"])
def test_a_table_that_does_not_exist_is_a_failure(verb: str, tmp_path, capsys: pytest.CaptureFixture[str]):
    assert run([verb, str(tmp_path / "nowhere"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == "TableNotFoundError"
    assert "there is no soft-label table here" in err


def test_the_table_may_be_named_in_a_configuration_file(tmp_path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "run.yaml"
    file.write_text(f"table: {tmp_path}/nowhere")
    assert run(["inspect", "--config", str(file)]) == 1
    assert f"{tmp_path}/nowhere" in capsys.readouterr().err
