"""The images, built once for all tests of this folder."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.images import Images, require_programs


@pytest.fixture(scope="session")
def images() -> Iterator[Images]:
    require_programs()
    folder = Path(tempfile.mkdtemp(prefix="softlabel-images-", dir="/var/tmp"))  # several GB, so not in memory
    folder.chmod(0o755)  # the images' user enters it
    try:
        yield Images(folder)
    finally:
        shutil.rmtree(folder)
