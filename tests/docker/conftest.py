"""The images, built once for all tests of this folder, and folders that their user can enter."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.docker.images import Images, require_programs


@pytest.fixture(scope="session")
def images() -> Iterator[Images]:
    require_programs()
    with _folder() as folder, closing(Images(folder)) as images:
        yield images


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter; pytest closes those of tmp_path, also while a test runs."""
    with _folder() as folder:
        yield folder


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="softlabel-", dir="/var/tmp"))  # images take several GB, so not in memory
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
