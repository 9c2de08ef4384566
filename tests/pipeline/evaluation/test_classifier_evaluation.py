"""Evaluation of classifiers: metrics, their standard errors, and the page that shows them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
)
from transformers import AutoModelForSequenceClassification

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.classifier_metrics import compare, compared
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.evaluation.report.classifier_report import verdict
from softlabel.pipeline.objectives import classifier
from softlabel.pipeline.progress import unwatched
from softlabel.pipeline.stream.classifier_batches import LabelledDocuments
from softlabel.pipeline.students.labels import LabelMap
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import StudentError, UsageError
from tests.pipeline.classifiers import CLASSES
from tests.pipeline.training.test_classifier_objective import MERGED, settings, table, teacher  # noqa: F401  fixtures

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["things", "doings"]


@pytest.fixture(scope="module")
def students(table, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("students")
    losses = {"student": {"hard_weight": 0.5}, "control": {"hard_weight": 1.0, "soft_weight": 0.0}}
    for name, loss in losses.items():
        train(settings(table, folder / name, loss=loss, student={"labels": MERGED}, optimizer={"max_steps": 4}))
    return [str(folder / name) for name in losses]


def evaluated(table, students, folder, watch=unwatched, **changes):  # noqa: F811
    config = {"table": table.location, "students": tuple(map(str, students)), "report": str(folder), "device": "cpu"}
    return evaluate(EvaluateConfig(**(config | changes)), watch)


def test_metrics_equal_those_that_scikit_learn_computes(table, students, tmp_path):  # noqa: F811
    report = evaluated(table, students, tmp_path)
    documents = LabelledDocuments.read(table, "eval", LabelMap.of(MERGED, CLASSES))
    known = documents.labels >= 0
    assert report.documents == len(known) > known.sum() > 5
    model = AutoModelForSequenceClassification.from_pretrained(students[0])
    with torch.no_grad():
        logits = [model(torch.tensor(ids)[None].long()).logits[0] for ids in documents.tokens]
    logprobs = torch.stack(logits).log_softmax(1).numpy()
    for score, predicted in ((report.students[0], logprobs), (report.teacher, documents.logprobs)):
        labels, predictions = documents.labels[known], predicted.argmax(1)[known]
        assert score.accuracy == pytest.approx(accuracy_score(labels, predictions))
        macro = {"average": "macro", "zero_division": 0}
        assert score.precision == pytest.approx(precision_score(labels, predictions, **macro))
        assert score.recall == pytest.approx(recall_score(labels, predictions, **macro))
        assert score.f1 == pytest.approx(f1_score(labels, predictions, **macro))
    kl = (np.exp(documents.logprobs) * (documents.logprobs - logprobs)).sum(1).mean()
    assert report.students[0].kl == pytest.approx(kl, rel=1e-4)
    assert report.teacher.kl == pytest.approx(0, abs=1e-6)
    assert report.unmapped == pytest.approx(0, abs=1e-6)


@st.composite
def documents_by_label_and_prediction(draw):
    """Names of labels, the documents' labels, and predictions; some labels never occur or are never predicted."""
    names = [f"label {number}" for number in range(draw(st.integers(1, 6)))]
    label = st.integers(0, len(names) - 1)
    labels, predicted = zip(*draw(st.lists(st.tuples(label, label), min_size=1, max_size=40)), strict=True)
    return names, np.array(labels), np.array(predicted)


@given(documents_by_label_and_prediction())
def test_all_metrics_of_labels_and_predictions_are_those_of_scikit_learn(drawn):
    names, labels, predicted = drawn
    logprobs = np.log(np.where(np.eye(len(names))[predicted] > 0, 0.9, 0.01)).astype(np.float32)
    quality = compare(logprobs, labels, logprobs, names).metrics.quality
    known = {"labels": np.arange(len(names)), "zero_division": 0}
    by_label = np.array([[each.precision, each.recall, each.f1, each.documents] for each in quality.by_label])
    np.testing.assert_allclose(by_label.T, precision_recall_fscore_support(labels, predicted, **known), rtol=1e-12)
    known["labels"] = np.unique(labels)
    macro = precision_recall_fscore_support(labels, predicted, average="macro", **known)[:3]
    np.testing.assert_allclose([quality.precision.mean, quality.recall.mean, quality.f1.mean], macro, rtol=1e-12)
    np.testing.assert_array_equal(quality.confusion, confusion_matrix(labels, predicted, labels=range(len(names))))
    assert quality.accuracy.mean == pytest.approx(accuracy_score(labels, predicted))


