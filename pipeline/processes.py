"""Child processes: how they are started, how they exchange messages with this one, and why they died.

A child's message is a line of JSON, ``[kind, value]``. A child ends when its standard input is closed, so it never
outlives the process that started it. It never imports modules from the folder where the command was started.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from pydantic_core import to_jsonable_python

from softlabel.storage import errors
from softlabel.storage.errors import SoftlabelError, WorkerError
from softlabel.storage.identity import run_variables

NEUTRAL = "/"
"""Working folder for programs that would run or read files of their working folder: only root can write here."""
_STARTED_IN = str(Path.cwd())
_SHOWN_LINES = 15
_SECONDS_TO_DIE = 1.0


def start(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, **settings: Any
) -> "subprocess.Popen[bytes]":
    """Start one of softlabel's modules as a process.

    Its standard input is a pipe that is closed when this process ends. It has a session of its own, so it does not get
    this process's signals.

    Args:
        module: name of the module to run.
        arguments: its command-line arguments.
        environment: environment variables; this process's by default.
        settings: further arguments of ``subprocess.Popen``.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env={**(os.environ if environment is None else environment), **same_modules(), **run_variables()},
        **settings,
    )


def open_standard_files() -> None:
    """Open the null device on each of the descriptors 0 to 2 that is closed.

    Otherwise the next file, pipe or socket that is opened gets that number, and whatever is printed goes there.
    """
    for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def same_modules() -> dict[str, str]:
    """Environment variables with which another Python process imports the same modules as this one.

    The folder where the command was started is left out, unless the program itself is in it or PYTHONPATH names it.
    Python searches it first (with ``-m``, ``-c`` or an empty part of PYTHONPATH), so any Python file next to the user's
    documents could replace a module of a library or of softlabel.
    """
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    wanted = {*_of_the_program(), *map(os.path.abspath, named)}
    # Relative entries mean that folder, too; setuptools adds an entry that is not a path at all.
    path = [entry for entry in sys.path if Path(entry).is_absolute() and (entry != _STARTED_IN or entry in wanted)]
    # An entry that contains a colon would be read as two.
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(entry for entry in path if os.pathsep not in entry)}


def _of_the_program() -> list[str]:
    """The folder of the program that this process runs: the script's, or the one that has the top-level package."""
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    name = spec.name if spec else ""
    return [str(Path(file).absolute().parents[name.count(".")])] if file else []


class Child:
    """A child process that exchanges lines of JSON with this one.

    Args:
        module: name of the module to run, see ``start``.
        arguments: its command-line arguments.
        log: file for everything else that it prints.
        environment: environment variables; this process's by default.
        cwd: its working folder; this process's by default.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        open_standard_files()
        self._log = log
        with log.open("wb") as file:
            self.process = start(
                module, *arguments, environment=environment, stdout=subprocess.PIPE, stderr=file, cwd=cwd
            )
        assert self.process.stdin
        assert self.process.stdout
        self._stdin, self.stdout = self.process.stdin, self.process.stdout
        self._unfinished = b""

    def send(self, value: Any) -> None:
        """Send it a value as a line of JSON.

        Raises:
            ChildDiedError: if it has died.
        """
        try:
            self._stdin.write(_line(value))
            self._stdin.flush()
        except BrokenPipeError:
            raise ChildDiedError(self) from None

    def receive(self) -> list[bytes] | None:
        """Wait for output; returns the lines that are complete by now, or None at the end of the output."""
        received = os.read(self.stdout.fileno(), 1 << 16)
        if not received:
            return None
        *lines, self._unfinished = (self._unfinished + received).split(b"\n")
        return lines

    def death(self) -> str:
        """How it died, and the last lines that it printed."""
        code = self.process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        memory = " (often because the machine ran out of memory)" if code == -signal.SIGKILL else ""
        printed = self._log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        return "\n               ".join([how + memory, *printed])


class ChildDiedError(Exception):
    """A child process has ended unexpectedly."""

    def __init__(self, child: Child) -> None:
        self.child = child


def messages(children: Sequence[Child]) -> Iterator[tuple[Child, str, Any]]:
    """Messages of the children as they arrive: the child, the message's kind and its value.

    Raises:
        SoftlabelError: the error that a child has reported.
        ChildDiedError: if a child has died. Its death often makes other children fail, and their errors may arrive
            first; so after an error, we wait a moment for a death.
    """
    raised: SoftlabelError | None = None
    failed = list[Child]()
    seconds = _SECONDS_TO_DIE if len(children) > 1 else 0.0
    with DefaultSelector() as selector:
        for child in children:
            selector.register(child.stdout, EVENT_READ, child)
        while True:
            ready = selector.select(seconds if raised else None)
            if raised and not ready:
                raise raised
            for child, lines in [(key.data, key.data.receive()) for key, _ in ready]:
                if lines is None:
                    if child not in failed:
                        raise ChildDiedError(child)
                    selector.unregister(child.stdout)  # it has said why it ended
                    continue
                for kind, value in map(json.loads, lines):
                    if kind == "error":
                        raised = raised or _error(*value)
                        failed.append(child)
                    else:
                        yield child, kind, value


def _error(name: str, message: str, details: Any) -> SoftlabelError:
    error: SoftlabelError = getattr(errors, name)(message, details=details)
    return error


def message_sender() -> Callable[[str, Any], None]:
    """In a child process: a function that sends messages to the parent. All other output goes to the log."""
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(kind: str, value: Any) -> None:
        lines.write(_line([kind, value]))
        lines.flush()

    return send


def _line(value: Any) -> bytes:
    return json.dumps(value, default=to_jsonable_python).encode() + b"\n"


def serialized(error: Exception) -> tuple[str, str, Any]:
    """An error as the value of an "error" message: the nearest class of ``storage.errors``, its text, its details.

    The text names the error's own class if it is another one, such as a library's or a user's engine's.
    """
    kind = type(error)
    nearest: type = next((each for each in kind.__mro__ if each.__module__ == errors.__name__), WorkerError)
    message = str(error) if nearest is kind else f"{kind.__name__}: {error}"
    details = error.details if isinstance(error, SoftlabelError) else None
    return nearest.__name__, message, to_jsonable_python(details, fallback=str)
