"""What an evaluation has measured so far, kept in the report's folder, so that a killed one can be continued.

The sums of a student are written each time that some row groups are done, under a name that depends on everything that
they depend on: other students, another table or other settings never continue them. They are deleted with the folder's
``finish``, once the report is written.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from softlabel.pipeline.evaluation.bootstrap import Sums
from softlabel.storage.places import durable

ALL = 2**62
"""Number of row groups that stands for all of them."""
_FOLDER = "unfinished"
_CLAIM = "evaluation.json"
"""Says which evaluation a folder is for, as long as it has no report."""
_METHOD = 1
"""To be raised when the sums mean something else, so that those of an older version are not continued."""


@dataclass(frozen=True)
class Unfinished:
    """The file with one student's sums."""

    path: Path

    @classmethod
    def of(cls, folder: Path, depends_on: Mapping[str, Any]) -> "Unfinished":
        """The file for one student.

        Args:
            folder: folder of the report.
            depends_on: everything that determines the sums, as JSON can hold it.
        """
        text = json.dumps({"method": _METHOD, **depends_on}, sort_keys=True)
        return cls(folder / _FOLDER / f"{blake2b(text.encode(), digest_size=16).hexdigest()}.safetensors")

    def restore(self, sums: Sums) -> int:
        """Continue with the sums of an evaluation that was killed, if there are any.

        Returns:
            The number of row groups that they are from. What can't be read is measured again.
        """
        try:
            content = self.path.read_bytes()
            expected, stored = content[:16], load(content[16:])
        except (OSError, SafetensorError, ValueError):
            return 0
        shapes = {name: values.shape for name, values in sums.values.items()}
        groups = stored.pop("row groups", None)
        if blake2b(content[16:], digest_size=16).digest() != expected or groups is None:
            return 0
        if {name: values.shape for name, values in stored.items()} != shapes:
            return 0
        sums.values.update(stored)
        return int(groups[0])

    def save(self, sums: Sums, row_groups: int) -> None:
        """Keep the sums of the first row groups."""
        content = save({**sums.values, "row groups": np.array([row_groups])})
        durable.write(self.path, blake2b(content, digest_size=16).digest() + content)


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
    try:
        durable.write(path, json.dumps(what).encode(), replace=False)
    except FileExistsError:
        return claimed(folder)
    return what


def finish(folder: Path) -> None:
    """Delete what was kept, because the report is written."""
    with suppress(FileNotFoundError):
        rmtree(folder / _FOLDER)
