"""One Prefect server for all tests of the flows."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    """A server of its own with an empty database, for as long as the tests run."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where embedded servers keep their database, which takes its time to be made."""
    return tmp_path_factory.mktemp("prefect")
