"""Files that are there whole or not at all, and that are named by what is in them."""

import hashlib
import os
import uuid
from pathlib import Path


def content_hash(path: Path) -> str:
    """128-bit BLAKE2b of a file's bytes, as 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def publish(content: bytes, path: Path) -> None:
    """Write a file under its final name at once, so that it survives a power cut whole.

    Raises:
        OSError: if it can't be written; then nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Move a finished file to its final name, durably: the bytes first, then the name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sync(source)
    source.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
