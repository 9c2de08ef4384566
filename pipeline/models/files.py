"""Find a model's or an adapter's files on disk or download them from the hub, and hash them.

Nothing is downloaded when a folder is given. Of weights, only safetensors are downloaded.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from softlabel.storage.errors import SoftlabelError, TeacherError, UsageError
from softlabel.storage.location import located

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""What the name of a repository on the hub looks like."""
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Patterns of the files that are downloaded of a hub model."""
_SINGLE = "model.safetensors"
_HASHES: dict[str, str] = {}
"""SHA-256 of each file, by path, size and times, that this process or its parent has read."""
_MIN_AGE_SECONDS = 2.0
"""A younger file's hash is not remembered: its times do not change if it is written again within one clock tick."""


PACKAGES = "the packages that a model of this architecture needs"
INSTALL = "install this package into the environment of softlabel, and run the same command again; or use another model"


class UntrustedCodeError(ValueError):
    """Files that need code that comes with them, which is not trusted."""

    def __init__(self) -> None:
        super().__init__("it needs Python code that comes with it (auto_map), and softlabel is not allowed to run that")


def locate(
    name: str,
    what: str,
    revision: str | None = None,
    files: Sequence[str] = MODEL_FILES,
    error: type[SoftlabelError] = TeacherError,
) -> tuple[Path, str | None]:
    """A model's folder; for a hub model, the downloaded folder and its commit. A folder of that name comes first.

    Args:
        name: a folder, or the name of a repository on the hub.
        what: what is looked for, for the error.
        revision: commit, tag or branch on the hub.
        files: patterns of the files to download.
        error: class of the error to raise if nothing is found.

    Raises:
        SoftlabelError: of that class.
        UsageError: if a revision of a folder is given, or the name contains credentials.
    """
    name = located(name)
    if Path(name).is_dir():
        require_no_revision(Path(name), revision)
        return Path(name), None
    found, advice = f"no such folder: {Path(name).absolute()}", "check the name"
    if HUB_NAME.fullmatch(name):
        from huggingface_hub import snapshot_download  # imported here: only a hub model needs it

        try:
            path = snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=["*/*", "consolidated*"],  # other copies of the same weights
            )
            return Path(path), Path(path).name
        except (OSError, ValueError) as missing:
            why, advice = _not_from_the_hub(name, missing)
            found = f"no folder {Path(name).absolute()}; and on the hub: {why}"
    raise error(
        f"can't find the {what}",
        expected="a folder that save_pretrained() wrote, with safetensors, or a repository name on the hub"
        if "*.safetensors" in files
        else "a folder with a config.json, the path of one, or a repository name on the hub",
        found=found,
        where=name + (f", revision {revision}" if revision else ""),
        do=advice,
    )


def _not_from_the_hub(name: str, error: Exception) -> tuple[str, str]:
    """Why a hub model is not there, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    match error:
        case GatedRepoError():
            return "only for users who have accepted its terms", "accept its terms on the hub, and set HF_TOKEN"
        case LocalEntryNotFoundError():
            offline = constants.HF_HUB_OFFLINE
            why = "HF_HUB_OFFLINE forbids downloads" if offline else "the hub can't be reached"
            first = "unset HF_HUB_OFFLINE" if offline else "check the connection"
            return (
                f"not in this machine's cache, and {why}",
                f"check the name, and {first}; or run 'hf download {name}' on a machine with access, copy the folder"
                " that it prints, and give that",
            )
        case _:
            return f"{type(error).__name__}: {first_line(error)}", "check the name and the revision"


def require_no_revision(path: Path, revision: str | None) -> None:
    """Refuse a revision of a local folder.

    Raises:
        UsageError: if a revision is given.
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
    """The safetensors files that transformers would load from a folder, whether they exist or not.

    Raises:
        OSError, ValueError: if the index of the weight files can't be read.
    """
    index = folder / "model.safetensors.index.json"
    sharded = index.is_file() and not (folder / _SINGLE).is_file()
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if sharded else {_SINGLE}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} has no weight_map") from error
    return [folder / name for name in sorted(names)]


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; remembered until the file is changed or replaced."""
    stat = path.stat()
    state = f"{path.absolute()} {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    if state in _HASHES:
        return _HASHES[state]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - stat.st_ctime > _MIN_AGE_SECONDS:
        _HASHES[state] = digest
    return digest


def known_hashes() -> Mapping[str, str]:
    """The hashes that ``sha256`` remembers, for a process that will need those of the same files."""
    return _HASHES


def remember(hashes: Mapping[str, str]) -> None:
    """Add the hashes that another process of this machine remembers; they are used for files that have not changed."""
    _HASHES.update(hashes)


def broken(summary: str, folder: Path, error: Exception) -> TeacherError:
    """The error for a teacher's files that exist but can't be used."""
    return TeacherError(
        summary,
        expected=PACKAGES
        if isinstance(error, ImportError)
        else "a folder that save_pretrained() wrote, or a hub repository with the same layout",
        found=f"{type(error).__name__}: {first_line(error)}",
        where=folder,
        do="read the Python files of this model and, if you trust them, set teacher.trust_remote_code"
        if isinstance(error, UntrustedCodeError)
        else INSTALL
        if isinstance(error, ImportError)
        else "download or save the model and its tokenizer again",
    )


def first_line(error: Exception) -> str:
    """The first line of an error's text, and the second if the first announces it; shortened to fit into an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])[:300]
