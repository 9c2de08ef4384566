"""Log lines as JSON: every line on stderr is one object that says what it is about, and holds no secret."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softlabel.flows.deploy import deploy
from softlabel.flows.deployments import DeployConfig
from softlabel.flows.running.logs import JsonLines
from softlabel.pipeline.log_context import about
from tests.flows.captures import Capture
from tests.flows.servers import prefect_server, wait_until, worker
from tests.pipeline.captured import make_table
from tests.pipeline.capturing.test_capture import texts, write

PLANTED = {"AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI", "PREFECT_API_AUTH_STRING": "admin:hunter2"}


def entries(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def command(home: Path, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "softlabel.flows.cli", *map(str, arguments)],
        env=os.environ | {"PREFECT_HOME": str(home), "SOFTLABEL_LOG_FORMAT": "json"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.long
def test_a_capture_and_its_refusal_print_only_json_lines_on_stderr(
    prefect_home: Path, tiny_teacher: Path, tmp_path: Path
):
    documents, table = write(tmp_path / "d.parquet", texts(40)), tmp_path / "table"
    small = ("--teacher.model", tiny_teacher, "--teacher.dtype", "float32", "--sequences.max-tokens", 128)
    done = command(prefect_home, "capture", documents, table, *small, "--teacher.workers", 2, "--shards.positions", 300)
    assert done.returncode == 0, done.stderr
    lines = entries(done.stderr)
    assert {line["level"] for line in lines} == {"INFO"}
    assert {line["table"] for line in lines} == {str(table)}
    captured = [line for line in lines if line["message"].startswith("capture ")]
    assert captured
    assert all(line["run_name"] == f"capture {table}" and len(line["run"]) == 36 for line in captured)
    assert any("shard" in line for line in captured)

    refused = command(prefect_home, "capture", "s3://key:secret@bucket/", table, *small)
    assert refused.returncode == 2
    (line,) = entries(refused.stderr)
    assert line["level"] == "ERROR"
    assert "secret@" not in refused.stderr


def test_a_line_is_one_object_whatever_is_logged():
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    logged: list[tuple[object, ...]] = [
        ("two\nlines \u2028 \udce9",),
        ("x" * 1_000_000,),  # in no time
        ("%s", b"\xff\n"),
        ("%d", "no number"),
        ("%s %s", "one"),
        ("%s", Broken()),
    ]
    record = logging.getLogger("softlabel").makeRecord
    for message, *arguments in logged:
        line = JsonLines().format(record("softlabel", logging.INFO, "", 0, message, tuple(arguments), None))
        assert line.isascii()
        assert "\n" not in line
        assert json.loads(line)["message"]


@pytest.mark.long
def test_a_training_by_several_ranks_prints_only_json_lines(prefect_home: Path, tiny_teacher: Path, tmp_path: Path):
    table = make_table(tmp_path / "table", tiny_teacher, held_out=4)
    small = ("--student.layers", 1, "--optimizer.device", "cpu", "--optimizer.processes", 2, "--stream.max-length", 40)
    done = command(prefect_home, "train", table.location, tmp_path / "student", *small)
    assert done.returncode == 0, done.stderr
    lines = entries(done.stderr)
    assert {line["student"] for line in lines} == {str(tmp_path / "student")}


WARNING = """
import logging, sys, warnings
from softlabel.flows import maintain
from softlabel.flows.running import runner
from softlabel.pipeline.config.tables import MaintainConfig

def work(_):
    warnings.warn("of a library")
    logging.getLogger("library").warning("in\\ntwo lines")
    logging.getLogger("softlabel").info("ours")
    raise SystemExit

maintain.maintain = work
runner._require_inputs = lambda _: None
runner.run("maintain", MaintainConfig(table="table"))
"""


@pytest.mark.long
def test_warnings_and_lines_of_libraries_are_json_too(prefect_home: Path):
    environment = os.environ | {"PREFECT_HOME": str(prefect_home), "SOFTLABEL_LOG_FORMAT": "json"}
    done = subprocess.run([sys.executable, "-c", WARNING], env=environment, capture_output=True, text=True)
    lines = entries(done.stderr)
    assert [line["message"] for line in lines if line["logger"] == "library"] == ["in\ntwo lines"]
    assert [line["message"] for line in lines if line["logger"] == "softlabel"] == ["of a library", "ours"]


def test_another_format_is_refused(prefect_home: Path, tmp_path: Path):
    done = command(prefect_home, "maintain", tmp_path / "table", SOFTLABEL_LOG_FORMAT="xml")
    assert done.returncode == 2
    assert "SOFTLABEL_LOG_FORMAT" in done.stderr


@pytest.mark.parametrize(
    "message",
    [
        "no access to s3://key:PLANTED@bucket/table",
        "put https://bucket.s3/x?X-Amz-Signature=PLANTED failed",
        "signature of wJalrXUtnFEMI does not match",
        "401 for admin:hunter2",
    ],
)
def test_no_secret_is_in_a_line(message: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    try:
        raise OSError(message)
    except OSError as error:
        record = logging.LogRecord("softlabel", logging.ERROR, "", 0, message, None, (OSError, error, None))
    with about(table=message):
        line = JsonLines().format(record)
    for secret in ("PLANTED", *PLANTED.values()):
        assert secret not in line


def test_hostile_text_stays_in_one_line_of_ascii():
    message = 'a document named "\n{\\"level\\": 1}\x1b[31m\u202e\r'
    record = logging.LogRecord("softlabel", logging.INFO, "", 0, "%s", (message,), None)
    line = JsonLines().format(record)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["message"] == message.strip()


@pytest.mark.long
def test_a_run_under_a_worker_prints_json_lines_and_prefect_still_gets_its_logs(tiny_teacher: Path, tmp_path: Path):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    log = tmp_path / "worker.log"
    with prefect_server(tmp_path):
        deploy(DeployConfig())
        capture = Capture(tmp_path, tiny_teacher, workers=2)
        with worker(log=log, SOFTLABEL_LOG_FORMAT="json", **capture.pace(0)):
            wait_until(lambda: capture.run.state_name == "Completed", seconds=180)
        with get_client(sync_client=True) as client:
            run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[capture.id]))
            wait_until(lambda: any("positions" in line.message for line in client.read_logs(run)), seconds=30)
            logged = [line.message for line in client.read_logs(run)]
            assert not any(line.startswith("{") for line in logged)
            # Both worker processes warn, with each pass.
            assert [line for line in logged if "of the" in line] == ["library: of the library", "of the engine"]
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    ours = [line for line in lines if line["logger"].startswith("softlabel")]
    assert ours
    assert {(line["run"], line["table"]) for line in ours} == {(str(capture.id), str(capture.table))}
    assert any("shard" in line for line in ours)
    assert any(line["logger"].startswith("prefect.flow_runs") for line in lines)
