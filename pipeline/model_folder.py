"""Folders with a model's or an adapter's files: found on disk or fetched from the hub, hashed, and named when broken.

Nothing is downloaded when a folder is given, and never anything but safetensors and what describes them.
"""

import hashlib
import re
import time
from collections.abc import Mapping
from pathlib import Path

from storage.errors import TeacherError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_HASHES: dict[str, str] = {}
"""SHA-256 of each state of a file that this process, or the one that started it, has read."""
_SECONDS_TO_SETTLE = 2.0
"""Age of a state that is remembered: a file that is written twice within a tick of its clock looks the same."""


def locate(name: str, what: str, revision: str | None = None, code: bool = False) -> Path:
    """The folder itself, or that of a hub model; its name is then the commit, so that what is loaded is written down.

    Args:
        name: a folder, or a name on the hub.
        what: it is, for the error.
        revision: commit, tag or branch on the hub.
        code: whether to fetch Python files too.

    Raises:
        TeacherError: if it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    found = "no such folder"
    if _HUB_NAME.fullmatch(name):
        from huggingface_hub import snapshot_download  # only a hub model needs it

        try:
            path = snapshot_download(
                name,
                revision=revision,
                allow_patterns=_FILES + (["*.py"] if code else []),
                ignore_patterns=["*/*", "consolidated*"],  # the same weights again, in other layouts
            )
            return Path(path)
        except (OSError, ValueError) as error:
            found = f"no such folder, and from the hub {type(error).__name__}: {first_line(error)}"
    raise TeacherError(
        f"there is no such {what}",
        expected="a folder that save_pretrained() wrote, with safetensors, or a name on the hub",
        found=found,
        where=name + (f", revision {revision}" if revision else ""),
        do="check the name; offline, fetch it beforehand and give its folder",
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; read once as long as nothing is written to it or put in its place."""
    found = path.stat()
    state = f"{path.absolute()} {found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    if state in _HASHES:
        return _HASHES[state]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - found.st_ctime > _SECONDS_TO_SETTLE:
        _HASHES[state] = digest
    return digest


def known_hashes() -> Mapping[str, str]:
    """What ``sha256`` remembers, for a process that is to look at the same files."""
    return _HASHES


def remember(hashes: Mapping[str, str]) -> None:
    """Take over what another process of this machine remembers; it holds for files that are still as they were."""
    _HASHES.update(hashes)


def broken(summary: str, folder: Path, error: Exception) -> TeacherError:
    """The error for files that are there and can't be used."""
    needs_code = "trust_remote_code" in str(error)
    return TeacherError(
        summary,
        expected="a folder that save_pretrained() wrote, or a hub model in the same layout",
        found=f"{type(error).__name__}: {first_line(error)}",
        where=folder,
        do="read the Python files of this model and, if you trust them, set teacher.trust_remote_code"
        if needs_code
        else "fetch or save the model again, its tokenizer too",
    )


def first_line(error: Exception) -> str:
    """Of what an error says, short enough for one of ours."""
    return next(iter(str(error).strip().splitlines()), "")[:200]
