"""Which settings are given survives the command line and Prefect; inspect shows a table's settings as flags."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.flows import cli
from softlabel.flows.cli import run
from softlabel.pipeline.capturing.capture import CaptureReport, capture
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.distill import DistillConfig

CONFIG: dict[str, Any] = {
    "documents": "d",
    "table": "t",
    "teacher": {"batch_tokens": 8192},
    "selection": {"max_k": 16, "temperatures": [1.0]},  # the defaults
    "columns": {},
}


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[CaptureReport]:
    """Runs captures of the command line without Prefect, and collects their reports."""
    found: list[CaptureReport] = []

    def without_prefect(_: str, config: CaptureConfig) -> CaptureReport:
        found.append(capture(config))
        return found[-1]

    monkeypatch.setattr(cli, "import_module", lambda _: SimpleNamespace(run=without_prefect))
    return found


def hostile_documents(path: Path, count: int) -> Path:
    """Documents whose columns have names that a shell or a terminal could misread."""
    rows = [{"$(id)": f"d{i}", "it's\x1b[31m": f"Some words, and {i}.", "-a b": "[red]"} for i in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


OWN: dict[str, Any] = {
    "columns": {"id": "$(id)", "text": "it's\x1b[31m", "carry": ["-a b"]},
    "sequences": {"max_tokens": 33, "context": 2, "special_tokens": "parse", "chat_template_date": "2024-02-29"},
    "selection": {"top_p": 0.123456789, "min_k": 0, "draws": 0, "temperatures": [1.0, 2.5], "seed": 3},
    "shards": {"eval_fraction": 0.0},
}


@pytest.mark.parametrize("own", [OWN, OWN | {"selection": {"top_k": 4}}], ids=["all settings", "top-k"])
def test_what_inspect_prints_is_accepted_as_the_flags_of_a_capture(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reports: list[CaptureReport], own: Any
):
    table = str(tmp_path / "t")
    first = {"documents": str(hostile_documents(tmp_path / "a.parquet", 2)), "table": table}
    capture(CaptureConfig.model_validate(own | first | {"teacher": {"model": str(tiny_teacher)}}))
    assert run(["inspect", table]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    flags = [line.strip() for line in shown.splitlines() if line.startswith("  --")]
    assert {"--sequences.max-tokens 33", f"--teacher.model {tiny_teacher}", "--shards.eval-fraction 0"} <= {*flags}
    words = [word for line in flags for word in as_bash_reads(line)]
    more = str(hostile_documents(tmp_path / "b.parquet", 3))
    assert run(["capture", more, table, *words]) == 0, capsys.readouterr().err
    assert (reports[0].unchanged, reports[0].sequences) == (2, 1)
    capsys.readouterr()
    assert run(["inspect", table, "--json"]) == 0
    in_json = json.loads(capsys.readouterr().out)["settings"]
    assert len(in_json) == len(flags)
    assert in_json["columns.text"] == "it's\x1b[31m"
    assert in_json["sequences.chat_template_date"] == "2024-02-29"
    values = {tuple(name.split(".")): value for name, value in in_json.items()}
    nested: dict[str, Any] = {}
    for (section, name), value in values.items():
        nested.setdefault(section, {})[name] = value
    assert capture(CaptureConfig.model_validate({"documents": more, "table": table, **nested})).unchanged == 3


def as_bash_reads(line: str) -> list[str]:
    """The words of a line; an escape such as ``$'\\x1b'`` is its character."""
    import subprocess

    return subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], check=True, capture_output=True, text=True
    ).stdout.split("\0")[:-1]


def given(config: Any) -> dict[str, Any]:
    return {
        name: given(value) if hasattr(value, "model_fields_set") else value
        for name, value in config
        if config.gives(name)
    }


def test_flags_and_files_give_exactly_the_settings_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    runner = SimpleNamespace(run=lambda _, config: seen.append(config))
    monkeypatch.setattr(cli, "import_module", lambda _: runner)
    monkeypatch.setattr(cli, "answer", lambda _, work, as_json: work())
    (tmp_path / "run.yaml").write_text("selection: {seed: 0}\nsequences:\ncolumns: {label: null}\n")
    flags = ["--selection.max-k", "16", "--config", str(tmp_path / "run.yaml")]
    for verb in ("capture", "estimate"):
        assert run([verb, "d", "t", *flags]) == 0
        assert given(seen.pop()) == {
            "documents": "d",
            "table": "t",
            "selection": {"max_k": 16, "seed": 0},
            "columns": {"label": None},
        }


def test_prefect_passes_on_only_what_is_given():
    from softlabel.flows.capture import capture_flow
    from softlabel.flows.distill import distill_flow

    for flow, model, more in (
        (capture_flow, CaptureConfig, {}),
        (distill_flow, DistillConfig, {"output": "o", "student": {"depth": 1}}),
    ):
        config = model.model_validate(CONFIG | more)
        stored = json.loads(json.dumps(flow.serialize_parameters({"config": config})))
        assert stored["config"] == CONFIG | more
        read = flow.validate_parameters(stored)["config"]
        assert given(read) == given(config)
        capturing = read.capture() if isinstance(read, DistillConfig) else read
        assert given(capturing.selection) == {"max_k": 16, "temperatures": (1.0,)}


@pytest.mark.usefixtures("prefect")
def test_a_deployments_run_gets_only_what_is_given():
    from prefect.client.orchestration import get_client
    from prefect.utilities.callables import parameter_schema

    from softlabel.flows.capture import capture_flow

    config = CaptureConfig.model_validate(CONFIG)
    schema = parameter_schema(capture_flow).model_dump_for_openapi()
    with get_client(sync_client=True) as client:
        flow = client.create_flow(capture_flow)
        for number, defaults in enumerate(({}, {"config": CONFIG})):
            deployment = client.create_deployment(
                flow, f"left out {number}", parameters=defaults, parameter_openapi_schema=schema
            )
            parameters = {} if defaults else {"config": config}
            run = client.create_flow_run_from_deployment(deployment, parameters=parameters)
            stored = client.read_flow_run(run.id).parameters
            assert given(capture_flow.validate_parameters(stored)["config"]) == given(config)
