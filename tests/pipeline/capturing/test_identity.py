"""What a capture presumes of its teacher without loading it is what it finds when it does load it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from softlabel.pipeline.capturing.identity import identify, presumed
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.storage.errors import UsageError
from softlabel.storage.identity import Identity
from tests.pipeline.capturing.test_capture import settings
from tests.pipeline.classifiers import CLASSES, save_classifier

LABELS = {"teacher": {"labels": CLASSES, "dtype": "float32"}, "columns": {"label": "label"}}
OF_TOKENS: list[dict[str, Any]] = [
    {},
    {"sequences": {"max_tokens": 127}},
    {"sequences": {"max_tokens": 128, "context": 9}},
    {"sequences": {"max_tokens": 128, "special_tokens": "parse"}},
    {"sequences": {"max_tokens": 128, "chat_template_date": "2020-02-02"}},
    {"columns": {"messages": "messages"}},
    {"columns": {"messages": "messages"}, "sequences": {"max_tokens": 128, "assistant_turns": "last"}},
    {"columns": {"prompt": "prompt", "completion": "completion"}},
    {"selection": {"top_k": 3}},
    {"selection": {"temperatures": (1.0, 2.0), "seed": 7}},
    {"shards": {"eval_fraction": 0.5}},
    {"teacher": {"dtype": "float16"}},
    LABELS,
]
OF_CLASSES: list[dict[str, Any]] = [{"sequences": {"max_tokens": n}} for n in (20, 50, 51, 127, 128, 129, 1024)]
OF_CLASSES += [{"selection": {"top_k": 3}}, {"columns": {"messages": "messages"}}, LABELS]


@pytest.fixture(scope="module")
def classifier(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier") / "teacher", tiny_teacher)


def config_of(teacher: Path, changed: dict[str, Any]) -> CaptureConfig:
    model = {"model": str(teacher), "dtype": "float32", **changed.get("teacher", {})}
    return settings(teacher, Path("documents"), Path("table"), **{**changed, "teacher": model})


def found(config: CaptureConfig) -> Identity | None:
    try:
        return identify(config, Checkpoint.find(config.teacher))
    except UsageError:
        return None


def presumption(config: CaptureConfig, table: Identity) -> Identity | None:
    try:
        return presumed(config, Checkpoint.find(config.teacher), table)
    except UsageError:
        return None


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_the_presumed_identity_is_the_real_one_whatever_the_settings(kind, tiny_teacher, classifier):
    teacher, changes = (tiny_teacher, OF_TOKENS) if kind == "language model" else (classifier, OF_CLASSES)
    configs = [config_of(teacher, changed) for changed in changes]
    found_at_least_once = 0
    for table in filter(None, map(found, configs)):
        for config in configs:
            known = presumption(config, table)
            if known is None:
                continue
            assert bool(table.differences(known)) == (found(config) != table)
            if known == table:
                found_at_least_once += 1
    assert found_at_least_once >= len(configs) - 2


def test_other_files_are_never_presumed_to_be_the_tables(tiny_teacher: Path, classifier: Path, tmp_path: Path):
    table = found(config_of(tiny_teacher, {}))
    assert table is not None
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        other = tmp_path / name
        shutil.copytree(tiny_teacher, other)
        with (other / name).open("ab") as file:
            file.write(b" ")
        assert presumed(config_of(other, {}), Checkpoint.find(config_of(other, {}).teacher), table) != table
    assert presumption(config_of(classifier, {}), table) != table
