"""Settings from flags and files: which one wins, and how errors explain what is wrong."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from softlabel.flows.arguments import read_file, resolve, settings
from softlabel.flows.cli import run
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.flags import flags_of
from softlabel.pipeline.config.tables import MaintainConfig, ReprocessConfig, VerifyConfig
from softlabel.pipeline.config.train import TrainConfig
from softlabel.storage.errors import UsageError

NEEDED = {("documents",): "d", ("table",): "t", ("teacher", "model"): "m"}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    file = write(
        tmp_path, "documents: a\ntable: b\nteacher: {model: c, dtype: float32}\nselection: {seed: 3, draws: 9}"
    )
    config = resolve(CaptureConfig, {("table",): "mine", ("selection", "draws"): 5}, file)
    assert (config.documents, config.table, config.teacher.dtype) == ("a", "mine", "float32")
    assert (config.selection.seed, config.selection.draws, config.selection.max_k) == (3, 5, 16)


@pytest.mark.parametrize(
    ("arguments", "documents", "table"),
    [
        ("a t", "a", "t"),
        ("a b s3://x/*.json t", ("a", "b", "s3://x/*.json"), "t"),
        ("a --table t", "a", "t"),
        ("a b --table t", ("a", "b"), "t"),
        ("--table t a b", ("a", "b"), "t"),
        ("--documents a b --table t", ("a", "b"), "t"),
        ("--documents a --table t", "a", "t"),
        ("a b --config FILE", "a", "b"),
        ("--config FILE", ("c", "d"), "e"),
        ("a --config FILE", "a", "e"),
        ("--documents a b --config FILE", ("a", "b"), "e"),
    ],
)
@pytest.mark.parametrize("verb", ["capture", "estimate"])
def test_several_documents_are_given_like_the_sources_of_cp(
    verb: str, arguments: str, documents: object, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write(tmp_path, "documents: [c, d]\ntable: e")
    found: list[CaptureConfig] = []
    monkeypatch.setattr("softlabel.flows.cli.answer", lambda verb, work, as_json: work())
    runner = SimpleNamespace(run=lambda verb, config: found.append(config))
    monkeypatch.setattr("softlabel.flows.cli.import_module", lambda _: runner)
    given = arguments.replace("FILE", str(file)).split()
    assert run([verb, *given, "--teacher.model", "m", "--columns.id", "none"]) == 0
    assert (found[0].documents, found[0].table, found[0].columns.id) == (documents, table, None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"student": {"layers": (0, 3)}, "loss": {"divergence": "jsd", "hard_weight": 0.25, "temperature": 2.0}},
        {"stream": {"packing": False}, "optimizer": {"bf16": True, "learning_rate": 1e-7, "report_to": ["wandb"]}},
        {"student": {"model": "a folder's $name", "labels": ["x=a,b", "--y"]}, "optimizer": {"max_steps": 3}},
    ],
)
def test_the_flags_of_settings_give_the_same_settings(changes: dict, monkeypatch: pytest.MonkeyPatch):
    """As in the commands that a report shows."""
    found: list[TrainConfig] = []
    monkeypatch.setattr("softlabel.flows.cli.answer", lambda verb, work, as_json: work())
    runner = SimpleNamespace(run=lambda verb, config: found.append(config))
    monkeypatch.setattr("softlabel.flows.cli.import_module", lambda _: runner)
    config = TrainConfig.model_validate({"table": "t", "output": "o", **changes}).completed()
    assert run(["train", "t", "o", *shlex.split(" ".join(flags_of(config)))]) == 0
    assert found[0].completed() == config


def test_documents_of_one_path_or_several_are_valid_in_prefects_form():
    [schema] = (CaptureConfig.model_json_schema()["properties"]["documents"],)
    for value, valid in [("a", True), (["a", "b"], True), ("s3://key:secret@b", False), (["a", "s3://k:s@b"], False)]:
        assert Draft202012Validator(schema).is_valid(value) == valid
    for value in ([], "s3://key:secret@b", ["a", "s3://k:s@b"]):
        with pytest.raises(ValidationError):
            CaptureConfig(documents=value, table="t", teacher={"model": "m"})


def test_flags_are_enough_without_a_file():
    assert resolve(CaptureConfig, NEEDED, None).teacher.model == "m"


@pytest.mark.parametrize("model", [CaptureConfig, TrainConfig, EvaluateConfig, DistillConfig])
def test_every_setting_has_a_description(model: type):
    assert all(setting.field.description for setting in settings(model))


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("tabel: x", ["unknown setting tabel", "did you mean table?", "run.yaml, tabel"]),
        ("selection: {topk: 4}", ["unknown setting selection.topk", "did you mean top_k?"]),
        ("selection: {top-k: 4}", ["did you mean top_k?"]),
        ("selection: {top_k: 4, draws: 3}", ["top_k can't be combined with draws", "run.yaml, selection"]),
        ("teacher: {model: m, dtype: fp8}", ["invalid value for teacher.dtype", "'bfloat16'", "found:       'fp8'"]),
        (
            "teacher: m",
            ["invalid value for teacher\n", "settings of its own, indented below it", "'m'", "run.yaml, teacher"],
        ),
    ],
)
def test_an_error_in_a_file_names_the_setting_and_the_place(tmp_path: Path, text: str, messages: list[str]):
    flags = {path: value for path, value in NEEDED.items() if not text.startswith("teacher")}
    with pytest.raises(UsageError) as error:
        resolve(CaptureConfig, flags, write(tmp_path, text))
    assert all(message in str(error.value) for message in messages), error.value


def test_a_missing_setting_is_named_with_its_flag(tmp_path: Path):
    with pytest.raises(UsageError, match=r"the setting output is missing") as error:
        resolve(TrainConfig, {("table",): "t"}, write(tmp_path, ""))
    assert "pass --output, or set it in a --config file" in str(error.value)


def test_a_missing_positional_setting_is_named_as_an_argument():
    with pytest.raises(
        UsageError,
        match=r"as an argument \(in this order: DOCUMENTS TABLE\), pass --table, or set it in a --config file",
    ):
        resolve(CaptureConfig, {("documents",): "d", ("teacher", "model"): "m"}, None, ("documents", "table"))


def test_an_empty_section_counts_as_absent(tmp_path: Path):
    file = write(tmp_path, "documents: d\ntable: t\nteacher: {model: m}\nselection:\nsequences:\nshards: {}\n")
    assert resolve(CaptureConfig, {}, file) == resolve(CaptureConfig, NEEDED, None)
    assert resolve(CaptureConfig, {("sequences", "max_tokens"): 99}, file).sequences.max_tokens == 99


@pytest.mark.parametrize("name", ["documents", "selection"])
def test_a_setting_that_is_set_twice_is_refused_with_its_lines(tmp_path: Path, name: str):
    text = "base: &base {seed: 1}\ndocuments: a\nselection:\n  <<: *base\n  seed: 3\n"
    assert read_file(write(tmp_path, text))["selection"] == {"seed": 3}
    with pytest.raises(UsageError, match=f"(?s){name} is set twice.*lines [23] and 6.*run.yaml"):
        read_file(write(tmp_path, f"{text}{name}: b\n"))


def test_a_misspelt_setting_is_shown_before_the_settings_that_are_missing(tmp_path: Path):
    with pytest.raises(UsageError) as error:
        resolve(CaptureConfig, {}, write(tmp_path, "documents: d\ntabel: t\n"))
    assert str(error.value).startswith("unknown setting tabel\n")
    assert "the setting table is missing" in str(error.value)


def test_an_invalid_value_is_named_with_its_flag():
    with pytest.raises(UsageError, match=r"--selection\.draws") as error:
        resolve(CaptureConfig, {**NEEDED, ("selection", "draws"): -1}, None)
    assert "greater than or equal to 0" in str(error.value)


def test_an_error_of_all_settings_names_no_single_flag(tmp_path: Path):
    file = write(tmp_path, "source: t")
    for given in (None, file):
        with pytest.raises(UsageError, match=r"^invalid settings: purge can't be combined") as error:
            resolve(ReprocessConfig, {("source",): "t", ("purge",): "ids", ("compact",): True}, given)
        assert "--source" not in str(error.value)
        assert (f"where:       {file}\n" in f"{error.value}\n") == (given is not None)


@pytest.mark.parametrize("tag", ["a", "v1.0_x-y", "a=12"])
def test_a_tag_is_a_name_with_or_without_a_version(tag: str):
    assert resolve(MaintainConfig, {("table",): "t", ("tag",): tag}, None).tag == tag


@pytest.mark.parametrize("tag", ["", "1a", "a=", "a=b", "a=1\n", "a b"])
def test_a_tag_that_is_not_a_name_is_refused(tag: str):
    with pytest.raises(UsageError, match="invalid tag: must be NAME or NAME=VERSION, where NAME is a letter"):
        resolve(MaintainConfig, {("table",): "t", ("tag",): tag}, None)


def test_many_mistakes_fit_on_one_screen(tmp_path: Path):
    with pytest.raises(UsageError, match=r"and \d+ more") as error:
        resolve(CaptureConfig, {}, write(tmp_path, "\n".join(f"wrong{i}: 1" for i in range(40))))
    assert len(str(error.value).splitlines()) < 24


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: [", "is not valid YAML"),
        (b"- a", "contains no settings"),
        (b"\xff\xfe\x00a", "can't be read|is not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path: Path, content: bytes, problem: str):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        read_file(path)


def test_a_configuration_file_without_settings_is_shown_without_credentials(tmp_path: Path):
    with pytest.raises(UsageError, match="contains no settings") as error:
        read_file(write(tmp_path, f"- s3://KEY:{'SECRET' * 20}@bucket/x"))
    assert "found:       ['(a location with credentials)" in str(error.value)
    assert "SECRET" not in str(error.value)


def test_a_missing_file_suggests_a_similar_name(tmp_path: Path):
    file = write(tmp_path, "")
    with pytest.raises(UsageError, match=f"did you mean {file}"):
        read_file(tmp_path / "run.yml")


def test_saved_settings_can_be_read_back():
    config = resolve(CaptureConfig, {**NEEDED, ("selection", "top_k"): 64}, None)
    assert CaptureConfig.model_validate_json(config.model_dump_json()) == config


def test_a_setting_of_an_optional_section_is_required_only_with_that_section():
    [verify] = [str(s.parameter(False).annotation) for s in settings(VerifyConfig) if s.path == ("teacher", "model")]
    assert "(required with any --teacher.* flag)" in verify
    with pytest.raises(UsageError, match=r"the setting teacher\.model is missing"):
        resolve(VerifyConfig, {("table",): "t", ("teacher", "dtype"): "float32"}, None)
    assert resolve(VerifyConfig, {("table",): "t"}, None).teacher is None
