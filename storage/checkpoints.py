"""Checkpoints: files of the log that each describe a whole version, so that a reader needs few of the commits before.

delta-rs makes them, in a copy of the end of the log, because a power cut can empty the files that it writes. From there
they are written durably: first the checkpoint, then ``_last_checkpoint``, where other programs look for the newest.
"""

import tempfile
from pathlib import Path

from deltalake import DeltaTable

from softlabel.storage.log_files import LOG, checkpoints, commit_file
from softlabel.storage.places.place import Place

VERSIONS_PER_CHECKPOINT = 100
"""One checkpoint is made for so many versions."""
LAST_CHECKPOINT = f"{LOG}/_last_checkpoint"
"""File that tells other programs which checkpoint is the newest."""


def write_checkpoint(place: Place, version: int) -> None:
    """Write the checkpoint of a version, durably.

    Raises:
        OSError: if a file can't be read or written.
        DeltaError: if the log is damaged.
    """
    before = {known: name for known, name in checkpoints(place).items() if known < version}
    start = max(before, default=-1)
    needed = [commit_file(number) for number in range(start + 1, version + 1)]
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, LOG).mkdir()
        for name in [*needed, *([before[start]] if before else [])]:
            Path(scratch, name).write_bytes(place.read(name))
        DeltaTable(scratch, version=version).create_checkpoint()
        for name in (f"{LOG}/{version:020}.checkpoint.parquet", LAST_CHECKPOINT):
            place.write(name, Path(scratch, name).read_bytes())
