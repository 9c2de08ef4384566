"""The whole pipeline as a user runs it: from documents to a report with a real teacher, and after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from softlabel.pipeline.examples import language_model as demo
from softlabel.storage.reader import index
from softlabel.storage.table import Table
from tests.listening import trap
from tests.pipeline.bigrams import UNHURRIED
from tests.pipeline.capturing.test_worker_pool import gone, workers_of

NO_WAY_OUT = """
import os, socket

def record(place):
    if not str(place).startswith(("127.", "::1", "localhost", "/", "None")):
        with open(os.environ["CALLED"], "a") as calls:
            print(place, file=calls)

connect, resolve = socket.socket.connect, socket.getaddrinfo
socket.socket.connect = lambda self, at: (record(at[0] if isinstance(at, tuple) else at), connect(self, at))[1]
socket.getaddrinfo = lambda host, *rest, **more: (record(host), resolve(host, *rest, **more))[1]
"""
"""A sitecustomize module that records every connection to another machine."""


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's folder, which the first command makes."""
    return tmp_path_factory.mktemp("home") / "prefect"


def softlabel(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("softlabel")), *arguments]


def test_soft_labels_bring_a_student_closer_to_its_teacher_than_text_does(
    smollm2: Path, prefect_home: Path, tmp_path: Path
) -> None:
    """SmolLM2 on a few pages of Python's manual.

    Runs as a user would, without a configured server: stdout is one object, and nothing contacts another machine. The
    folder of the documents also has code, which is not run.
    """
    folder = tmp_path / "downloaded"
    caught = trap(folder)
    demo.prepare_documents(tmp_path / "all.parquet")
    documents = pq.read_table(tmp_path / "all.parquet")
    small = pa.compute.less(pa.compute.utf8_length(documents.column("text")), 1200)
    pq.write_table(documents.filter(small).slice(0, 8), folder / "documents.parquet")
    config = demo.demo_config(folder).model_dump(mode="json", exclude_unset=True)
    config["teacher"]["model"] = str(smollm2)
    config["student"]["layers"] = [0, 14, 29]
    config["shards"]["eval_fraction"] = 0.3
    config["sequences"] = {"max_tokens": 256}
    config["stream"] = {"max_length": 256, "batch_size": 1, "micro_batch_size": 1}
    config["optimizer"] = {"max_steps": 4, "eval_steps": 4, "learning_rate": 1e-3, "bf16": True}
    config["cost"] = {"prompt_tokens": 16, "new_tokens": 2, "runs": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    command = softlabel("distill", "--config", "run.yaml", "--json")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "sitecustomize.py").write_text(NO_WAY_OUT)
    calls = tmp_path / "calls"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_API", "CI"))}
    environment |= {"PYTHONPATH": str(tmp_path / "notes"), "CALLED": str(calls), "PREFECT_HOME": str(prefect_home)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert not calls.exists(), calls.read_text()
    assert not caught.exists(), caught.read_text()
    report = json.loads(done.stdout)
    student, control = report["evaluate"]["students"]
    assert (student["name"], control["name"]) == ("student", "control")
    assert student["kl"] < control["kl"]
    assert report["evaluate"]["teacher"]["perplexity"] < student["perplexity"]
    assert report["train"]["student"]["steps"] == report["train"]["control"]["steps"] == 4
    page = Path(report["evaluate"]["html"]).read_text()
    assert all(name in page for name in ("student", "control", "<svg"))


def test_a_killed_capture_that_runs_again_completes_the_table(
    tiny_teacher: Path, prefect_home: Path, tmp_path: Path
) -> None:
    """In a folder of documents that also has code, none of which the command, its workers and its server run.

    By an engine whose processes start soon, and which takes its time.
    """
    folder = tmp_path / "downloaded"
    caught = trap(folder)
    count = 600
    texts = {f"d{i}": f"Document number {i} says that {i * i} is the square of {i}." for i in range(count)}
    pq.write_table(pa.table({"id": list(texts), "text": list(texts.values())}), folder / "documents.parquet")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
    environment["PREFECT_HOME"] = str(prefect_home)
    command = softlabel("capture", "documents.parquet", "table", "--shards.positions", "2000")
    command += ["--teacher.model", str(tiny_teacher), "--teacher.engine", UNHURRIED, "--teacher.batch-tokens", "512"]
    by_two = [*command, "--teacher.device", "cpu", "--teacher.workers", "2"]
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(by_two, cwd=folder, env=environment, **quiet) as child:
        _wait_for_commits(folder / "table", 3, child)
        workers = workers_of(child.pid)
        os.kill(child.pid, signal.SIGKILL)
    assert len(workers) == 2
    _wait_for_end(workers)
    committed = _rows(folder / "table")
    assert 0 < len(committed) < count
    again = subprocess.run(
        [*command, "--json"], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    rows = _rows(folder / "table")
    assert len(rows) == count
    assert set(rows.values()) == {1}
    assert committed.keys() <= rows.keys()
    assert json.loads(again.stdout)["sequences"] == count - len(committed)
    assert not caught.exists(), caught.read_text()


def _rows(table: Path) -> Counter[tuple[str, int, bytes]]:
    columns = index(Table.open(str(table)), ["document_id", "chunk", "key"])
    return Counter(zip(*(columns.column(name).to_pylist() for name in columns.column_names[:3]), strict=True))


def _wait_for_end(workers: list[int]) -> None:
    deadline = time.monotonic() + 60
    while not all(map(gone, workers)):
        assert time.monotonic() < deadline, "a worker outlived the process that started it"
        time.sleep(0.05)


def _wait_for_commits(table: Path, count: int, child: "subprocess.Popen[bytes]") -> None:
    log = table / "_delta_log"
    deadline = time.monotonic() + 180
    while len(list(log.glob("*.json"))) < count + 1:
        assert child.poll() is None, "the capture ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
