"""Files next to the shards: the vocabulary and the tokenizer. Named by a hash of their content, and never changed."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softlabel.storage.codec import Ints, SoftLabels
from softlabel.storage.errors import IntegrityError
from softlabel.storage.places.place import SIDE_FOLDER, Place, hash_of, reading

_RESTORE = "restore this from a copy of the table"


def store_vocabulary(place: Place, sample: SoftLabels | Ints, vocabulary: int) -> str:
    """Rank the token ids by their frequency in a sample, and store the ranking as a file.

    Args:
        place: place of the table.
        sample: soft labels with the teacher's ids; or another table's vocabulary, to use the same ranking.
        vocabulary: number of token ids; ids that do not occur come last, in ascending order.

    Returns:
        The file's name.
    """
    ids = _by_frequency(sample, vocabulary) if isinstance(sample, SoftLabels) else sample
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"rank": np.arange(len(ids), dtype=np.int32), "token_id": ids}), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    name = _vocabulary_name(content)
    place.write(f"{SIDE_FOLDER}/{name}", content)
    return name


def read_vocabulary(place: Place, name: str) -> Ints:
    """(V,) int32 token id of each rank.

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
    ids: Ints = pq.read_table(pa.BufferReader(content)).column("token_id").to_numpy()
    return ids


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


def _by_frequency(sample: SoftLabels, vocabulary: int) -> Ints:
    counts = np.bincount(np.concatenate([sample.head_ids, sample.tail_ids]), minlength=vocabulary)
    return np.argsort(-counts, kind="stable").astype(np.int32)


def _vocabulary_name(content: bytes) -> str:
    return f"vocabulary-{hash_of(content)}.parquet"


def _tokenizer_name(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(json.dumps([file.name, hashlib.sha256(file.read_bytes()).hexdigest()]).encode())
    return f"tokenizer-{digest.hexdigest()[:32]}"
