"""Classifiers as students: loss, order of the documents, other label sets, and complete training runs."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModel, AutoModelForSequenceClassification

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.tables import ReprocessConfig
from softlabel.pipeline.config.train import LossConfig, StreamConfig, StudentConfig, TrainConfig
from softlabel.pipeline.objectives import classifier as class_student
from softlabel.pipeline.objectives.classifier import Classification
from softlabel.pipeline.objectives.decide import objective_of
from softlabel.pipeline.stream.classifier_batches import ClassDataset, LabelledDocuments
from softlabel.pipeline.students.labels import LabelMap
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.tables.reprocess import reprocess
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import StudentError, UsageError
from softlabel.storage.table import Table
from tests.conftest import topics
from tests.pipeline.building import built
from tests.pipeline.classifiers import CLASSES, save_classifier
from tests.pipeline.damages import DAMAGES, damaged
from tests.pipeline.trainings import interrupt_at, weights

pytestmark = pytest.mark.usefixtures("one_thread")

MERGED = ("things=types,names", "doings=expressions,statements")
STREAM = StreamConfig(batch_size=8, micro_batch_size=3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_teacher):
    return save_classifier(tmp_path_factory.mktemp("class_training") / "teacher", tiny_teacher)


@pytest.fixture(scope="module")
def table(teacher, tmp_path_factory):
    """Documents that begin with the name of their class; every tenth has no label."""
    folder = tmp_path_factory.mktemp("class_training")
    texts = [text[:80] for text in topics().values() if len(text) > 100][:70]
    rows = [
        {"id": str(i), "text": f"{CLASSES[i % 4]} {text}", "label": None if i % 10 == 9 else CLASSES[i % 4]}
        for i, text in enumerate(texts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "documents.parquet")
    settings = {
        "documents": str(folder / "documents.parquet"),
        "table": str(folder / "table"),
        "teacher": {"model": str(teacher), "dtype": "float32", "device": "cpu"},
        "columns": {"label": "label"},
        "shards": {"eval_fraction": 0.2},
    }
    return Table.open(capture(CaptureConfig.model_validate(settings)).table)


def settings(table, output, **changes):
    groups = {
        "student": {"layers": (1,)},
        "loss": {"hard_weight": 0.5, "temperature": 2.0},
        "stream": {"batch_size": 8, "micro_batch_size": 8},
        "optimizer": {"max_steps": 12, "eval_steps": 6, "learning_rate": 3e-3, "device": "cpu"},
    }
    changed = {name: {**values, **changes.get(name, {})} for name, values in groups.items()}
    return TrainConfig.model_validate({"table": table.location, "output": str(output), **changed})


@pytest.mark.parametrize("labels", [(), MERGED, ("types", "names")])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_equals_the_textbook_formula(labels, temperature, table):
    config = LossConfig(hard_weight=0.5, soft_weight=2.0, temperature=temperature)
    student = built(StudentConfig(layers=(0,), labels=labels), table).double().eval()
    documents = LabelledDocuments.read(table, "train", LabelMap.of(labels, CLASSES))
    batch = documents.batch(range(16), student.config.pad_token_id, 20)
    total, _ = Classification(student, config)(batch)
    total.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    logits = student(**batch.inputs).logits
    soft = torch.softmax(batch.logprobs.double() / temperature, 1)
    divergence = kl_div((logits / temperature).log_softmax(1), soft, reduction="sum") * temperature**2
    expected = (0.5 * cross_entropy(logits, batch.labels, ignore_index=-1, reduction="sum") + 2.0 * divergence) / 20
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "total_variation"])
def test_every_divergence_has_finite_gradients(divergence, table):
    student = built(StudentConfig(layers=(0,)), table)
    documents = LabelledDocuments.read(table, "train", LabelMap.of((), CLASSES))
    documents.logprobs[0] = torch.tensor([0.0, *[-torch.inf] * 3])
    documents.logprobs[1] = torch.nan  # a document whose classes are all left out
    batch = documents.batch(range(4), student.config.pad_token_id, 4)
    total, parts = Classification(student, LossConfig(divergence=divergence))(batch)
    total.backward()
    assert parts[1] > 0
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_gradients_do_not_depend_on_the_micro_batches_or_ranks(table):
    documents, found = LabelledDocuments.read(table, "train", LabelMap.of(MERGED, CLASSES)), {}
    for micro_batch_size, ranks in ((1, 1), (3, 1), (8, 1), (3, 2), (4, 3)):
        torch.manual_seed(0)
        student = built(StudentConfig(layers=(1,), labels=MERGED), table).double().eval()
        module = Classification(student, LossConfig(hard_weight=0.3))
        stream = StreamConfig(batch_size=8, micro_batch_size=micro_batch_size)
        for rank in range(ranks):
            pad = student.config.pad_token_id
            for batch in ClassDataset(documents, stream, pad, rank=rank, world_size=ranks, max_steps=1):
                module(batch)[0].backward()
        found[micro_batch_size, ranks] = {name: p.grad for name, p in student.named_parameters()}
    expected = found.pop((8, 1))
    for gradients in found.values():
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_documents_come_once_per_epoch_also_after_a_restart(table):
    documents = LabelledDocuments.read(table, "train", LabelMap.of((), CLASSES))
    count = len(documents.tokens)

    def seen(**more):
        dataset = ClassDataset(documents, STREAM, 0, epochs=2, **more)
        return [row.tobytes() for batch in dataset for row in batch.logprobs.numpy()]

    whole, per_epoch = seen(), -(-count // 8)
    assert Counter(whole) == Counter([row.tobytes() for row in documents.logprobs] * 2)
    assert whole[:count] != whole[count:]
    assert Counter(seen(rank=0, world_size=2) + seen(rank=1, world_size=2)) == Counter(whole)
    state = ClassDataset(documents, STREAM, 0, epochs=2).state
    for step in (1, per_epoch, per_epoch + 2):
        cursor = state(step)
        assert (cursor.step, cursor.epoch) == (step, (step - 1) // per_epoch)
        assert seen(start=cursor) == whole[cursor.epoch * count + cursor.packs :]


def test_a_student_of_merged_labels_learns_them(table, tmp_path):
    report = train(settings(table, tmp_path / "student", student={"labels": MERGED}))
    assert (report.steps, set(report.metrics)) == (12, {"eval_kl", "eval_agreement", "eval_accuracy", "eval_f1"})
    record = json.loads((tmp_path / "student" / "softlabel.json").read_text())
    curve = [entry["eval_kl"] for entry in record["history"] if "eval_kl" in entry]
    assert curve[-1] < curve[0]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert model.config.id2label == {0: "things", 1: "doings"}
    assert "text-classification" in (tmp_path / "student" / "README.md").read_text()
    again = train(settings(table, tmp_path / "student", student={"labels": MERGED}))
    assert again.steps_trained == 0


def test_some_of_the_held_out_documents_are_evaluated_during_training(table, tmp_path, monkeypatch):
    monkeypatch.setattr(class_student, "EVAL_TOKENS", 200)
    monkeypatch.setattr(class_student, "EVAL_BATCHES", 2)
    student = built(StudentConfig(layers=(0,)), table)
    objective = objective_of(Origin.of(table))
    measured = objective.trainable(settings(table, tmp_path), table, student, None).evaluation
    held = LabelledDocuments.read(table, "eval", LabelMap.of((), CLASSES))
    expected = list(held.batches(student.config.pad_token_id, 200))
    assert len(expected) > len(measured) == 2
    for batch, other in zip(measured, expected[:2], strict=True):
        assert torch.equal(batch.input_ids, other.input_ids)
    # On the same scale as the loss: a mean over documents.
    module = Classification(student.eval(), LossConfig())
    parts = [module(batch)[1][1] * len(batch.labels) for batch in measured]
    mean = float(sum(parts)) / sum(len(batch.labels) for batch in measured)
    assert module.measured(measured)["eval_kl"] == pytest.approx(mean, rel=1e-3)


def test_an_interrupted_training_resumes_bit_for_bit(table, tmp_path):
    optimizer = {"save_steps": 4}
    train(settings(table, tmp_path / "whole", optimizer=optimizer))
    with pytest.raises(KeyboardInterrupt):
        train(settings(table, tmp_path / "student", optimizer=optimizer), interrupt_at(9))
    assert train(settings(table, tmp_path / "student", optimizer=optimizer)).resumed_from == 8
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "student").items():
        assert torch.equal(tensor, expected[name]), name


def test_a_finished_classifier_that_gets_more_steps_equals_one_trained_in_a_single_run(table, tmp_path):
    steady = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "save_steps": 50}
    for name, steps in (("whole", (14,)), ("student", (5, 14))):
        for number in steps:
            report = train(settings(table, tmp_path / name, optimizer={**steady, "max_steps": number}))
    assert (report.steps, report.resumed_from) == (14, 5)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "student").items():
        assert torch.equal(tensor, expected[name]), name


def test_a_head_for_the_same_labels_is_kept_and_another_is_reset(table, teacher):
    head = load_file(teacher / "model.safetensors")["classifier.weight"]
    same = built(StudentConfig(model=str(teacher)), table)
    assert torch.equal(same.classifier.weight, head)
    order = built(StudentConfig(model=str(teacher), labels=CLASSES[::-1]), table)
    assert order.classifier.weight.shape == head.shape
    assert not torch.equal(order.classifier.weight, head)
    assert torch.equal(order.bert.encoder.layer[0].output.dense.weight, same.bert.encoder.layer[0].output.dense.weight)


def test_a_head_is_recognized_by_label_ids_and_architecture(table, teacher, tmp_path):
    """Not by the order of names in the file, nor only by names, which a model without a head has, too."""
    shutil.copytree(teacher, tmp_path / "reversed")
    config = json.loads((teacher / "config.json").read_text())
    config["id2label"] = dict(reversed(config["id2label"].items()))
    (tmp_path / "reversed" / "config.json").write_text(json.dumps(config))
    kept = built(StudentConfig(model=str(tmp_path / "reversed")), table)
    assert torch.equal(kept.classifier.weight, load_file(teacher / "model.safetensors")["classifier.weight"])

    shutil.copytree(teacher, tmp_path / "body")
    AutoModel.from_pretrained(teacher).save_pretrained(tmp_path / "body")
    body = built(StudentConfig(model=str(tmp_path / "body")), table)
    assert tuple(body.config.id2label.values()) == CLASSES
    assert torch.equal(body.bert.pooler.dense.weight, kept.bert.pooler.dense.weight)


def test_a_student_from_a_configuration_or_of_another_architecture(table, tiny_teacher, tmp_path):
    llama = save_classifier(tmp_path / "llama", tiny_teacher, kind="llama")
    train(settings(table, tmp_path / "student", student={"layers": None, "config": str(llama)}))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert tuple(model.config.id2label.values()) == CLASSES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": {"max_k": 2}}, "stream.max_k: 2"),
        ({"loss": {"target": "bucket"}}, "loss.target: bucket"),
        ({"student": {"labels": ["types"]}}, "at least two labels"),
    ],
)
def test_settings_that_do_not_fit_classifiers_are_refused(changes, message, table, tmp_path):
    with pytest.raises(UsageError, match=message):
        train(settings(table, tmp_path / "student", **changes))
    assert not list(Path(tmp_path).iterdir())


def test_a_loss_to_which_no_document_contributes_is_refused(table, tmp_path):
    unlabelled = reprocess(
        ReprocessConfig(source=table.location, destination=str(tmp_path / "table"), where="label is null")
    )
    with pytest.raises(UsageError, match=r"none with one of the student's labels \(loss.hard_weight\)"):
        train(settings(Table.open(unlabelled.table), tmp_path / "student"))
    documents = LabelledDocuments.read(table, "train", LabelMap.of((), CLASSES))
    silent = replace(documents, logprobs=np.full_like(documents.logprobs, np.nan))
    with pytest.raises(
        UsageError, match=r"none with a teacher's probability for the student's labels \(loss.soft_weight\)"
    ):
        class_student._require_targets(LossConfig(), silent, table)


def test_a_student_with_too_few_positions_or_ids_is_refused(table, tiny_teacher, tmp_path):
    short = save_classifier(tmp_path / "short", tiny_teacher, max_position_embeddings=16)
    with pytest.raises(StudentError, match="the table's sequences are longer than the student can read"):
        built(StudentConfig(model=str(short)), table)
    small = save_classifier(tmp_path / "small", tiny_teacher, vocab_size=400)
    with pytest.raises(StudentError, match="at least 500 rows"):
        built(StudentConfig(model=str(small)), table)


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_weights_are_refused(damage, message, table, teacher, tmp_path):
    damaged(teacher, tmp_path / "model", damage)
    for labels in ((), MERGED):  # with the head kept, and with a new one
        with pytest.raises(StudentError, match=message):
            built(StudentConfig(model=str(tmp_path / "model"), labels=labels), table)
