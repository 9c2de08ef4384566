"""One Prefect server for all tests of the flows."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    """A Prefect server with an empty database, which runs as long as the tests."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for the database of embedded servers; shared, because creating it takes a while."""
    return tmp_path_factory.mktemp("prefect")
