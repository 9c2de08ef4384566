"""Prefect servers for the tests of the flows. They begin with a copy of one database, since creating one takes long."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from os import environ
from pathlib import Path
from tempfile import mkdtemp

import pytest
from filelock import FileLock

DATABASE = "prefect.db"
CREATE = """
import asyncio
from prefect.server.database import provide_database_interface

asyncio.run(provide_database_interface().create_db())
"""


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a server without any run, created once for all parallel processes of the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in environ else base) / "prefect-database"
    with FileLock(f"{folder}.lock"):
        if not (folder / DATABASE).exists():
            home = folder.with_name("prefect-database-new")
            subprocess.run([sys.executable, "-c", CREATE], env=environ | {"PREFECT_HOME": str(home)}, check=True)
            home.rename(folder)
    return folder / DATABASE


@pytest.fixture(scope="session")
def prefect(prefect_database: Path) -> Iterator[None]:
    """A Prefect server without any run, for as long as the tests run."""
    from prefect.testing.utilities import prefect_test_harness

    def with_database() -> str:
        folder = mkdtemp()
        shutil.copy(prefect_database, Path(folder) / "prefect-test.db")
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefect.testing.utilities.mkdtemp", with_database)
        with prefect_test_harness(server_startup_timeout=120):
            yield


@pytest.fixture(scope="session")
def prefect_home(prefect_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the database of embedded servers."""
    home = tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_database, home)
    return home