def test_the_page_and_the_json_show_all_results(table, students, tmp_path):  # noqa: F811
    report = evaluated(table, students, tmp_path)
    page, content = Path(report.html).read_text(), json.loads(Path(report.json).read_text())
    assert content["labels"] == NAMES
    for name in ("student", "control", "teacher", *NAMES, "Label by label", "Confusion matrix of control"):
        assert name in page
    # Size, scores, calibration, accuracy, KL and loss by step, and a confusion matrix each.
    assert page.count("<svg") == 8
    assert "http" not in page.replace("http://www.w3.org", "")
    confusion = np.array(content["students"][0]["metrics"]["quality"]["confusion"])
    assert confusion.sum() == content["students"][0]["metrics"]["quality"]["documents"]


def test_the_mass_of_classes_without_a_label_is_reported(table, tmp_path):  # noqa: F811
    train(settings(table, tmp_path / "few", student={"labels": ["types", "names"]}, optimizer={"max_steps": 1}))
    report = evaluated(table, [tmp_path / "few"], tmp_path / "report")
    documents = LabelledDocuments.read(table, "eval", LabelMap.of((), CLASSES))
    left_out = np.exp(documents.logprobs[:, [CLASSES.index("expressions"), CLASSES.index("statements")]]).sum(1)
    assert report.unmapped == pytest.approx(left_out.mean(), rel=1e-4)
    assert "of the teacher's probability is on classes that belong to no label" in Path(report.html).read_text()


def test_students_of_different_labels_are_not_compared(table, students, tmp_path):  # noqa: F811
    train(settings(table, tmp_path / "few", student={"labels": ["types", "names"]}, optimizer={"max_steps": 1}))
    with pytest.raises(UsageError, match="different labels"):
        evaluated(table, [*students, tmp_path / "few"], tmp_path / "report")


def test_standard_errors_match_the_spread_over_new_samples_of_documents():
    rng, qualities, scores = np.random.default_rng(1), [], []
    for draw in range(300):
        labels = rng.integers(0, 3, 200)
        predicted = np.where(rng.random(200) < 0.7, labels, rng.integers(0, 3, 200))
        scores.append(f1_score(labels, predicted, average="macro"))
        if draw < 5:
            logprobs = np.log(np.eye(3, dtype=np.float32)[predicted] * 0.9 + 0.033)
            qualities.append(compare(logprobs, labels, logprobs, list("abc")).metrics.quality)
    for quality in qualities:
        assert quality.f1.error == pytest.approx(np.std(scores), rel=0.25)
        accuracy = quality.accuracy.mean
        assert quality.accuracy.error == pytest.approx(np.sqrt(accuracy * (1 - accuracy) / 199), rel=1e-6)


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        (280, "It can't be told which is more accurate, a (70.0%) or b (69.8%): they differ by 0.2 ± "),
        (320, "a is the most accurate: 80.0% of the documents; b is next with 69.8%. The difference is real: 10.2 ± "),
    ],
)
def test_the_better_student_is_named_only_if_the_difference_is_significant(right, expected):
    labels, rng = np.arange(400) % 2, np.random.default_rng(0)
    order = {"a": rng.permutation(400), "b": rng.permutation(400)}
    rights = {"b": 279, "a": right}
    measured = {}
    for name, number in rights.items():
        guesses = np.where(order[name] < number, labels, 1 - labels)
        logprobs = np.log(np.eye(2, dtype=np.float32)[guesses] * 0.8 + 0.1)
        measured[name] = compare(logprobs, labels, logprobs, NAMES)
    students = [SimpleNamespace(name=name, metrics=each.metrics) for name, each in measured.items()]
    pairs = compared(list(measured), list(measured.values()))
    assert verdict(SimpleNamespace(students=students, comparisons=pairs)).startswith(expected)


def test_students_are_compared_over_the_same_documents():
    """What is hard for both students does not blur their difference."""
    labels = np.zeros(300, np.int64)
    logprobs = np.log(np.random.default_rng(0).dirichlet([1, 1], 300)).astype(np.float32)
    better = logprobs.copy()
    better[:40] = np.log([0.9, 0.1])  # right where the other one mostly is not
    [pair] = compared(["a", "b"], [compare(each, labels, logprobs, NAMES) for each in (better, logprobs)])
    single = compare(logprobs, labels, logprobs, NAMES).metrics.quality.accuracy
    assert pair.accuracy.is_real
    assert pair.accuracy.error < 0.6 * single.error


