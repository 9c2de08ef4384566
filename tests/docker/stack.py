"""Runs docker/compose.yaml without Docker: what `docker compose` does with its services, as far as tests need it.

Our services run in containers of our images, as ``images`` does it. PostgreSQL and the store are programs of this
machine. All share one network, in which the names of the services lead to 127.0.0.1. As a program, this module takes
the arguments of `docker`, so that the commands of the runbook run as they are written:

    python -m tests.docker.stack FOLDER compose up --detach
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT
from tests.docker.images import Image, command_in, main_process, writable

_SECONDS = 180
_SECONDS_TO_END = 120  # the longest stop_grace_period of the compose file
_VARIABLE = re.compile(r"\$\{(\w+)(?::([?-])([^}]*))?\}")


def prepare(folder: Path, images: Mapping[str, Image], network: list[str], postgres: Path) -> None:
    """Make a folder for a stack: a copy of docker/, a `docker` program, and empty volumes.

    Args:
        folder: the folder.
        images: the images, by target.
        network: start of a command that runs in the stack's network.
        postgres: folder with PostgreSQL's programs.
    """
    shutil.copytree(ROOT / "docker", folder / "docker")
    (folder / "volumes").mkdir()
    (folder / "pids").mkdir()
    kept = {name: asdict(image) | {"root": str(image.root)} for name, image in images.items()}
    (folder / "stack.json").write_text(json.dumps({"images": kept, "network": network, "postgres": str(postgres)}))
    names = " ".join(yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"])
    (folder / "hosts").write_text(f"127.0.0.1 localhost {names}\n")
    (folder / "bin").mkdir()
    program = folder / "bin/docker"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.docker.stack {folder} "$@"\n')
    program.chmod(0o755)


class Stack:
    """The services of a stack, with the variables that docker/.env has now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: set[str] = set()
        state = json.loads((folder / "stack.json").read_text())
        self.images = {name: Image(**image | {"root": Path(image["root"])}) for name, image in state["images"].items()}
        self.network: list[str] = state["network"]
        self.postgres: str = state["postgres"]
        lines = (folder / "docker/.env").read_text().splitlines()
        self.variables = dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))
        text = (folder / "docker/compose.yaml").read_text()
        self.services: dict[str, dict[str, Any]] = yaml.safe_load(_VARIABLE.sub(self._value, text))["services"]

    def _value(self, variable: re.Match[str]) -> str:
        name, kind, text = variable.groups()
        value = self.variables.get(name, "")
        if not value and kind == "?":
            sys.exit(f"required variable {name} is missing a value: {text}")
        return value or (text if kind == "-" else "") or ""

    # What a service runs

    def container(self, service: str, command: Sequence[str] | None = None, *, first: bool = False) -> list[str]:
        """The command that runs a command, or the service's own, in a container of a service."""
        given = self.services[service]
        command = command or given.get("command")
        environment = {name: str(value) for name, value in given.get("environment", {}).items()}
        if service == "postgres":
            return self._postgres(command, environment)
        if service == "store":
            inside = [
                *("bwrap", "--dev-bind", "/", "/", "--bind", str(self.folder / "hosts"), "/etc/hosts"),
                *("--tmpfs", "/tmp", "--ro-bind", str(Path(sys.executable).with_name("weed")), "/tmp/weed"),
            ]  # its sockets in /tmp have the same names in each stack
            variables = [f"{name}={value}" for name, value in environment.items()]
            return [*self.network, *inside, "env", *variables, *self._store(command)]
        image = self.images[self._image(service)]
        places = {self.folder / "hosts": "/etc/hosts", self.volume(f"tmp-of-{service}"): "/tmp"}
        for volume in given.get("volumes", ()):
            source, place = volume.split(":")[:2]
            places[self.folder / "docker" / source if source.startswith(".") else self.volume(source)] = place
        for source, place in places.items():
            if source.is_file():  # which Docker makes, too, before it closes the root
                (image.root / place.strip("/")).touch()
        return [
            *self.network,
            *command_in(image, command, folders=places, environment=environment, entrypoint=first, detached=first),
        ]

    def _image(self, service: str) -> str:
        """The target of ours, or the name of another's image."""
        name: str = self.services[service]["image"].partition(":")[0]
        return name.removeprefix("softlabel-")

    def _postgres(self, command: Sequence[str] | None, environment: Mapping[str, str]) -> list[str]:
        data, user = self.volume("postgres"), environment["POSTGRES_USER"]
        as_nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "env"]
        # In its container, PostgreSQL trusts its user. Here, it asks for the password.
        password = f"PGPASSWORD={environment['POSTGRES_PASSWORD']}"
        start = [*self.network, *as_nobody, f"PATH={self.postgres}:/usr/bin:/bin", "PGHOST=127.0.0.1", password]
        if command:
            return [*start, *command]
        if not any(data.iterdir()):
            shutil.chown(data, "nobody", "nogroup")
            (file := self.folder / "password").write_text(environment["POSTGRES_PASSWORD"])
            file.chmod(0o644)
            made = ["initdb", f"--pgdata={data}", f"--username={user}", "--auth=scram-sha-256", f"--pwfile={file}"]
            subprocess.run([*start, *made], check=True, stdout=subprocess.DEVNULL)
            script = f"CREATE DATABASE {environment['POSTGRES_DB']}"
            single = ["postgres", "--single", "-D", str(data), "postgres"]
            subprocess.run([*start, *single], input=script, text=True, check=True, stdout=subprocess.DEVNULL)
        return [*start, "postgres", "-D", str(data), "-c", f"unix_socket_directories={data}"]

    def _store(self, command: str | Sequence[str] | None) -> list[str]:
        if isinstance(command, str):  # of `weed`, as the image's entrypoint
            command = ["/tmp/weed", *command.split()]
        return [str(part).replace("/data", str(self.volume("store"))) for part in command or ()]

    def volume(self, name: str) -> Path:
        """The folder of a volume."""
        path = self.folder / "volumes" / name
        return path if path.exists() else writable(path)

    # What runs

    def pid(self, service: str) -> int | None:
        """The process group of a service, if it runs."""
        try:
            group = int((self.folder / "pids" / service).read_text().split(maxsplit=1)[0])
        except FileNotFoundError:
            return None
        with suppress(ChildProcessError):  # if it is this process's child, and has ended
            ended, status = os.waitpid(group, os.WNOHANG)
            assert not ended or status == 0 or service != "deploy", self.log(service)
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return None
        return group

    def log(self, service: str) -> str:
        """What the service has printed."""
        return (self.folder / f"{service}.log").read_text()

    def start(self, service: str) -> None:
        """Start a service, after those that it depends on."""
        if self.pid(service) or service in self._started:
            return
        self._started.add(service)
        for other, needed in self.services[service].get("depends_on", {}).items():
            self.start(other)
            self.wait(other, needed["condition"])
        with (self.folder / f"{service}.log").open("a") as log:
            command = self.container(service, first=True)
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        (self.folder / "pids" / service).write_text(f"{process.pid} {self._state(service)}")

    def _state(self, service: str) -> str:
        """What makes compose start a service anew if it changes."""
        return json.dumps(self.services[service])

    def changed(self, service: str) -> bool:
        """Whether a service runs with other settings than those of now."""
        path = self.folder / "pids" / service
        return path.exists() and path.read_text().split(maxsplit=1)[1] != self._state(service)

    def wait(self, service: str, condition: str) -> None:
        """Wait until a service is healthy, or has ended well."""
        deadline = time.monotonic() + _SECONDS
        ended = condition == "service_completed_successfully"
        while self.pid(service) if ended else not self.healthy(service):
            assert time.monotonic() < deadline, f"{service} is not ready:\n{self.log(service)[-3000:]}"
            time.sleep(1)

    def healthy(self, service: str) -> bool:
        """Whether the health check passes: the compose file's, or the image's."""
        name = self._image(service)
        own = self.images[name].config.get("Healthcheck", {}).get("Test") if name in self.images else None
        check = self.services[service].get("healthcheck", {}).get("test") or own
        return not subprocess.run(self.container(service, check[1:]), capture_output=True).returncode

    def stop(self, service: str) -> None:
        """End a service with the signal that Docker sends to its first process, which is enough for each."""
        if group := self.pid(service):
            if service == "postgres":
                os.kill(group, signal.SIGINT)  # the STOPSIGNAL of its image
            elif service == "store":
                os.killpg(group, signal.SIGTERM)
            else:
                os.kill(main_process(group), signal.SIGTERM)
            deadline = time.monotonic() + _SECONDS_TO_END
            while self.pid(service):
                assert time.monotonic() < deadline, f"{service} does not end:\n{self.log(service)[-3000:]}"
                time.sleep(0.5)
        (self.folder / "pids" / service).unlink(missing_ok=True)

    def kill(self, service: str) -> None:
        """End a service with SIGKILL."""
        while group := self.pid(service):
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.1)
        (self.folder / "pids" / service).unlink(missing_ok=True)

    def chosen(self) -> Iterator[str]:
        """The services without a profile, or with the one of .env."""
        for name, service in self.services.items():
            if self.variables["COMPOSE_PROFILES"] in service.get("profiles", [self.variables["COMPOSE_PROFILES"]]):
                yield name


