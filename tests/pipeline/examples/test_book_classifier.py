"""The classification example: real text with real labels, and the four commands in README.md."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.examples import book_classifier
from softlabel.pipeline.students.labels import LabelMap


def test_the_documents_are_passages_of_ten_kinds_of_books():
    documents = list(book_classifier.passages())
    assert Counter(document["kind"] for document in documents) == dict.fromkeys(
        book_classifier.KINDS, book_classifier.PASSAGES
    )
    assert len({document["id"] for document in documents}) == len(documents)
    kinds = {document["book"]: document["kind"] for document in documents}
    known = {"Genesis": "law", "Job": "wisdom", "Daniel": "major-prophets", "John": "gospels", "Jude": "letters"}
    assert {book: kinds[book] for book in known} == known
    assert not any(":" in document["text"][:8] for document in documents)
    assert documents == list(book_classifier.passages())


def test_ten_classes_become_five_labels():
    labels = LabelMap.of(book_classifier.LABELS, tuple(book_classifier.KINDS))
    assert labels.names == ("law", "story", "poetry", "prophecy", "epistles")
    assert -1 not in labels.members


def test_each_steps_settings_use_the_results_of_the_step_before(tmp_path):
    labels, teacher, distill = book_classifier.configs(tmp_path).values()
    assert isinstance(labels, CaptureConfig)
    assert isinstance(teacher, TrainConfig)
    assert isinstance(distill, DistillConfig)
    assert teacher.table == labels.table
    assert distill.teacher.model == teacher.output
    assert labels.shards == distill.shards  # teacher and student hold out the same documents


@pytest.mark.long
def test_the_commands_in_the_readme_work(tmp_path):
    folder = tmp_path / "classes"
    subprocess.run([sys.executable, "-m", "softlabel.pipeline.examples.book_classifier", str(folder)], check=True)
    softlabel = Path(sys.executable).with_name("softlabel")
    for verb, name in (("capture", "labels"), ("train", "teacher"), ("distill", "distill")):
        command = [softlabel, verb, "--config", folder / f"{name}.yaml", "--json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)["evaluate"]
    student, control = report["students"]
    chance = 1 / len(book_classifier.LABELS)
    assert report["teacher"]["accuracy"] > student["accuracy"] > chance < control["accuracy"]
    assert student["kl"] < control["kl"]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "softlabel.pipeline.examples.book_classifier",
            str(folder),
            str(tmp_path / "picture.svg"),
        ],
        check=True,
    )
    drawn = " ".join(ElementTree.parse(tmp_path / "picture.svg").getroot().itertext())
    assert all(name in drawn for name in ("student", "control", "KL to the teacher"))
