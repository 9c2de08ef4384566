"""What an evaluation has measured so far, kept in the report's folder, so that a killed one can be continued.

What is kept of a student is written each time that a part of the table is done, and what else is measured of it when it
is done, under a name that depends on everything that it depends on: other students, another table or other settings
never continue it. It is deleted with the folder's ``finish``, once the report is written. Several processes may make
the same report at once: each may find that another one has deleted what it keeps, and goes on.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load, save

from softlabel.storage.errors import UsageError
from softlabel.storage.places import durable

_FOLDER = "unfinished"
_CLAIM = "evaluation.json"
"""Says which evaluation a folder is for, as long as it has no report."""
_ATTEMPTS = 9
"""How often a file is written again whose folder was deleted meanwhile."""
_METHOD = 2
"""To be raised when what is kept means something else, so that an older version's is not continued."""


@dataclass(frozen=True)
class Unfinished:
    """The file with what was measured of one student."""

    path: Path

    @classmethod
    def of(cls, folder: Path, depends_on: Mapping[str, Any]) -> "Unfinished":
        """The file for one student.

        Args:
            folder: folder of the report.
            depends_on: everything that determines the measurements, as JSON can hold it.
        """
        return cls(_path(folder, depends_on, "safetensors"))

    def restore(self) -> dict[str, NDArray[Any]]:
        """What an evaluation that was killed has kept, by name; empty if there is nothing, or if it can't be read."""
        try:
            content = self.path.read_bytes()
            expected, stored = content[:16], load(content[16:])
        except (OSError, SafetensorError, ValueError):
            return {}
        return stored if blake2b(content[16:], digest_size=16).digest() == expected else {}

    def save(self, kept: Mapping[str, NDArray[Any]]) -> None:
        """Keep arrays in place of those that were kept before."""
        content = save(dict(kept))
        _keep(self.path, blake2b(content, digest_size=16).digest() + content)


T = TypeVar("T")


def once(kind: type[T], folder: Path, depends_on: Mapping[str, Any], make: Callable[[], T]) -> T:
    """What ``make`` returns, or what it returned in an evaluation that was killed.

    Args:
        kind: a dataclass.
        folder: folder of the report.
        depends_on: everything that determines the result, as JSON can hold it.
        make: measures it.
    """
    path, adapter = _path(folder, depends_on, "json"), TypeAdapter(kind)
    with suppress(OSError, ValueError):
        return adapter.validate_json(path.read_bytes())
    made = make()
    _keep(path, adapter.dump_json(made))
    return made


def _path(folder: Path, depends_on: Mapping[str, Any], suffix: str) -> Path:
    text = json.dumps({"method": _METHOD, **depends_on}, sort_keys=True)
    return folder / _FOLDER / f"{blake2b(text.encode(), digest_size=16).hexdigest()}.{suffix}"


def _keep(path: Path, content: bytes, *, replace: bool = True) -> bool:
    """Write a file, again if its folder was deleted meanwhile; False if it exists and ``replace`` is false.

    Raises:
        UsageError: if it can't be written.
    """
    with write_errors(path.parent.parent):
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                durable.write(path, content, replace=replace)
            except FileExistsError:
                if replace:
                    raise
                return False
            except (FileNotFoundError, NotADirectoryError):
                if attempt == _ATTEMPTS:
                    raise
            else:
                return True
    raise AssertionError


def claimed(folder: Path) -> dict[str, Any] | None:
    """What the unfinished evaluation in a folder is about; None if there is none."""
    try:
        what: dict[str, Any] = json.loads((folder / _FOLDER / _CLAIM).read_bytes())
    except (OSError, ValueError):
        return None
    return what


def claim(folder: Path, what: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Begin an evaluation in a folder, unless another process has just begun one; returns what that is about."""
    path = folder / _FOLDER / _CLAIM
    return what if _keep(path, json.dumps(what).encode(), replace=False) else claimed(folder)


def finish(folder: Path) -> None:
    """Delete what was kept, because the report is written."""
    rmtree(folder / _FOLDER, ignore_errors=True)  # another process may be writing there


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn an error about writing to a report's folder into one that users see."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            "the report can't be written",
            expected="a writable folder, on a disk with free space",
            found=error,
            where=folder.absolute(),
            do="choose another folder for the report",
        ) from error
