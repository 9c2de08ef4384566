"""A training that goes on takes what is left out from the student's record, and refuses what is given and differs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from softlabel.flows.arguments import resolve as with_flags
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.training.train import TrainReport, train
from softlabel.storage.errors import UsageError
from softlabel.storage.table import Table
from tests.pipeline.conftest import NEW
from tests.pipeline.trainings import settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")


class PowerCutError(Exception):
    """Ends a training without a word."""


def left_out(table: Table, output: object, **more: Any) -> TrainConfig:
    """A training with these settings, and nothing else given but the device."""
    on_cpu = {"optimizer": {"device": "cpu"} | more.pop("optimizer", {})}
    return TrainConfig.model_validate({"table": table.location, "output": str(output), **more, **on_cpu})


def test_a_training_goes_on_with_the_settings_that_it_began_with(
    table: Table, uninterrupted: TrainReport, tmp_path: Path
):
    """Of its settings, none but the device is that of a new training."""

    def cut(progress: Any) -> None:
        if progress.done == 9:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(settings(table, tmp_path / "student"), cut)
    report = train(left_out(table, tmp_path / "student"))
    assert report.resumed_from == 8
    expected, found = weights(uninterrupted.output), weights(tmp_path / "student")
    assert all(found[name].equal(expected[name]) for name in expected)
    assert train(left_out(table, tmp_path / "student")).steps_trained == 0


@pytest.mark.parametrize(
    "different",
    [
        {"optimizer": {"learning_rate": 5e-4}},  # the default
        {"optimizer": {"num_train_epochs": 1.0}, "stream": {"batch_size": 8, "max_length": 1024}},
        {"stream": {"packing": False}, "loss": {"divergence": "reverse_kl"}},
        {"student": {"depth": 1}},
        {"student": {"lora_r": 4}},
    ],
    ids=str,
)
def test_what_is_given_and_differs_is_refused_with_the_flags_that_match(
    table: Table, uninterrupted: TrainReport, different: dict[str, Any]
):
    with pytest.raises(UsageError) as error:
        train(left_out(table, uninterrupted.output, **different))
    recorded = settings(table, uninterrupted.output).completed()
    for section, values in different.items():
        for name, value in values.items():
            before = getattr(getattr(recorded, section), name)
            if before != value:
                assert f"{section}.{name}: {before} then, {value} now (to match: --{section}." in str(error.value)
    flags: dict[tuple[str, ...], Any] = {("table",): table.location, ("output",): uninterrupted.output}
    for text in re.findall(r"\(to match: (--\S+ (?!left).*)\)", str(error.value)):
        flag, *values = shlex.split(text)
        path = tuple(flag.removeprefix("--").replace("-", "_").split("."))
        flags[path] = values if path[-1] == "layers" else values[0]
    flags[("optimizer", "device")] = "cpu"
    assert train(with_flags(TrainConfig, flags, None)).steps_trained == 0


def test_what_is_given_fits_the_record_and_not_the_defaults(table: Table, tmp_path: Path):
    """A weight of 0 for the divergence needs a weight of the cross-entropy, which the record has."""
    hard = {"loss": {"hard_weight": 1.0, "soft_weight": 0.0}, "optimizer": {"max_steps": 2}}
    train(settings(table, tmp_path / "student", **hard))
    assert train(left_out(table, tmp_path / "student", loss={"soft_weight": 0.0})).steps_trained == 0
    with pytest.raises(UsageError, match="both 0 at the first step"):
        train(left_out(table, tmp_path / "new", loss={"soft_weight": 0.0}, student={"depth": 1}))
    assert not (tmp_path / "new").exists()


def test_a_student_of_the_hub_stays_at_its_commit(table: Table, hub: Path, tmp_path: Path):
    student = {"student": {"layers": None, "model": "org/name"}, "optimizer": {"max_steps": 2}}
    train(settings(table, tmp_path / "student", **student))
    (hub / "refs" / "main").write_text(NEW)
    for given in ({}, {"model": "org/name"}):
        assert train(left_out(table, tmp_path / "student", student=given)).steps_trained == 0
    with pytest.raises(UsageError, match="its content has changed"):
        train(left_out(table, tmp_path / "student", student={"revision": NEW}))


def test_a_new_student_needs_a_source(table: Table, tmp_path: Path):
    with pytest.raises(UsageError, match="exactly one setting"):
        train(left_out(table, tmp_path / "student"))
    assert not list(tmp_path.iterdir())