def test_calibration_compares_confidence_with_labels_and_teacher():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 5000)
    labels = (rng.random(5000) > confidence).astype(np.int64)  # label 0 as often as predicted
    logprobs = np.log(np.stack([confidence, 1 - confidence], 1)).astype(np.float32)
    sure = np.log(np.stack([np.full(5000, 0.999), np.full(5000, 0.001)], 1)).astype(np.float32)
    found = compare(logprobs, labels, logprobs, NAMES).metrics.calibration
    assert found.ece.mean < 0.03
    assert found.ece_to_teacher.mean == pytest.approx(0, abs=1e-6)
    assert sum(each.positions for each in found.bins) == 5000
    overconfident = compare(sure, labels, logprobs, NAMES).metrics.calibration
    assert overconfident.ece.mean == pytest.approx(0.999 - (labels == 0).mean(), abs=1e-6)
    assert (
        overconfident.ece_to_teacher.interval[0] < 0.999 - confidence.mean() < overconfident.ece_to_teacher.interval[1]
    )


def test_without_labels_students_are_only_compared_with_their_teacher():
    logprobs = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    metrics = compare(logprobs, np.array([-1, -1]), logprobs, NAMES).metrics
    assert metrics.quality is None
    assert metrics.kl.mean == pytest.approx(0, abs=1e-7)


def test_results_are_shown_by_a_column(table, students, tmp_path):  # noqa: F811
    report = evaluated(table, students, tmp_path, by=("label",))
    content = json.loads(Path(report.json).read_text())
    for metrics in (content["teacher"]["metrics"], content["students"][0]["metrics"]):
        groups = {group["name"]: group for group in metrics["by_column"]["label"]}
        assert set(groups) == {*CLASSES, "(none)"}
        assert groups["(none)"]["quality"] is None
        assert sum(group["documents"] for group in groups.values()) == metrics["documents"] == report.documents
        kl = sum(group["documents"] * group["kl"]["mean"] for group in groups.values()) / report.documents
        assert kl == pytest.approx(metrics["kl"]["mean"], abs=1e-6)
    confusion = np.array(content["students"][0]["metrics"]["quality"]["confusion"])
    doings = [groups[name]["quality"] for name in ("expressions", "statements")]
    right = sum(each["accuracy"]["mean"] * each["documents"] for each in doings)
    assert right == pytest.approx(confusion[1, 1])
    page = Path(report.html).read_text()
    assert "By label" in page
    assert page.count("<svg") == 9
    with pytest.raises(UsageError, match="no such column"):
        evaluated(table, students, tmp_path, by=("source",))


def test_an_interrupted_evaluation_goes_on_where_it_was(table, students, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(classifier, "PART_TOKENS", 1)

    def dies(progress):
        if progress.stage.endswith("control") and progress.done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(table, students, tmp_path / "cut", dies, batch_tokens=100)
    seen = []
    resumed = evaluated(table, students, tmp_path / "cut", seen.append, batch_tokens=100)
    assert [each.done for each in seen if each.stage.endswith("student")] == [resumed.documents]
    assert min(each.done for each in seen if each.stage.endswith("control")) > 0
    fresh = evaluated(table, students, tmp_path / "fresh", batch_tokens=100)
    assert (resumed.students, resumed.verdict) == (fresh.students, fresh.verdict)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["report.html", "report.json"]


def test_a_student_whose_predictions_are_not_numbers_is_named(table, students, tmp_path):  # noqa: F811
    shutil.copytree(students[0], tmp_path / "broken")
    model = AutoModelForSequenceClassification.from_pretrained(students[0])
    model.classifier.weight.data.fill_(3e38)  # finite, but its products are not
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(StudentError, match=r"not numbers(.|\n)*broken(.|\n)*what to do"):
        evaluated(table, [students[1], tmp_path / "broken"], tmp_path / "report")


def test_hostile_names_are_escaped_in_the_page(table, students, tmp_path):  # noqa: F811
    """Also in the descriptions of drawings, which are attributes."""
    name = 'a"><script>alert(1)<'
    shutil.copytree(students[0], tmp_path / name)
    page = Path(evaluated(table, [students[1], tmp_path / name], tmp_path / "report", by=("label",)).html).read_text()
    assert "<script" not in page
    assert "a&quot;&gt;&lt;script&gt;" in page
