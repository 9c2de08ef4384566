"""The images, built for real, and run as their user with a read-only root."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.docker.images import SECRET, Image, Images, command_in, main_process, network, writable

pytestmark = pytest.mark.long

WORKERS = ("cpu-worker", "gpu-worker")
GIGABYTE = 10**9


@pytest.mark.parametrize("target", WORKERS)
def test_a_capture_runs_on_a_read_only_root_and_compiles_no_kernel(
    images: Images, target: str, tiny_teacher: Path, documents: Path, open_folder: Path
):
    image, places = images[target], folders(open_folder, "/tmp", "/data", "/scratch")
    subprocess.run(["cp", "-r", tiny_teacher, documents, open_folder / "data"], check=True)
    subprocess.run(["chmod", "-R", "a+rX", open_folder / "data"], check=True)
    command = "softlabel capture /data/documents.parquet /data/table --teacher.model /data/teacher"
    done = run(image, command, places)
    assert done.returncode == 0, done.stderr
    assert "/data/table (version" in done.stdout
    assert kernels(open_folder / "tmp/numba") == kernels(image.root / "opt/kernels") != {}
    assert (open_folder / "data/table").stat().st_uid == 10001
    assert not list((open_folder / "scratch").glob("softlabel-*"))


def test_a_gpu_worker_without_a_gpu_says_so_and_takes_no_runs(images: Images, open_folder: Path):
    places = folders(open_folder, "/tmp", "/data", "/scratch")
    command = command_in(
        images["gpu-worker"], folders=places, environment={"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("softlabel: this worker is for runs on a GPU, and it sees none")


def test_a_gpu_worker_with_a_gpu_takes_runs_of_its_queue(images: Images, open_folder: Path):
    # This torch pretends to see a GPU, and this `prefect` says what it is asked to do.
    places = folders(open_folder, "/tmp", "/data")
    (torch := open_folder / "data/torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    (prefect := open_folder / "data/prefect").write_text('#!/bin/sh\necho "$@"\n')
    for file, mode in ((torch, 0o644), (prefect, 0o755)):
        file.chmod(mode)
    environment = {"PYTHONPATH": "/data", "PATH": "/data:/opt/softlabel/bin:/usr/bin:/bin"}
    command = command_in(images["gpu-worker"], folders=places, environment=environment)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "worker start --pool softlabel --work-queue gpu --limit 1 --with-healthcheck\n", done.stderr


@pytest.mark.parametrize("target", ["server", *WORKERS])
def test_a_container_can_write_only_to_its_volumes(images: Images, target: str, open_folder: Path):
    image, places = images[target], folders(open_folder, "/tmp")
    for folder in ("/", "/opt/softlabel/bin", "/etc", "/opt/kernels" if target in WORKERS else "/var"):
        done = run(image, f"touch {folder}/new", places)
        assert "Read-only file system" in done.stderr
    assert run(image, "id --user", places).stdout == "10001\n"
    assert run(image, "touch /tmp/new", places).returncode == 0


@pytest.mark.parametrize("target", ["server", *WORKERS])
def test_an_image_has_no_trace_of_the_build(images: Images, target: str):
    image = images[target]
    assert SECRET not in image.history
    found = subprocess.run(["grep", "--recursive", "--files-with-matches", SECRET, image.root], capture_output=True)
    assert (found.stdout, found.returncode) == (b"", 1)
    assert not list(image.root.glob("build/*"))
    assert not list((image.root / "opt/softlabel/bin").glob("pip*"))


def test_the_images_are_no_larger_than_their_packages(images: Images):
    sizes = {target: size(images[target].root) / GIGABYTE for target in ("server", "cpu-worker")}
    assert sizes["server"] < 0.75, sizes
    assert sizes["cpu-worker"] < 2.5, sizes


def test_a_server_on_a_read_only_root_is_healthy_until_it_is_stopped(images: Images, open_folder: Path):
    image, places = images["server"], folders(open_folder, "/tmp", "/prefect")
    with network() as inside, (open_folder / "log").open("w") as log:
        server = subprocess.Popen([*inside, *command_in(image, folders=places)], stdout=log, stderr=log)
        check = [*inside, *command_in(image, image.config["Healthcheck"]["Test"][1:], folders=places)]
        try:
            deadline = time.monotonic() + 90
            while subprocess.run(check, capture_output=True).returncode:
                assert server.poll() is None, (open_folder / "log").read_text()
                assert time.monotonic() < deadline, (open_folder / "log").read_text()
                time.sleep(1)
            page = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:4200/').read().decode())"
            ui = subprocess.run(
                [*inside, *command_in(image, ["python", "-c", page], folders=places)], capture_output=True, text=True
            )
            assert "<title>" in ui.stdout, ui.stderr
            os.kill(main_process(server.pid), signal.SIGTERM)
            server.wait(60)
            assert subprocess.run(check, capture_output=True).returncode == 1
        finally:
            server.kill()
            server.wait()
    assert (open_folder / "prefect/prefect.db").exists()


def run(image: Image, command: str, places: Mapping[Path, str]) -> "subprocess.CompletedProcess[str]":
    started = command_in(image, command.split(), folders=places)
    return subprocess.run(started, capture_output=True, text=True, timeout=600)


def folders(parent: Path, *places: str) -> dict[Path, str]:
    """A new volume for each place."""
    return {writable(parent / place.strip("/")): place for place in places}


def kernels(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.nb?")}


def size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))
