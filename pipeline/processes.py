"""Child processes: how they are started, how they exchange messages with this one, and why they died.

A child's message is a line of JSON, ``[kind, value]``. A child ends when its standard input is closed, so it never
outlives the process that started it. It never imports modules from the folder where the command was started.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from pydantic_core import to_jsonable_python

from softlabel.storage import errors
from softlabel.storage.credentials import masked
from softlabel.storage.errors import SoftlabelError, WorkerError, printable
from softlabel.storage.identity import run_variables

NEUTRAL = "/"
"""Working folder for programs that would run or read files of their working folder: only root can write here."""
_STARTED_IN = str(Path.cwd())
_SHOWN_LINES = 15
_SECONDS_TO_DIE = 1.0
_MOST_WARNINGS = 100
"""Most different warnings that one child passes on: a library may put a number into each."""

logger = logging.getLogger("softlabel")


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


class Warned:
    """What child processes have warned of. Each text is passed on once, however many children send it."""

    def __init__(self) -> None:
        self._texts: set[str] = set()

    def pass_on(self, kind: str, value: Any) -> None:
        """Warn of what a child's message says, or log it.

        Args:
            kind: "warning" or "log".
            value: the text; for a log line, after its level.
        """
        level, text = (logging.WARNING, value) if kind == "warning" else value
        text = masked(printable(text, kept="\n\t"))
        if text in self._texts:
            return
        self._texts.add(text)
        if kind == "warning":
            warnings.warn(text, stacklevel=3)
        else:
            logger.log(level, "%s", text)


class Child:
    """A child process that exchanges lines of JSON with this one.

    Args:
        module: name of the module to run, see ``start``.
        arguments: its command-line arguments.
        log: file for everything else that it prints.
        environment: environment variables; this process's by default.
        cwd: its working folder; this process's by default.
        warned: takes its warnings; children with the same one do not repeat each other's.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        cwd: str | None = None,
        warned: Warned | None = None,
    ) -> None:
        open_standard_files()
        self.warned = warned or Warned()
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

    What a child warns of is passed on here.

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
                    elif kind in ("warning", "log"):
                        child.warned.pass_on(kind, value)
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


def send_warnings(send: Callable[[str, Any], None]) -> None:
    """In a child process: send the parent each warning, and each log line from the level WARNING on, once.

    Libraries keep their log lines from other handlers, so they are taken where every one of them begins.
    """
    sent: set[str] = set()
    make = logging.getLogRecordFactory()

    def send_once(kind: str, text: str, value: Any) -> None:
        if text not in sent and len(sent) < _MOST_WARNINGS:
            sent.add(text)
            send(kind, value)

    def record(*arguments: Any, **settings: Any) -> logging.LogRecord:
        made = make(*arguments, **settings)
        if made.levelno >= logging.WARNING:
            ours = made.name.partition(".")[0] == "softlabel"
            text = _text(made) if ours else f"{made.name}: {_text(made)}"
            send_once("log", text, [made.levelno, text])
        return made

    logging.setLogRecordFactory(record)
    warnings.showwarning = lambda message, *_, **__: send_once("warning", str(message), str(message))


def _text(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # a library's arguments do not fit its text
        return str(record.msg)


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
