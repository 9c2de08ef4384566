"""Files next to the shards: the vocabulary and the tokenizer. Named by a hash of their content, and never changed."""

import hashlib
import json
import re
from pathlib import Path

from softlabel.storage.clustering import fit
from softlabel.storage.errors import IntegrityError
from softlabel.storage.labels import SoftLabels
from softlabel.storage.numbering import Numbering
from softlabel.storage.places.place import SIDE_FOLDER, Place, hash_of, reading

_VOCABULARY, _TOKENIZER = re.compile(r"vocabulary-[0-9a-f]{32}\.parquet"), re.compile(r"tokenizer-[0-9a-f]{32}")
_RESTORE = "restore this from a copy of the table"


def store_vocabulary(place: Place, sample: SoftLabels | Numbering, vocabulary: int) -> str:
    """Number the token ids so that soft labels like a sample take few bytes, and store the numbering as a file.

    Args:
        place: place of the table.
        sample: soft labels with the teacher's ids; or another table's numbering, to use the same.
        vocabulary: number of token ids.

    Returns:
        The file's name.
    """
    content = (fit(sample, vocabulary) if isinstance(sample, SoftLabels) else sample).to_parquet()
    name = _vocabulary_name(content)
    place.write(f"{SIDE_FOLDER}/{name}", content)
    return name


def require_names(vocabulary: str, tokenizer: str) -> None:
    """Refuse names that may lead elsewhere, because softlabel never gave them.

    Raises:
        ValueError: if a name is not that of a vocabulary or a tokenizer.
    """
    for name, pattern in ((vocabulary, _VOCABULARY), (tokenizer, _TOKENIZER)):
        if not pattern.fullmatch(name):
            raise ValueError(f"{name[:300]!r} does not match {pattern.pattern}")


def read_vocabulary(place: Place, name: str) -> Numbering:
    """The table's numbering of token ids.

    Raises:
        IntegrityError: if the file is missing or damaged.
    """
    path = f"{SIDE_FOLDER}/{name}"
    try:
        content = place.read(path)
    except OSError as error:
        raise IntegrityError(
            "the table's vocabulary can't be read", found=error, where=place.where(path), do=_RESTORE
        ) from error
    if _vocabulary_name(content) != name:
        raise IntegrityError(
            "the table's vocabulary is damaged",
            expected="content that matches the hash in the file's name",
            found=f"{len(content)} bytes with a different hash",
            where=place.where(path),
            do=_RESTORE,
        )
    return Numbering.from_parquet(content)


def store_tokenizer(place: Place, source: Path) -> str:
    """Copy the tokenizer's files into the table; returns the name of their folder."""
    name = _tokenizer_name(source)
    place.write_folder(source, f"{SIDE_FOLDER}/{name}")
    return name


def read_tokenizer(place: Place, name: str) -> Path:
    """A local folder with the tokenizer's files.

    Raises:
        IntegrityError: if they are missing or damaged.
    """
    path = f"{SIDE_FOLDER}/{name}"
    try:
        folder = place.fetch_folder(path)
        with reading(place.where(path)):
            found = _tokenizer_name(folder)
    except OSError as error:
        raise IntegrityError(
            "the table's tokenizer can't be read", found=error, where=place.where(path), do=_RESTORE
        ) from error
    if found != name:
        raise IntegrityError(
            "the table's tokenizer is damaged",
            expected="files that match the hash in the folder's name",
            found=", ".join(sorted(file.name for file in folder.iterdir())) or "no files",
            where=place.where(path),
            do=_RESTORE,
        )
    return folder


def _vocabulary_name(content: bytes) -> str:
    return f"vocabulary-{hash_of(content)}.parquet"


def _tokenizer_name(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(json.dumps([file.name, hashlib.sha256(file.read_bytes()).hexdigest()]).encode())
    return f"tokenizer-{digest.hexdigest()[:32]}"
