"""Processes of our own that work beside this one: how one is started, what it says, and how it died.

What a child says is a line of JSON, ``[kind, value]``. It ends when its standard input does, so it never outlives the
process that started it, and it runs nothing that only lies in the folder where the command was started.
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

NEUTRAL = "/"
"""A folder in which nobody lays a trap, for what would run or read files of the folder that it is started in."""
_STARTED_IN = str(Path.cwd())
_SHOWN_LINES = 15
_SECONDS_TO_DIE = 1.0


def start(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, **settings: Any
) -> "subprocess.Popen[bytes]":
    """Start a module of ours as a process.

    Its standard input is a pipe of ours that closes with us; a session of its own keeps our signals from it.

    Args:
        module: that is run.
        arguments: of its command line.
        environment: in place of this process's.
        settings: further ones of ``subprocess.Popen``.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env={**(os.environ if environment is None else environment), **same_modules()},
        **settings,
    )


def same_modules() -> dict[str, str]:
    """Environment variables for a process of Python that is to import what this one does.

    The folder where the command was started is left out, unless it is this program's own or PYTHONPATH names it.
    Python puts it first unasked (for ``-m``, ``-c`` and an empty part of PYTHONPATH), and whatever lies there, beside
    somebody's documents, would be taken for a library's module, or for ours.
    """
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    wanted = {*_of_the_program(), *map(os.path.abspath, named)}
    # What is not absolute lies there, too; setuptools puts a name into the path that only it knows.
    path = [entry for entry in sys.path if Path(entry).is_absolute() and (entry != _STARTED_IN or entry in wanted)]
    # An entry with a colon would be taken for two.
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(entry for entry in path if os.pathsep not in entry)}


def _of_the_program() -> list[str]:
    """The folder that the program was found in which this process runs: of a script, or of a package's top."""
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    name = spec.name if spec else ""
    return [str(Path(file).absolute().parents[name.count(".")])] if file else []


class Child:
    """A process that says what it has to say in lines, and can be given some.

    Args:
        module: that it runs, see ``start``.
        arguments: of its command line.
        log: file for whatever else it prints.
        environment: in place of this process's.
    """

    def __init__(self, module: str, *arguments: str, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = start(module, *arguments, environment=environment, stdout=subprocess.PIPE, stderr=file)
        assert self.process.stdin
        assert self.process.stdout
        self._stdin, self.stdout = self.process.stdin, self.process.stdout
        self._begun = b""

    def tell(self, value: Any) -> None:
        """Give it a line of JSON.

        Raises:
            ChildDiedError: if it is there no longer.
        """
        try:
            self._stdin.write(_line(value))
            self._stdin.flush()
        except BrokenPipeError:
            raise ChildDiedError(self) from None

    def heard(self) -> list[bytes] | None:
        """Lines that it has said since, waiting for some; None if it says no more."""
        said = os.read(self.stdout.fileno(), 1 << 16)
        if not said:
            return None
        *lines, self._begun = (self._begun + said).split(b"\n")
        return lines

    def death(self) -> str:
        """What it died of, and the last that it printed."""
        code = self.process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        memory = " (often because the machine ran out of memory)" if code == -signal.SIGKILL else ""
        printed = self._log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        return "\n               ".join([how + memory, *printed])


class ChildDiedError(Exception):
    """A child that was listened to says no more."""

    def __init__(self, child: Child) -> None:
        self.child = child


def listen(children: Sequence[Child]) -> Iterator[tuple[Child, str, Any]]:
    """What children say: who, what kind of thing, and the thing; until one of them dies, or whoever listens has enough.

    Raises:
        SoftlabelError: what one of them has raised and told.
        ChildDiedError: if one has died, rather than what others have raised over it, which may be heard of before.
    """
    raised: SoftlabelError | None = None
    seconds = _SECONDS_TO_DIE if len(children) > 1 else 0.0
    with DefaultSelector() as selector:
        for child in children:
            selector.register(child.stdout, EVENT_READ, child)
        while True:
            ready = selector.select(seconds if raised else None)
            if raised and not ready:
                raise raised
            for child, lines in [(key.data, key.data.heard()) for key, _ in ready]:
                if lines is None:
                    raise ChildDiedError(child)
                for kind, value in map(json.loads, lines):
                    if kind == "error":
                        raised = raised or _error(*value)
                    else:
                        yield child, kind, value


def _error(name: str, message: str, details: Any) -> SoftlabelError:
    error: SoftlabelError = getattr(errors, name)(message, details=details)
    return error


def speaker() -> Callable[[str, Any], None]:
    """In a child: what tells the process that started it; whatever a library prints goes to the log from now on."""
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(kind: str, value: Any) -> None:
        lines.write(_line([kind, value]))
        lines.flush()

    return tell


def _line(value: Any) -> bytes:
    return json.dumps(value, default=to_jsonable_python).encode() + b"\n"


def as_told(error: Exception) -> tuple[str, str, Any]:
    """An error for ``tell("error", ...)``: the nearest class of ``storage.errors``, its message, its details.

    The message names any other class, as one of a library's, or of a teacher's engine of the user's own.
    """
    kind = type(error)
    nearest: type = next((each for each in kind.__mro__ if each.__module__ == errors.__name__), WorkerError)
    message = str(error) if nearest is kind else f"{kind.__name__}: {error}"
    details = error.details if isinstance(error, SoftlabelError) else None
    return nearest.__name__, message, to_jsonable_python(details, fallback=str)