def main(folder: str, compose: str, verb: str, *given: str) -> int:
    """Do what `docker compose` does."""
    assert compose == "compose", compose
    stack = Stack(Path(folder))
    options = [each for each in given if each.startswith("-")]
    names = [each for each in given if not each.startswith("-")]
    match verb:
        case "up":
            chosen = names or list(stack.chosen())
            for name in chosen:
                if stack.changed(name):
                    stack.stop(name)
            for name in chosen:
                stack.start(name)
            for name in chosen if "--wait" in options else ():
                stack.wait(name, "service_completed_successfully" if name == "deploy" else "service_healthy")
        case "stop" | "restart" | "kill" | "start":
            for name in names or reversed(list(stack.chosen())):
                if verb == "kill":
                    stack.kill(name)
                elif verb != "start":
                    stack.stop(name)
                if verb in ("start", "restart"):
                    stack.start(name)
        case "exec":
            return _call(stack.container(*_service(given)))
        case "run":
            service, command = _service(given[given.index("--entrypoint") + 2 :])
            entry = given[given.index("--entrypoint") + 1]
            return _call(stack.container(service, [entry, *command]))
        case "ps":
            print(*(f"{name}\t{'running' if stack.pid(name) else 'ended'}" for name in stack.services), sep="\n")
        case "logs":
            print(*(stack.log(name) for name in names))
    return 0


def _service(given: Sequence[str]) -> tuple[str, list[str]]:
    """The service and its command, after the options."""
    first = next(i for i, each in enumerate(given) if not each.startswith("-"))
    return given[first], list(given[first + 1 :])


def _call(command: list[str]) -> int:
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
