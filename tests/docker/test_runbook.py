"""The runbook, docker/README.md: its commands run as they are written, on the compose file's services."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docker.images import Images, network
from tests.docker.stack import Stack, prepare
from tests.flows.servers import POSTGRES

pytestmark = pytest.mark.long

RUNBOOK = (ROOT / "docker/README.md").read_text()
FIRST, SECOND = (
    {
        "PREFECT_AUTH": f"admin:{word}",
        "POSTGRES_PASSWORD": f"{word}-password",
        "S3_ACCESS_KEY": word,
        "S3_SECRET_KEY": f"{word}-secret",
    }
    for word in ("first", "second")
)
INSPECT = "docker compose exec -T cpu-worker softlabel inspect s3://softlabel/table --json"
QUERY = "docker compose exec -T postgres psql --username=prefect --dbname=prefect --tuples-only --command"


class Runbook:
    """Runs the commands of a section."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run(self, heading: str) -> str:
        """Run all blocks marked `sh` of a section, and give what they print."""
        text = RUNBOOK.split(f"## {heading}\n")[1].split("\n## ")[0]
        blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        assert blocks, heading
        return "".join(self.command(line.strip()) for block in blocks for line in block.splitlines())

    def command(self, line: str, answers: str = "") -> str:
        """Run one line, and give what it prints. Without a terminal, it reads the answers to its questions."""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder / "docker",
            env=self.environment,
            input=answers,
            capture_output=True,
            text=True,
            start_new_session=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def configure(self, **variables: str) -> None:
        """Give variables of .env values."""
        path = self.folder / "docker/.env"
        text = (path if path.exists() else path.with_name(".env.example")).read_text()
        for name, value in variables.items():
            text = re.sub(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        path.write_text(text)


@pytest.fixture
def runbook(images: Images, tiny_teacher: Path, documents: Path, open_folder: Path) -> Iterator[Runbook]:
    if not POSTGRES:
        pytest.skip("needs PostgreSQL: `make container-tools` installs it")
    with network() as inside:
        prepare(open_folder, {name: images[name] for name in ("server", "cpu-worker")}, inside, POSTGRES[-1])
        runbook = Runbook(open_folder)
        runbook.configure(COMPOSE_PROFILES="no-gpu", **FIRST)
        fill(Stack(open_folder).volume("data"), tiny_teacher, documents)
        try:
            yield runbook
        finally:
            stack = Stack(open_folder)
            for service in stack.services:
                stack.kill(service)


def fill(data: Path, *sources: Path) -> None:
    """`docker compose cp`."""
    for source in sources:
        subprocess.run(["cp", "-r", source, data], check=True)
    subprocess.run(["chmod", "-R", "a+rX", data], check=True)


def test_the_commands_of_the_runbook_install_operate_and_restore_a_stack(runbook: Runbook):
    runbook.run("Install")
    contents = runbook.command(INSPECT)
    assert sum(split["documents"] for split in json.loads(contents)["inspection"]["splits"].values()) == 60

    runbook.run("Something is full")
    assert "capture" in runbook.run("Something is slow")
    assert "nothing to change" in runbook.command("docker compose logs deploy")  # when it ran again
    runbook.run("A worker is lost")

    runbook.run("Rotate credentials")
    (ask,) = re.findall(r"^ *\$ (docker compose exec postgres psql .*)$", RUNBOOK, re.MULTILINE)
    runbook.command(ask, answers=f"{SECOND['POSTGRES_PASSWORD']}\n" * 2)
    runbook.configure(**SECOND)
    runbook.run("Rotate credentials")
    assert "capture" in runbook.command("docker compose exec -T cpu-worker prefect flow-run ls")

    back_up, restore = re.findall(r"```sh\n(.*?)```", RUNBOOK.split("## Back up and restore")[1], re.DOTALL)[:2]
    for line in back_up.splitlines():
        runbook.command(line)
    runbook.command(f'{QUERY} "CREATE TABLE of_a_newer_version ()"')
    runbook.run("Upgrade")  # which goes back
    assert runbook.command(f"{QUERY} \"SELECT to_regclass('of_a_newer_version')\"").strip() == ""
    runbook.command("docker compose stop")
    shutil.rmtree(runbook.folder / "volumes")  # a new machine
    (runbook.folder / "volumes").mkdir()
    for line in restore.splitlines():
        runbook.command(line)
    assert runbook.command(INSPECT) == contents
    assert "capture" in runbook.command("docker compose exec -T cpu-worker prefect flow-run ls")
