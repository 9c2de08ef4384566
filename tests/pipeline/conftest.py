"""What tests of the pipeline share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.training import TrainReport, train
from storage.table import Table
from tests.pipeline.tables import make_table
from tests.pipeline.trainings import settings


@contextmanager
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Problems are tiny, and sums that are split among threads may be split otherwise in another process."""
    with _single_thread():
        yield


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Table:
    """A small table to train on."""
    return make_table(tmp_path_factory.mktemp("training") / "table", tiny_teacher)


@pytest.fixture(scope="session")
def uninterrupted(table: Table, tmp_path_factory: pytest.TempPathFactory) -> TrainReport:
    """A student that was trained on it in one go."""
    with _single_thread():
        return train(settings(table, tmp_path_factory.mktemp("uninterrupted") / "student"))
