"""Classifiers as teachers: their probabilities are stored once per document; unsuitable ones are refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.tables import ReprocessConfig
from softlabel.pipeline.tables.reprocess import reprocess
from softlabel.storage.codec import decode
from softlabel.storage.errors import ProvenanceError, TeacherError, UsageError
from softlabel.storage.reader import batches
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import inspect
from softlabel.storage.upkeep.verification import verify
from tests.pipeline.classifiers import CLASSES, save_classifier, save_documents

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tiny_teacher):
    return save_classifier(tmp_path_factory.mktemp("classes") / "bert", tiny_teacher)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return save_documents(tmp_path_factory.mktemp("classes") / "documents.parquet")


def config(documents, table, model, **changes):
    settings = {
        "documents": str(documents),
        "table": str(table),
        "teacher": {"model": str(model), "dtype": "float32", "device": "cpu", "batch_tokens": 512},
        "columns": {"label": "label", "carry": ["source"]},
        "shards": {"eval_fraction": 0.2},
    }
    for name, values in changes.items():
        settings[name] = {**settings[name], **values} if isinstance(settings.get(name), dict) else values
    return CaptureConfig.model_validate(settings)


@pytest.fixture(scope="module")
def captured(classifier, documents, tmp_path_factory):
    table = tmp_path_factory.mktemp("classes") / "table"
    return capture(config(documents, table, classifier))


def answers(location) -> dict[str, tuple[dict[str, object], np.ndarray, float]]:
    """By document: its row, its distribution over the classes, and the log-probability of its label."""
    table, found = Table.open(str(location)), {}
    for _, rows in batches(table, [n for n in table.schema.names if n != "split"]):
        labels = decode(rows, table.numbering)
        probabilities = np.zeros((len(rows), table.identity.vocabulary))
        places = np.repeat(np.arange(len(rows)), labels.head_counts)
        probabilities[places, labels.head_ids] = np.exp(labels.head_logprobs)
        plain = rows.select([n for n in rows.column_names if n not in SOFT_LABELS.names]).to_pylist()
        for row, distribution, next_logprob in zip(plain, probabilities, labels.next_logprobs, strict=True):
            found[row["document_id"]] = row, distribution, float(next_logprob)
    return found


def transformers_probabilities(folder: Path, texts) -> np.ndarray:
    """The classifier's probabilities for each text, one by one, with plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        inputs = [tokenizer(text, truncation=True, split_special_tokens=True, return_tensors="pt") for text in texts]
        return torch.cat([model(**i).logits for i in inputs]).softmax(1).numpy()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_classifiers_own_probabilities_are_stored(kind, classifier, documents, captured, tiny_teacher, tmp_path):
    folder, table = classifier, captured.table
    if kind == "llama":
        folder = save_classifier(tmp_path / "llama", tiny_teacher, kind=kind)
        table = capture(config(documents, tmp_path / "table", folder)).table
    found, rows = answers(table), pq.read_table(documents).to_pylist()
    expected = transformers_probabilities(folder, [row["text"] for row in rows])
    assert len(found) == len(rows)
    for row, probabilities in zip(rows, expected, strict=True):
        stored, distribution, next_logprob = found[row["id"]]
        np.testing.assert_allclose(np.log(distribution), np.log(probabilities), atol=1 / 64)
        assert distribution.sum() == pytest.approx(1, abs=1e-6)
        assert (stored["label"], stored["source"]) == (row["label"], "manual")
        if row["label"] in CLASSES:
            assert next_logprob == pytest.approx(np.log(probabilities[CLASSES.index(row["label"])]), abs=1e-3)
        else:
            assert np.isnan(next_logprob)


def test_each_document_is_one_row(captured, documents, classifier):
    assert (captured.documents, captured.sequences, captured.positions) == (60, 60, 60)
    assert captured.truncated == sum(row["tokens"] == 128 for row, _, _ in answers(captured.table).values()) > 0
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    texts = {row["id"]: row["text"] for row in pq.read_table(documents).to_pylist()}
    for name, (row, _, _) in answers(captured.table).items():
        assert row["chunks"] == row["positions"] == 1
        assert row["loss_mask"] == [False] * (row["tokens"] - 1) + [True]
        assert row["token_ids"] == tokenizer(texts[name], truncation=True, split_special_tokens=True).input_ids
    identity = Table.open(captured.table).identity
    assert identity.classes == CLASSES
    assert (identity.vocabulary, identity.sequences.max_tokens) == (len(CLASSES), 128)


