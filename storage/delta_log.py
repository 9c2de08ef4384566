"""Commits that the Delta library makes, written durably.

The library gives a commit and a checkpoint their names before their content is on disk, so a power cut may leave empty
ones. It therefore writes to a local copy of the end of the log, from where each new file is written to the table.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from softlabel.storage.commit_files import LOG, checkpoints, commit_file, lines_of
from softlabel.storage.errors import AccessError
from softlabel.storage.places.place import Place

_THREADS = 8
"""Files that are copied in parallel: in a bucket, each is a request."""
_LAST_CHECKPOINT = f"{LOG}/_last_checkpoint"


def commit_by_library(place: Place, version: int, commit: Callable[[str], object]) -> bool:
    """Commit a version; returns False if there is one with this number already.

    Args:
        place: place of the table.
        version: number of the new version; the one before it must be in the log, unless this is 0.
        commit: given the path of a copy of the log, makes the library commit the version there.

    Raises:
        AccessError: if the log can't be read or the place can't be written.
        OSError: if the commit can't be written.
    """
    with _copy_of_log(place, version) as copy:
        commit(str(copy))
        if not write_commit(place, version, _without_location((copy / commit_file(version)).read_bytes())):
            return False
        checkpoint = next(copy.glob(f"{LOG}/{version:020}.checkpoint.parquet"), None)
        if checkpoint:
            # It only makes opening the table faster, and the version is committed already.
            with suppress(OSError, AccessError):
                place.write(f"{LOG}/{checkpoint.name}", checkpoint.read_bytes())
                place.write(_LAST_CHECKPOINT, (copy / _LAST_CHECKPOINT).read_bytes())
    return True


def _without_location(commit: bytes) -> bytes:
    """A commit that does not say where the table was created: the library would name the copy."""
    lines = lines_of(commit)
    for line in lines:
        line.get("commitInfo", {}).get("operationParameters", {}).pop("location", None)
    return "\n".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in lines).encode()


def write_commit(place: Place, version: int, content: bytes) -> bool:
    """Write a commit; returns False if there is another one with this number already."""
    name = commit_file(version)
    try:
        place.write(name, content, replace=False)
    except FileExistsError:  # the client may have sent the request twice, because the first answer was lost
        with suppress(FileNotFoundError):  # another process is about to write it
            return place.read(name) == content
        return False
    return True


@contextmanager
def _copy_of_log(place: Place, version: int) -> Iterator[Path]:
    """A local folder with the files of the log that the version before is read from."""
    files = {before: name for before, name in checkpoints(place).items() if before < version}
    last = max(files, default=None)
    names = [] if last is None else [files[last]]
    names += [commit_file(before) for before in range(0 if last is None else last, version)]
    with tempfile.TemporaryDirectory(prefix="softlabel-") as folder:
        Path(folder, LOG).mkdir()
        with ThreadPoolExecutor(_THREADS, "softlabel-log") as pool:
            for name, content in zip(names, pool.map(partial(_content, place), names), strict=True):
                if content is not None:
                    Path(folder, name).write_bytes(content)
        yield Path(folder)


def _content(place: Place, name: str) -> bytes | None:
    with suppress(FileNotFoundError):  # the commits up to a checkpoint may be gone
        return place.read(name)
    return None
