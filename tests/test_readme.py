"""The code in README runs as it is written, with a tiny teacher and real text."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.buckets import reserved_ports
from tests.conftest import ROOT, topics
from tests.flows.servers import wait_until


def test_the_python_code_runs_from_documents_to_an_evaluated_student(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code
    texts = [text[:200] for text in topics().values()]
    pq.write_table(pa.table({"id": list(topics()), "text": texts}), tmp_path / "documents.parquet")
    (tmp_path / "teacher").symlink_to(tiny_teacher)
    monkeypatch.chdir(tmp_path)
    exec(code[1], {})
    captured, steps, kl = capsys.readouterr().out.splitlines()
    positions, bytes_per_position = captured.split()
    assert int(positions) > 1000
    assert 0 < float(bytes_per_position) < 500
    assert int(steps) > 0
    assert 0 < float(kl) < 20
    assert {"table", "student", "report"} <= {path.name for path in tmp_path.iterdir()}


@pytest.fixture
def port() -> Iterator[int]:
    """A port for a server."""
    with reserved_ports(1) as [port]:
        yield port


@pytest.mark.long
def test_the_commands_of_scheduling_capture_by_hand_and_on_a_schedule(
    tiny_teacher: Path, documents: Path, port: int, tmp_path: Path
):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Scheduling\n")[1].split("\n## ")[0]
    start, run = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    [site] = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)

    def here(text: str) -> str:
        """The text with the paths and the port of this test."""
        text = text.replace(". .venv/bin/activate", f"export PATH={Path(sys.executable).parent}:$PATH")
        text = re.sub(r"/data/wiki(?=\W)(?!\.table)|s3://data/wiki(?=\W)(?!\.table)", str(documents), text)
        text = re.sub(r"(s3://data|/data)/wiki\.table", str(tmp_path / "table"), text)
        return text.replace("/models/teacher", str(tiny_teacher)).replace("4200", str(port))

    described = yaml.safe_load(here(site))
    nightly = described["deployments"][0] | {"cron": "* * * * *"}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"deployments": [nightly]}))
    (tmp_path / ".demo").mkdir()
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_SERVER_API_PORT": str(port)}
    environment |= {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_API_URL", None)
    shell = subprocess.Popen(
        ["bash"], cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert shell.stdin
    assert shell.stdout

    def command(line: str) -> str:
        """What a command prints in the one shell in which the reader types all of them."""
        shell.stdin.write(f"{line}\necho; echo END $?\n")
        shell.stdin.flush()
        printed = []
        while not (line := shell.stdout.readline()).startswith("END "):
            printed.append(line)
        assert line == "END 0\n", "".join(printed)
        return "".join(printed)

    try:
        command(here(start))
        assert "Completed" in command(here(run))
        found = json.loads(command(f"softlabel inspect {tmp_path}/table --json"))["inspection"]
        assert sum(split["documents"] for split in found["splits"].values()) == 60
        command("softlabel deploy --config site.yaml --schedules")
        done = "prefect flow-run ls --state COMPLETED --flow-name capture --output json"
        wait_until(lambda: len(json.loads(command(done))) > 1, seconds=180)
    finally:
        shell.stdin.write("kill -KILL %1 %2\n")  # without job control, they ignore SIGINT, and so Prefect SIGTERM
        shell.communicate()
