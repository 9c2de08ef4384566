"""Training: the same student whatever the micro-batches, the ranks and the interruptions; and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import student, trainer, training
from pipeline.config import StreamConfig, TrainConfig
from pipeline.dataset import SoftLabelDataset
from pipeline.student_config import LossConfig, StudentConfig
from pipeline.trainer import Distillation
from pipeline.training import train
from storage.errors import StudentError, TableError, TrainingError, UsageError
from storage.table import Table
from storage.versions import pins
from tests.conftest import ROOT
from tests.pipeline.tables import make_table

STREAM = {"row_tokens": 40, "batch_rows": 8, "micro_rows": 3}
OPTIMISER = {"epochs": 3, "eval_steps": 5, "checkpoint_steps": 4, "learning_rate": 1e-3, "device": "cpu"}

CHILD = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from pipeline.config import TrainConfig
from pipeline.training import train

settings, die = json.loads(sys.argv[1]), json.loads(sys.argv[2])
if "saving" in die:
    save, count = torch.save, [0]
    def dying_save(value, path, *more, **others):
        if f"checkpoint-{die['saving']}" in str(path):
            save({}, path)
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, path, *more, **others)
    torch.save = dying_save

def watch(progress):
    if progress.done == die.get("step"):
        os.kill(os.getpid(), signal.SIGKILL)

train(TrainConfig.model_validate(settings), watch)
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def table(tmp_path_factory, tiny_teacher):
    return make_table(tmp_path_factory.mktemp("training") / "table", tiny_teacher)


def settings(table, output, **changes):
    groups = {"student": {"layers": (1,)}, "loss": {}, "stream": STREAM, "optimiser": OPTIMISER}
    changed = {name: {**values, **changes.get(name, {})} for name, values in groups.items()}
    return TrainConfig.model_validate({"table": table.location, "output": str(output), **changed})


def run(command, config, **die):
    """A child process that trains, and dies where it is told to."""
    return subprocess.run(
        [sys.executable, *command, config.model_dump_json(), json.dumps(die)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def history(folder):
    return json.loads((Path(folder) / "softlabel.json").read_text())["history"]


@pytest.fixture(scope="module")
def uninterrupted(table, tmp_path_factory):
    """A finished student."""
    output = tmp_path_factory.mktemp("uninterrupted") / "student"
    return train(settings(table, output))


def test_what_is_left_behind(uninterrupted, table):
    folder = Path(uninterrupted.output)
    assert not list(folder.parent.glob("*.training"))
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt*"))
    assert (folder / "tokenizer.json").read_bytes() == (table.tokenizer / "tokenizer.json").read_bytes()
    record = json.loads((folder / "softlabel.json").read_text())
    assert record["config"]["student"]["layers"] == [1]
    assert record["table"]["version"] == table.version
    assert record["table"]["identity"] == table.identity.model_dump(mode="json")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert record["parameters"] == uninterrupted.parameters == student.parameters(model)
    assert f"version {table.version}" in (folder / "README.md").read_text()
    student.build(StudentConfig(model=str(folder)), table)
    assert (str(folder), table.version) in {(pin.student, pin.version) for pin in pins(table.location)}


def test_a_table_that_may_only_be_read(table, tmp_path, monkeypatch):
    def refuse(*_):
        raise TableError("can't be written")

    monkeypatch.setattr(training, "pin", refuse)
    with pytest.warns(UserWarning, match="Nothing keeps this version"):
        assert train(settings(table, tmp_path / "student", optimiser={"max_steps": 1})).steps == 1


def test_the_curve_that_is_recorded(uninterrupted):
    entries = history(uninterrupted.output)
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, uninterrupted.steps + 1))
    assert set(steps[0]) == {"step", "loss", "hard", "soft", "learning_rate", "positions"}
    assert steps[-1]["positions"] == uninterrupted.positions
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["soft"], rel=1e-5)
    evaluated = [entry for entry in entries if "eval_kl" in entry]
    assert [entry["step"] for entry in evaluated] == [0, 5, 10, 12]
    assert {"eval_cross_entropy", "eval_agreement"} < set(evaluated[0])
    assert evaluated[-1]["eval_kl"] == uninterrupted.metrics["eval_kl"] < evaluated[0]["eval_kl"]


def test_each_epoch_has_each_position_once(uninterrupted, table):
    positions = table.scan().filter(split="train").select("positions").sum().collect().item()
    assert uninterrupted.positions == 3 * positions


def test_gradients_do_not_depend_on_the_micro_batches(table):
    found = {}
    for micro_rows in (1, 2, 3, 8):
        stream = StreamConfig(**{**STREAM, "micro_rows": micro_rows})
        for ranks in (1, 2):
            model = student.build(StudentConfig(layers=(1,)), table).double()
            module = Distillation(model, table, LossConfig(hard_weight=0.3), None)
            total = 0.0
            for rank in range(ranks):
                for batch in SoftLabelDataset(table, stream, rank=rank, world_size=ranks, max_steps=1):
                    loss, _ = module(batch)
                    loss.backward()
                    total += loss.item()
            found[micro_rows, ranks] = total, {name: p.grad for name, p in model.named_parameters()}
    loss, gradients = found.pop((8, 1))
    for other_loss, others in found.values():
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-7 * gradient.abs().max().item())


@pytest.mark.parametrize("micro_rows", [1, 8])
def test_students_do_not_depend_on_the_micro_batches(micro_rows, uninterrupted, table, tmp_path):
    train(settings(table, tmp_path / "student", stream={"micro_rows": micro_rows}))
    for entry, other in zip(history(uninterrupted.output), history(tmp_path / "student"), strict=True):
        assert other == pytest.approx(entry, rel=1e-4)


def test_two_ranks_train_the_same_student(uninterrupted, table, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = run(launcher, settings(table, tmp_path / "student"))
    assert done.returncode == 0, done.stderr
    for entry, other in zip(history(uninterrupted.output), history(tmp_path / "student"), strict=True):
        assert other == pytest.approx(entry, rel=1e-4)
    for name, tensor in weights(uninterrupted.output).items():
        torch.testing.assert_close(weights(tmp_path / "student")[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("die", "resumed"), [({"step": 10}, 8), ({"saving": 8}, 4)])
def test_a_killed_run_goes_on_bit_for_bit(die, resumed, uninterrupted, table, tmp_path):
    config = settings(table, tmp_path / "student")
    assert run(["-c", CHILD], config, **die).returncode == -signal.SIGKILL
    assert not (tmp_path / "student").exists()
    report = train(config)
    assert report.resumed_from == resumed
    assert report.steps_trained == uninterrupted.steps - (resumed or 0)
    expected = weights(uninterrupted.output)
    for name, tensor in weights(tmp_path / "student").items():
        assert torch.equal(tensor, expected[name]), name
    assert history(tmp_path / "student") == history(uninterrupted.output)
    assert not list(tmp_path.glob("*.training"))


def test_an_unfinished_run_keeps_to_its_version(table, tiny_teacher, tmp_path):
    own = make_table(tmp_path / "table", tiny_teacher, train=8, held_out=0)
    config = settings(own, tmp_path / "student", optimiser={"checkpoint_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        train(config, _interrupt_at(2))
    _grow(own, tiny_teacher)
    report = train(config)
    assert report.table == f"{own.location}@{own.version}"
    assert report.resumed_from == 1
    assert json.loads((tmp_path / "student" / "softlabel.json").read_text())["table"]["version"] == own.version


def test_other_settings_are_refused(uninterrupted, table, tmp_path):
    with pytest.raises(UsageError) as error:
        train(settings(table, uninterrupted.output, optimiser={"learning_rate": 0.5}, loss={"hard_weight": 1.0}))
    for said in ("optimiser.learning_rate: 0.001 then, 0.5 now", "loss.hard_weight", "choose another output"):
        assert said in str(error.value)

    # What was never saved binds nobody.
    with pytest.raises(KeyboardInterrupt):
        train(settings(table, tmp_path / "student", stream={"seed": 1}), _interrupt_at(2))
    unfinished = settings(table, tmp_path / "student")
    with pytest.raises(KeyboardInterrupt):
        train(unfinished, _interrupt_at(5))
    with pytest.raises(UsageError, match="unfinished"):
        train(settings(table, tmp_path / "student", stream={"seed": 1}))
    assert train(unfinished).resumed_from == 4


def test_another_version_of_the_table_is_refused(tiny_teacher, tmp_path):
    own = make_table(tmp_path / "table", tiny_teacher, train=8, held_out=0)
    config = settings(own, tmp_path / "student")
    train(config)
    _grow(own, tiny_teacher)
    with pytest.raises(UsageError, match=f"table: .*@{own.version} then, .*@{own.version + 1} now"):
        train(config)
    pinned = config.model_copy(update={"table": f"{own.location}@{own.version}"})
    assert train(pinned).steps_trained == 0


def test_a_second_run_trains_nothing(uninterrupted, table):
    before = (Path(uninterrupted.output) / "model.safetensors").stat()
    again = train(settings(table, uninterrupted.output, stream={"micro_rows": 8}), _fail)
    assert again.steps_trained == 0
    assert (again.steps, again.positions, again.metrics) == (
        uninterrupted.steps,
        uninterrupted.positions,
        uninterrupted.metrics,
    )
    assert (Path(uninterrupted.output) / "model.safetensors").stat() == before


def test_a_folder_that_holds_something_else(table, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        train(settings(table, tmp_path / "student"))
    assert not list(tmp_path.glob("*.training"))


@pytest.mark.parametrize(("step", "checkpoint"), [(6, "checkpoint-4"), (2, "none was written yet")])
def test_a_loss_that_is_no_number(step, checkpoint, table, tmp_path, monkeypatch):
    loss = trainer.distillation_loss
    steps = [0]

    def broken(*arguments, **named):
        steps[0] += 1
        whole = loss(*arguments, **named)
        return type(whole)(whole.total * float("nan"), whole.hard, whole.soft, 1) if steps[0] == step else whole

    monkeypatch.setattr(trainer, "distillation_loss", broken)
    config = settings(table, tmp_path / "student", stream={"micro_rows": 8})
    with pytest.raises(TrainingError) as error:
        train(config)
    for said in (checkpoint, f"step {step} of 12", "learning_rate"):
        assert said in str(error.value)
    assert not (tmp_path / "student").exists()
    monkeypatch.undo()
    for kept in (tmp_path / "student.training").glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(kept).values())


def test_hard_labels_alone(table, tmp_path):
    report = train(settings(table, tmp_path / "control", loss={"hard_weight": 1.0, "soft_weight": 0.0}))
    for entry in history(tmp_path / "control"):
        if "loss" in entry:
            assert entry["soft"] == 0
            assert entry["loss"] == pytest.approx(entry["hard"], rel=1e-5)
    assert set(report.metrics) == {"eval_kl", "eval_cross_entropy", "eval_agreement"}


def test_bfloat16_and_checkpointed_gradients(uninterrupted, table, tmp_path):
    train(settings(table, tmp_path / "student", optimiser={"bf16": True, "gradient_checkpointing": True}))
    expected, found = history(uninterrupted.output), history(tmp_path / "student")
    assert found[-1]["eval_kl"] == pytest.approx(expected[-1]["eval_kl"], rel=0.05)


def test_nothing_held_out(tiny_teacher, tmp_path):
    own = make_table(tmp_path / "table", tiny_teacher, train=8, held_out=0)
    report = train(settings(own, tmp_path / "student", optimiser={"max_steps": 2}))
    assert report.steps == 2
    assert report.metrics == {}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"student": {"layers": None}}, UsageError, "exactly one place"),
        ({"student": {"layers": None, "model": "nowhere"}}, StudentError, "nowhere"),
        ({"loss": {"temperature": 2.0}}, UsageError, "temperature"),
        ({"stream": {"row_tokens": 16}}, UsageError, "row_tokens"),
        ({"optimiser": {"device": "cuda:7"}}, UsageError, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_can_not_be_trained_leaves_nothing(changes, error, said, table, tmp_path):
    with pytest.raises(error, match=said):
        train(settings(table, tmp_path / "student", **changes))
    assert not list(tmp_path.iterdir())


def _interrupt_at(step):
    def watch(progress):
        if progress.done == step:
            raise KeyboardInterrupt

    return watch


def _fail(progress):
    raise AssertionError("trained")


def _grow(table, teacher):
    """Commit another sequence."""
    from tests.pipeline import tables

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tables.add(Table.open(table.location), [tables._labels(model, 99)], range(99, 100), "train", teacher)
