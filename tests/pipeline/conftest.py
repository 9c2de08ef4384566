"""What tests of the pipeline share."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from softlabel.pipeline.evaluation import evaluate as evaluation
from softlabel.pipeline.evaluation.cost import Cost, cost_of
from softlabel.pipeline.selection import scan_cpu, scan_torch
from softlabel.pipeline.selection import select as selection
from softlabel.pipeline.training.train import TrainReport, train
from softlabel.storage.table import Table
from tests.pipeline.captured import make_table
from tests.pipeline.trainings import settings

OLD, NEW = "a" * 40, "b" * 40
"""Commits of a model."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run, whichever tests have run before in this process."""
    torch.manual_seed(0)


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


@pytest.fixture(scope="module", params=["cpu", "any device"])
def passes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways through the vocabulary: the CPU's own, and the one of all other devices, which a CPU can go too."""
    way = {"cpu": scan_cpu, "any device": scan_torch}[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_passes", lambda device, _: way if device.type == "cpu" else scan_torch)
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


@pytest.fixture(autouse=True)
def without_speed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the speed of the models takes most of a small evaluation's time; test_cost.py does it."""

    def cost(*arguments: Any) -> Cost:
        *others, _, task = arguments
        return cost_of(*others, 0, task)

    if "speed" not in request.fixturenames:
        monkeypatch.setattr(evaluation, "cost_of", cost)


@pytest.fixture
def speed() -> None:
    """A test in which evaluations measure the speed of the models."""


@pytest.fixture
def hub(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model in a hub's cache, as a download leaves it: two commits, and main, which is the old one."""
    model = tmp_path / "hub" / "models--org--name"
    shutil.copytree(tiny_teacher, model / "snapshots" / OLD)
    shutil.copytree(tiny_teacher, model / "snapshots" / NEW)
    changed = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    changed.model.norm.weight.data *= 2
    changed.save_pretrained(model / "snapshots" / NEW)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(model.parent))
    return model
