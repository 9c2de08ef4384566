"""Training: the student does not depend on micro-batches, ranks and interruptions; unusable settings are refused."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FalconConfig, Gemma2Config, GraniteConfig, LlamaConfig

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import LossConfig, StreamConfig, StudentConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.loss.targets import TokenIds, decode_targets
from softlabel.pipeline.objectives import language_model
from softlabel.pipeline.objectives.language_model import Distillation
from softlabel.pipeline.stream.dataset import SoftLabelDataset
from softlabel.pipeline.students import build as student
from softlabel.pipeline.training import train as training
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import IntegrityError, StudentError, TableError, TrainingError, UsageError
from softlabel.storage.records.versions import pins
from softlabel.storage.table import Table
from tests.pipeline import captured as tables
from tests.pipeline import dense
from tests.pipeline.building import built
from tests.pipeline.captured import make_table
from tests.pipeline.trainings import STREAM, curve, history, settings

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_finished_student_has_its_record_and_leaves_no_run_folder(uninterrupted, table):
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
    built(StudentConfig(model=str(folder)), table)
    assert (str(folder), table.version) in {(pin.student, pin.version) for pin in pins(table.location)}


def test_a_read_only_table_is_trained_from_with_a_warning(table, tmp_path, monkeypatch):
    def refuse(*_):
        raise TableError("can't be written")

    monkeypatch.setattr(training, "pin", refuse)
    with pytest.warns(UserWarning, match="a later vacuum may delete it"):
        assert train(settings(table, tmp_path / "student", optimizer={"max_steps": 1})).steps == 1


def test_training_and_evaluation_losses_are_on_the_same_scale(uninterrupted):
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
    # Both are means over positions: before the first step, training and evaluation see the same student.
    assert evaluated[0]["eval_kl"] == pytest.approx(steps[0]["soft"], rel=0.1)
    assert evaluated[-1]["eval_kl"] == uninterrupted.metrics["eval_kl"] < evaluated[0]["eval_kl"]


def test_each_epoch_trains_on_each_position_once(uninterrupted, table):
    positions = table.scan().filter(split="train").select("positions").sum().collect().item()
    assert uninterrupted.positions == 3 * positions


def gradients_of(table, ranks, **stream):
    """Loss and gradients of one step, over all ranks."""
    model = built(StudentConfig(layers=(1,)), table).double()
    module = Distillation(model, table, LossConfig(hard_weight=0.3), None)
    stream, total = StreamConfig(**{**STREAM, **stream}), 0.0
    for rank in range(ranks):
        for batch in SoftLabelDataset(table, stream, rank=rank, world_size=ranks, max_steps=1):
            loss, _ = module(batch)
            loss.backward()
            total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("batch_size", "others"),
    [(8, [(1, 1, True), (2, 1, True), (3, 2, True), (8, 2, True)]), (40, [(3, 2, False), (8, 1, False)])],
)
def test_gradients_do_not_depend_on_micro_batches_ranks_or_packing(batch_size, others, table):
    """A step of 40 rows has all of the table's sequences, packed or not."""
    loss, gradients = gradients_of(table, 1, micro_batch_size=8, batch_size=batch_size)
    for micro_batch_size, ranks, packing in others:
        other_loss, others = gradients_of(
            table, ranks, micro_batch_size=micro_batch_size, packing=packing, batch_size=batch_size
        )
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-7 * gradient.abs().max().item())


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16, "initializer_range": 0.3}
LIKE = {"vocab_size": 576, "num_hidden_layers": 1, "num_key_value_heads": 1, "tie_word_embeddings": False, **SIZES}


