"""Folders with a model's or an adapter's files: found on disk or fetched from the hub, hashed, and named when broken.

Nothing is downloaded when a folder is given, and never anything but safetensors and what describes them.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from softlabel.storage.errors import SoftlabelError, TeacherError, UsageError
from softlabel.storage.location import located

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Patterns of what is fetched of a hub model."""
_SINGLE = "model.safetensors"
_HASHES: dict[str, str] = {}
"""SHA-256 of each state of a file that this process, or the one that started it, has read."""
_SECONDS_TO_SETTLE = 2.0
"""Age of a state that is remembered: a file that is written twice within a tick of its clock looks the same."""


class UntrustedCodeError(ValueError):
    """Files that can't be loaded unless code that comes with them is run."""

    def __init__(self) -> None:
        super().__init__("it needs Python code that comes with it (auto_map), and softlabel is not allowed to run that")


def locate(
    name: str,
    what: str,
    revision: str | None = None,
    files: Sequence[str] = MODEL_FILES,
    error: type[SoftlabelError] = TeacherError,
) -> tuple[Path, str | None]:
    """The folder itself, or that of a hub model and its commit, so that what is loaded can be written down.

    Args:
        name: a folder, or a name on the hub.
        what: it is, for the error.
        revision: commit, tag or branch on the hub.
        files: patterns of what to fetch.
        error: kind of error to raise if it is neither.

    Raises:
        SoftlabelError: of that kind.
        UsageError: if a revision is asked of a folder, or the name holds credentials.
    """
    name = located(name)
    if Path(name).is_dir():
        require_no_revision(Path(name), revision)
        return Path(name), None
    found = "no such folder"
    if _HUB_NAME.fullmatch(name):
        from huggingface_hub import snapshot_download  # only a hub model needs it

        try:
            path = snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=["*/*", "consolidated*"],  # the same weights again, in other layouts
            )
            return Path(path), Path(path).name
        except (OSError, ValueError) as missing:
            found = f"no such folder; the hub gave {type(missing).__name__}: {first_line(missing)}"
    raise error(
        f"can't find the {what}",
        expected="a folder that save_pretrained() wrote, with safetensors, or a repository name on the hub"
        if "*.safetensors" in files
        else "a folder with a config.json, such a file, or a repository name on the hub",
        found=found,
        where=name + (f", revision {revision}" if revision else ""),
        do="check the name; to work offline, download it first and give its folder",
    )


def require_no_revision(path: Path, revision: str | None) -> None:
    """Refuse a revision of what is on this disk.

    Raises:
        UsageError: if one is asked for.
    """
    if revision is not None:
        raise UsageError(
            "a folder has no revisions",
            expected="a revision only with a repository name on the hub",
            found=f"revision: {revision}",
            where=path,
            do="leave out the revision",
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load from a folder, whether they are there or not.

    Raises:
        OSError, ValueError: if the index of several files can't be read.
    """
    index = folder / "model.safetensors.index.json"
    sharded = index.is_file() and not (folder / _SINGLE).is_file()
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if sharded else {_SINGLE}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} has no weight_map") from error
    return [folder / name for name in sorted(names)]


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
    """The error for a teacher's files that are there and can't be used."""
    return TeacherError(
        summary,
        expected="a folder that save_pretrained() wrote, or a hub repository with the same layout",
        found=f"{type(error).__name__}: {first_line(error)}",
        where=folder,
        do="read the Python files of this model and, if you trust them, set teacher.trust_remote_code"
        if isinstance(error, UntrustedCodeError)
        else "download or save the model and its tokenizer again",
    )


def first_line(error: Exception) -> str:
    """Of what an error says, short enough for one of ours."""
    return next(iter(str(error).strip().splitlines()), "")[:200]
