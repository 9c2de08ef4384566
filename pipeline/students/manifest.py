"""The manifest of a checkpoint, which shows whether the checkpoint is whole.

A disk or a power cut may damage files that were complete once. Each checkpoint therefore lists the size and the hash of
every file that is needed to go on from it: the state, each rank's random state, and the best weights so far.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open

from softlabel.storage.places.place import content_hash, reading

_MANIFEST = "manifest.json"
_NEEDED = ("run.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state*.pth")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FileEntry:
    """A file as it was when the checkpoint was complete."""

    bytes: int
    blake2b: str


_ENTRIES = TypeAdapter(dict[str, FileEntry])
"""The content of a manifest: entries by the files' paths, relative to the checkpoint."""


def seal(written: Path, final: Path, others: Sequence[Path] = ()) -> None:
    """Write the manifest of a checkpoint whose other files are written.

    Args:
        written: the checkpoint under its temporary name.
        final: its final name.
        others: files outside it that are needed to go on from it.
    """
    files = {file.name: file for file in sorted(written.iterdir())}
    files |= {os.path.relpath(file, final): file for file in others}
    (written / _MANIFEST).write_bytes(_ENTRIES.dump_json({n: _entry(file) for n, file in files.items()}, indent=2))


def problem_of(checkpoint: Path) -> str | None:
    """What keeps a run from going on from a checkpoint: a file that is missing, torn or changed. None if it is whole.

    Raises:
        AccessError: if it can't be read at the moment.
    """
    with reading(str(checkpoint)):
        try:
            manifest = _ENTRIES.validate_json((checkpoint / _MANIFEST).read_bytes())
            problems = (_difference(checkpoint / name, name, entry) for name, entry in manifest.items())
            return next(filter(None, problems), None)
        except FileNotFoundError:
            return _problem_without_manifest(checkpoint)
        except ValueError:
            return f"{_MANIFEST} is damaged"


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(bytes=path.stat().st_size, blake2b=content_hash(file))


def _difference(path: Path, name: str, expected: FileEntry) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected.bytes:
        return f"{name} has {path.stat().st_size} bytes instead of {expected.bytes}"
    return None if _entry(path) == expected else f"{name} has changed: its hash differs"


def _problem_without_manifest(checkpoint: Path) -> str | None:
    """The same for a checkpoint from before there were manifests, as far as its files show it."""
    for pattern in _NEEDED:
        if not any(checkpoint.glob(pattern)):
            return f"{pattern} is missing"
    for file in sorted(checkpoint.iterdir()):
        try:
            _read(file)
        except (ValueError, SafetensorError, BadZipFile) as error:
            return f"{file.name} is damaged ({error})"
    return None


def _read(path: Path) -> None:
    """Raise an error if a file is cut off, or if its own checksums don't match."""
    match path.suffix:
        case ".json":
            json.loads(path.read_text(encoding="utf-8"))
        case ".safetensors":
            with safe_open(path, "pt"):  # compares the sizes in its header with the size of the file
                pass
        case ".pt" | ".pth":
            with ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise BadZipFile(f"the checksum of {damaged} does not match")