def test_other_verbs_work_on_a_table_of_a_classifier(captured, documents, classifier, tmp_path):
    again = capture(config(documents, captured.table, classifier))
    assert (again.sequences, again.copied, again.unchanged, again.version) == (0, 0, 60, captured.version)
    assert verify(Table.open(captured.table)).rows == 60
    assert inspect(Table.open(captured.table)).soft_label_bytes_per_position > 0
    smaller = reprocess(
        ReprocessConfig(source=captured.table, destination=str(tmp_path / "smaller"), where="label = 'names'")
    )
    rows = answers(smaller.table)
    assert 0 < len(rows) < 60
    assert {row["label"] for row, _, _ in rows.values()} == {"names"}
    with pytest.raises(UsageError, match="can't be narrowed"):
        reprocess(
            ReprocessConfig.model_validate(
                {"source": captured.table, "destination": str(tmp_path / "narrow"), "selection": {"max_k": 2}}
            )
        )


def test_a_classifier_that_counts_positions_after_its_padding_is_captured(documents, tiny_teacher, tmp_path):
    """As RoBERTa does; a tokenizer without a limit of its own leaves it to the model's positions."""
    folder = save_classifier(tmp_path / "roberta", tiny_teacher)
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=None)
    tokenizer.save_pretrained(folder)
    settings = BertConfig.from_pretrained(folder).to_dict() | {"max_position_embeddings": 66, "pad_token_id": 3}
    RobertaForSequenceClassification(RobertaConfig(**settings)).save_pretrained(folder)
    report = capture(config(documents, tmp_path / "table", folder))
    assert Table.open(report.table).identity.sequences.max_tokens == 66 - 3 - 1
    assert max(row["tokens"] for row, _, _ in answers(report.table).values()) == 66 - 3 - 1


def test_the_same_text_under_two_labels_keeps_both(classifier, tmp_path):
    rows = [{"id": name, "text": "the same text", "label": name} for name in CLASSES[:2]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "documents.parquet")
    settings = {"columns": {"label": "label", "carry": []}}
    table = capture(config(tmp_path / "documents.parquet", tmp_path / "table", classifier, **settings)).table
    (_, one, first), (_, other, second) = (answers(table)[name] for name in CLASSES[:2])
    np.testing.assert_array_equal(one, other)
    assert first != second
    assert np.log(one[:2]) == pytest.approx([first, second], abs=1 / 64)


def test_the_documents_own_labels_can_be_the_teacher(classifier, documents, tmp_path):
    labels = {"teacher": {"labels": ["names", "types", "statements", "expressions"]}}
    report = capture(config(documents, tmp_path / "table", classifier, **labels))
    assert (report.documents, report.rejects) == (58, 2)
    reasons = [json.loads(line)["reason"] for line in Path(report.rejects_file).read_text().splitlines()]
    assert reasons == ["it has no label", "its label is 'unheard of', which is not in teacher.labels"]
    identity = Table.open(report.table).identity
    assert identity.classes == ("names", "types", "statements", "expressions")
    for row, distribution, next_logprob in answers(report.table).values():
        assert distribution.tolist() == [float(name == row["label"]) for name in identity.classes]
        assert next_logprob == 0
    verify(Table.open(report.table))


def test_another_order_of_the_classes_is_another_teacher(captured, documents, classifier, tiny_teacher, tmp_path):
    other = save_classifier(tmp_path / "other", tiny_teacher, CLASSES[::-1])
    with pytest.raises(ProvenanceError, match="classes: the table has"):
        capture(config(documents, captured.table, other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": {"top_k": 2}}, "every class is kept"),
        ({"selection": {"temperatures": [1.0, 2.0]}}, "every class is kept"),
        ({"columns": {"messages": "text"}}, "reads only plain text, not chats or prompts"),
        ({"teacher": {"labels": ["names", "types"]}, "columns": {"label": None}}, "no column for them is given"),
    ],
)
def test_settings_that_do_not_apply_to_a_classifier_are_refused(changes, message, documents, classifier, tmp_path):
    with pytest.raises(UsageError, match=message):
        capture(config(documents, tmp_path / "table", classifier, **changes))
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "does not give one probability distribution over its classes"),
        ({"id2label": {"0": "same", "1": "same"}}, "does not give one probability distribution over its classes"),
        ({"architectures": ["BertModel"]}, "neither a causal language model nor a sequence classifier"),
    ],
)
def test_a_classifier_without_a_single_label_distribution_is_refused(changes, message, documents, classifier, tmp_path):
    folder = tmp_path / "classifier"
    folder.mkdir()
    for path in classifier.iterdir():
        (folder / path.name).symlink_to(path)
    settings = json.loads((classifier / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(TeacherError, match=message):
        capture(config(documents, tmp_path / "table", folder))