@pytest.mark.parametrize(
    "config",
    [Gemma2Config(final_logit_softcapping=1.5, **LIKE), GraniteConfig(logits_scaling=8.0, **LIKE), LlamaConfig(**LIKE)],
)
def test_the_loss_is_that_of_the_models_own_logits(config, table):
    """With soft cap, scale, bias and padding rows, the loss is that of the logits that the model returns."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(LIKE["vocab_size"]))
    loss = LossConfig(hard_weight=0.5, target="bucket")
    stream = StreamConfig(**{**STREAM, "micro_batch_size": STREAM["batch_size"]})
    (batch,) = SoftLabelDataset(table, stream, max_steps=1)
    logits = model(**batch.inputs).logits.flatten(0, 1)[batch.positions]
    targets = decode_targets(batch.targets, TokenIds(table.numbering), table.temperatures, loss)
    identity = torch.eye(LIKE["vocab_size"])
    expected = dense.reference(logits, identity, batch.next_ids, targets, loss, size=table.identity.vocabulary)
    found, _ = Distillation(model, table, loss, None)(batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_the_student_does_not_depend_on_the_micro_batch_size(micro_batch_size, uninterrupted, table, tmp_path):
    train(settings(table, tmp_path / "student", stream={"micro_batch_size": micro_batch_size}))
    for entry, other in zip(history(uninterrupted.output), history(tmp_path / "student"), strict=True):
        assert other == pytest.approx(entry, rel=1e-4)
    # Adam would hide a common factor of all gradients.
    norms = dict(curve(uninterrupted.output, "grad_norm"))
    assert dict(curve(tmp_path / "student", "grad_norm")) == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize(("step", "checkpoint"), [(10, "checkpoint-8"), (2, "(none was written yet)")])
def test_a_nan_loss_stops_the_run_and_never_reaches_a_checkpoint(step, checkpoint, table, tmp_path, monkeypatch):
    loss = language_model.distillation_loss
    steps = [0]

    def broken(*arguments, **named):
        steps[0] += 1
        whole = loss(*arguments, **named)
        return type(whole)(whole.total * float("nan"), whole.hard, whole.soft, 1) if steps[0] == step else whole

    monkeypatch.setattr(language_model, "distillation_loss", broken)
    config = settings(table, tmp_path / "student", stream={"micro_batch_size": 8})
    with pytest.raises(TrainingError) as error:
        train(config)
    for text in ("the last good checkpoint is", f"step {step} of 12", "optimizer.learning_rate"):
        assert text in str(error.value)
    assert str(error.value).endswith(checkpoint)
    assert not (tmp_path / "student").exists()
    monkeypatch.undo()
    for weights in (tmp_path / "student.training").glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


def test_nan_weights_are_saved_neither_as_checkpoint_nor_as_student(table, tiny_teacher, tmp_path, monkeypatch):
    def broken(optimizer, *arguments, **named):
        update(optimizer, *arguments, **named)
        steps.append(1)
        if len(steps) == 8:
            optimizer.param_groups[0]["params"][0].data[0] = float("nan")

    update, steps = torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(TrainingError, match=r"(?s)NaN or infinite weights.*step 8 of 12.*checkpoint-4\Z"):
        train(settings(table, tmp_path / "student"))
    assert [folder.name for folder in (tmp_path / "student.training").glob("checkpoint-*")] == ["checkpoint-4"]
    monkeypatch.undo()

    fast = {"max_steps": 1, "learning_rate": 1e39}
    with pytest.raises(TrainingError, match=r"(?s)eval_kl nan.*step 1 of 1.*none was written yet"):
        train(settings(table, tmp_path / "fast", optimizer=fast))
    unmeasured = make_table(tmp_path / "table", tiny_teacher, train=4, held_out=0)
    with pytest.raises(TrainingError, match=r"(?s)NaN or infinite weights.*step 1 of 1"):
        train(settings(unmeasured, tmp_path / "fast", optimizer=fast))
    assert not list(tmp_path.glob("fast/*"))


def test_a_student_whose_packed_sequences_see_each_other_is_refused(table, tmp_path):
    FalconConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    changes = {"student": {"layers": None, "config": str(tmp_path)}, "optimizer": {"max_steps": 3}}
    with pytest.raises(StudentError, match=r"set stream\.packing false"):
        train(settings(table, tmp_path / "student", **changes))
    report = train(settings(table, tmp_path / "student", **changes, stream={"packing": False}))
    place, students = str(tmp_path / "report"), (str(tmp_path / "student"),)
    measured = evaluate(EvaluateConfig(table=table.location, students=students, report=place, device="cpu"))
    assert measured.students[0].kl == pytest.approx(report.metrics["eval_kl"], rel=1e-5)


def test_damaged_soft_labels_stop_training(table, tmp_path):
    shutil.copytree(table.location, tmp_path / "table")
    own = Table.open(str(tmp_path / "table"))
    for shard in own.shards("train"):
        file = tmp_path / "table" / shard.path
        pq.write_table(pq.ParquetFile(file).read().drop_columns(["head_ids", "tail_ids"]), file)
    with pytest.raises(IntegrityError, match="damaged"):
        train(settings(own, tmp_path / "student", loss={"hard_weight": 1.0}))
    assert not (tmp_path / "student").exists()


def test_a_student_can_be_trained_on_hard_labels_only(table, tmp_path):
    report = train(settings(table, tmp_path / "control", loss={"hard_weight": 1.0, "soft_weight": 0.0}))
    for entry in history(tmp_path / "control"):
        if "loss" in entry:
            assert entry["soft"] == 0
            assert entry["loss"] == pytest.approx(entry["hard"], rel=1e-5)
    assert set(report.metrics) == {"eval_kl", "eval_cross_entropy", "eval_agreement"}


def test_loss_weights_change_linearly_over_the_steps(table, tmp_path):
    loss = {"hard_weight": 0.5, "hard_weight_end": 0.0, "soft_weight_end": 2.0}
    config = settings(table, tmp_path / "student", loss=loss, optimizer={"max_steps": 5})
    train(config)
    steps = [entry for entry in history(tmp_path / "student") if "loss" in entry]
    for entry, hard, soft in zip(steps, (0.5, 0.375, 0.25, 0.125, 0.0), (1.0, 1.25, 1.5, 1.75, 2.0), strict=True):
        assert entry["loss"] == pytest.approx(hard * entry["hard"] + soft * entry["soft"], rel=1e-5)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "loss: (0.5 to 0) × cross-entropy + (1 to 2) × forward KL" in card


def test_loss_weights_that_are_both_zero_at_the_last_step_are_refused():
    with pytest.raises(
        ValidationError,
        match="both 0 at the last step, so nothing would be learned; set hard_weight_end",
    ):
        LossConfig(hard_weight=0.0, soft_weight_end=0.0)


def test_bfloat16_and_gradient_checkpointing_train_a_similar_student(uninterrupted, table, tmp_path):
    train(settings(table, tmp_path / "student", optimizer={"bf16": True, "gradient_checkpointing": True}))
    expected, found = history(uninterrupted.output), history(tmp_path / "student")
    assert found[-1]["eval_kl"] == pytest.approx(expected[-1]["eval_kl"], rel=0.05)


def test_without_an_eval_split_only_runs_that_need_one_are_refused(tiny_teacher, tmp_path):
    own = make_table(tmp_path / "table", tiny_teacher, train=8, held_out=0)
    with pytest.warns(UserWarning, match="nothing is held out in version"):
        report = train(settings(own, tmp_path / "student", optimizer={"max_steps": 2}))
    assert report.steps == 2
    assert report.metrics == {}
    for depends in ({"early_stopping_patience": 1}, {"keep": "best"}):
        with pytest.raises(UsageError, match="need an eval split"):
            train(settings(own, tmp_path / "other", optimizer=depends))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": {"layers": None}}, UsageError, "exactly one setting"),
        ({"student": {"layers": None, "model": "nowhere"}}, StudentError, "nowhere"),
        ({"loss": {"temperature": 2.0}}, UsageError, "temperature"),
        ({"stream": {"max_length": 16}}, UsageError, "max_length"),
        ({"optimizer": {"device": "cuda:7"}}, UsageError, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_refused_training_writes_nothing(changes, error, message, table, tmp_path):
    with pytest.raises(error, match=message):
        train(settings(table, tmp_path / "student", **changes))
    assert not list(tmp_path.iterdir())


def test_one_train_sequence_is_enough_and_none_is_refused(tiny_teacher, tmp_path):
    one = make_table(tmp_path / "one", tiny_teacher, train=1, held_out=1)
    report = train(settings(one, tmp_path / "student"))
    assert (report.steps, report.positions) == (3, 3 * (len(tables._ids(0)) - 1))
    none = make_table(tmp_path / "none", tiny_teacher, train=0, held_out=1)
    with pytest.raises(UsageError, match="no train sequences"):
        train(settings(none, tmp_path / "nobody"))
    assert not (tmp_path / "nobody").exists()


def test_each_version_of_a_growing_table_gets_a_student_of_its_own(tiny_teacher, tmp_path):
    table = make_table(tmp_path / "table", tiny_teacher, train=20, held_out=0)
    config = settings(table, tmp_path / "students" / "{version}", optimizer={"max_steps": 1})
    first = train(config)
    assert first.output == str(tmp_path / "students" / str(table.version))
    assert train(config).steps_trained == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    tables.add(table, [tables._labels(model, 100)], range(100, 101), "train", tiny_teacher)
    grown = table.newest()
    second = train(config)
    assert second.output == str(tmp_path / "students" / str(grown.version))
    assert (second.steps_trained, second.table) == (1, f"{table.location}@{grown.version}")
    assert train(config.model_copy(update={"table": f"{table.location}@{table.version}"})).output == first.output
