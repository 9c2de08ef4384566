"""The images of docker/Dockerfile, built by buildah, and their containers, run by bubblewrap. Neither needs a daemon.

The base image is Debian's, made by debootstrap. Packages come from where this machine's pip takes them.
"""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

PROGRAMS = ("buildah", "debootstrap", "bwrap", "nsenter", "unshare", "ip")
"""What these tests need; `make container-tools` installs it on Debian."""
SECRET = "a-secret-of-the-build"
"""In the pip.conf that the builds get as a secret."""
_SUITE = "bookworm"
_SETTINGS = ("index-url", "extra-index-url", "find-links", "cert", "timeout")
"""Settings of pip that say where packages come from."""


def require_programs() -> None:
    """Skip the test if a program is missing, or if this user can't make the root folders of images."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, and {', '.join(missing or PROGRAMS)}: `make container-tools` installs them")


@dataclass(frozen=True)
class Image:
    """A built image."""

    root: Path
    """Its files."""
    config: dict[str, Any]
    """User, Env, Entrypoint, Cmd, WorkingDir, Healthcheck, ..."""
    history: str
    """What buildah knows about it, as text."""


class Images:
    """Builds images in a folder, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pip = _pip_configuration()
        self._built: dict[str, Image] = {}

    def __getitem__(self, target: str) -> Image:
        if not self._built:
            self._make_base()
        if target not in self._built:
            self._built[target] = self._build(target)
        return self._built[target]

    def close(self) -> None:
        """Unmount what buildah has mounted, so that the folder can be deleted; with some storages, that is nothing."""
        mounted = self._folder / "store/overlay"
        subprocess.run(["umount", "--recursive", mounted], capture_output=True)
        assert str(mounted) not in Path("/proc/self/mounts").read_text()

    def _make_base(self) -> None:
        packages = "--include=python3,python3-venv,ca-certificates"
        _run("debootstrap", "--variant=minbase", packages, _SUITE, str(self._folder / "base"))
        dockerfile = self._folder / "Dockerfile"
        dockerfile.write_text("FROM scratch\nADD base /\n")
        self._buildah("bud", "--tag", "localhost/python", "--file", str(dockerfile), str(self._folder))
        shutil.rmtree(self._folder / "base")

    def _build(self, target: str) -> Image:
        secret = self._folder / "pip.conf"
        lines = [f"{name} = {' '.join(values)}" for name, values in self._pip.items()]
        secret.write_text("\n".join(["[global]", f"# {SECRET}", *lines]) + "\n")
        index = self._pip.get("index-url", ["https://pypi.org/simple"])[0]
        self._buildah(
            *("bud", "--isolation", "chroot", "--format", "docker", "--pull-never"),
            *("--build-arg", "PYTHON_IMAGE=localhost/python", "--build-arg", f"CPU_TORCH_INDEX={index}"),
            *("--secret", f"id=pip,src={secret}"),
            *(f"--volume={folder}:{folder}:ro" for folder in _folders(self._pip)),
            *("--file", str(ROOT / "docker/Dockerfile"), "--target", target, "--tag", f"localhost/{target}", str(ROOT)),
        )
        inspected = self._buildah("inspect", "--type", "image", f"localhost/{target}")
        container = self._buildah("from", "--pull-never", f"localhost/{target}").strip()
        root = self._buildah("mount", container).strip()
        return Image(Path(root), json.loads(inspected)["Docker"]["config"], inspected)

    def _buildah(self, *arguments: str) -> str:
        return _run("buildah", "--root", f"{self._folder}/store", "--runroot", f"{self._folder}/run", *arguments)


def _pip_configuration() -> dict[str, list[str]]:
    """This machine's settings of where pip takes packages from."""
    listed = _run(os.environ.get("PYTHON", "python3"), "-m", "pip", "config", "list")
    found = [line.partition("=") for line in listed.splitlines()]
    configured = {name.rpartition(".")[2]: value.strip("'\"").split() for name, _, value in found}
    return {name: values for name, values in configured.items() if name in _SETTINGS}


def _folders(pip: Mapping[str, list[str]]) -> Iterator[Path]:
    """Folders of this machine that pip's settings name."""
    for value in [value.removeprefix("file://") for values in pip.values() for value in values]:
        path = Path(value)
        if path.is_absolute() and path.exists():
            yield path.parent if path.is_file() or path.name == "simple" else path


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@contextmanager
def network() -> Iterator[list[str]]:
    """A network of its own, in which all ports are free; yields the start of a command that runs in it."""
    command = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec sleep infinity"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "ready\n"
            yield ["nsenter", f"--net=/proc/{process.pid}/ns/net", "--"]
        finally:
            process.kill()


def command_in(
    image: Image,
    command: Sequence[str] | None = None,
    *,
    folders: Mapping[Path, str],
    environment: Mapping[str, str] | None = None,
    entrypoint: bool = True,
    detached: bool = False,
) -> list[str]:
    """The command that runs a command in a container of an image: as its user, with a read-only root.

    Args:
        image: the image.
        command: what to run instead of the image's command.
        folders: folders of this machine, and where the container sees them, writable.
        environment: variables beside the image's.
        entrypoint: whether to run the image's entrypoint, as for the first process of a container.
        detached: whether it outlives the process that starts it.
    """
    user, group = image.config["User"].split(":")
    variables = dict(each.split("=", 1) for each in image.config["Env"]) | dict(environment or {})
    start = (image.config.get("Entrypoint") or []) if entrypoint else []
    return [
        *("bwrap", "--unshare-pid", "--unshare-ipc", "--clearenv"),
        *(() if detached else ("--die-with-parent",)),
        *("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"),  # for setpriv, which drops them
        *("--ro-bind", str(image.root), "/", "--proc", "/proc", "--dev", "/dev"),
        *(part for folder, place in folders.items() for part in ("--bind", str(folder), place)),
        *(part for name, value in variables.items() for part in ("--setenv", name, value)),
        *("--chdir", image.config["WorkingDir"] or "/", "--"),
        *("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs"),
        *(*start, *(command or image.config["Cmd"])),
    ]


def main_process(container: int) -> int:
    """The process that Docker's SIGTERM goes to: the container's first one, after bubblewrap's own two."""
    process = container
    for _ in range(2):
        process = int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])
    return process


def writable(folder: Path) -> Path:
    """A folder that the images' user can write to, like a new volume."""
    folder.mkdir(parents=True)
    os.chown(folder, 10001, 10001)
    return folder
