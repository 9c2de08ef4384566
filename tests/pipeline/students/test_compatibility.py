"""The same checks of a student run against a teacher, before the capture, and against a table."""

import json
import shutil
from dataclasses import replace

import pytest
from transformers import BloomConfig, GPT2Config, LlamaConfig

from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.train import StudentConfig, TrainConfig
from softlabel.pipeline.objectives.decide import objective_of
from softlabel.pipeline.students.origin import Origin
from softlabel.storage.errors import StudentError, UsageError
from tests.pipeline.building import built
from tests.pipeline.classifiers import save_classifier

BAD = [
    ({"layers": (0, 2)}, UsageError, "distinct layers between 0 and 1"),
    ({"depth": 3}, UsageError, "exceeds the teacher's number of layers"),
    ({"layers": (0,), "intermediate_size": 129}, UsageError, "at most 128"),
    ({"layers": (0,), "labels": ("law",)}, UsageError, "teacher is a language model"),
    ({"model": "nowhere/at-all"}, StudentError, "can't find the model"),
    ({"model": "stranger"}, StudentError, "499 tokens"),
    ({"config": "small.json"}, StudentError, "at least 500 rows"),
    ({"config": "short.json"}, StudentError, r"at least \d+ positions"),
    ({"depth": 1, "config": "small.json"}, UsageError, "exactly one setting"),
]


def capturing(teacher, **settings):
    return CaptureConfig(documents="nowhere.parquet", table="table", teacher={"model": str(teacher)}, **settings)


@pytest.fixture
def strangers(tiny_teacher, tmp_path, monkeypatch):
    """A model with one token fewer, and configurations with too few ids or too few positions."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_teacher, "stranger")
    tokenizer = json.loads((tmp_path / "stranger" / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    del tokenizer["model"]["vocab"][last]
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) != last]
    (tmp_path / "stranger" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "small.json").write_text(LlamaConfig(vocab_size=400).to_json_string())
    (tmp_path / "short.json").write_text(GPT2Config(vocab_size=512, n_positions=20).to_json_string())


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(("student", "kind", "message"), BAD, ids=[str(student) for student, *_ in BAD])
def test_an_unsuitable_student_is_refused_before_the_capture_and_before_training(
    student, kind, message, table, tiny_teacher
):
    config = StudentConfig(**student)
    with pytest.raises(kind, match=message):
        objective_of(Origin.of_capture(capturing(tiny_teacher))).require_fitting(config)
    with pytest.raises(kind, match=message):
        built(config, table)


def test_a_suitable_student_is_accepted_before_the_capture_and_before_training(table, tiny_teacher):
    for origin in (Origin.of_capture(capturing(tiny_teacher)), Origin.of(table)):
        assert objective_of(origin).require_fitting(StudentConfig(depth=2)).path == tiny_teacher
        assert origin.tokenizer().get_vocab()


@pytest.mark.parametrize("config", [BloomConfig(vocab_size=512), GPT2Config(vocab_size=512, n_positions=40)])
def test_unlimited_positions_or_enough_for_the_longest_sequence_are_accepted(config, table, tmp_path):
    (tmp_path / "config.json").write_text(config.to_json_string())
    origin = replace(Origin.of(table), max_tokens=1000)  # longer ones could have been captured
    objective_of(origin).require_fitting(StudentConfig(config=str(tmp_path / "config.json")))


def test_classifiers_accept_known_labels_and_refuse_adapters(tiny_teacher, tmp_path):
    origin = Origin.of_capture(capturing(save_classifier(tmp_path / "teacher", tiny_teacher)))
    objective_of(origin).require_fitting(StudentConfig(depth=1, labels=("all=types,names", "statements")))
    with pytest.raises(UsageError, match="did you mean 'names'"):
        objective_of(origin).require_fitting(StudentConfig(depth=1, labels=("name", "types")))
    with pytest.raises(UsageError, match="adapters are only for language models"):
        objective_of(origin).require_loss(TrainConfig(table="t", output="o", student={"depth": 1, "lora_r": 4}))


def test_a_temperature_that_the_capture_would_not_store_is_refused(tiny_teacher):
    config = TrainConfig(table="t", output="o", student={"depth": 1}, loss={"temperature": 2.0})
    objective_of(Origin.of_capture(capturing(tiny_teacher, selection={"temperatures": (1.0, 2.0)}))).require_loss(
        config
    )
    with pytest.raises(UsageError, match=r"the table does not store temperature 2"):
        objective_of(Origin.of_capture(capturing(tiny_teacher))).require_loss(config)
