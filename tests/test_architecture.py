"""The shape of the whole: imports go only downward, files stay small, and the public names are these."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("storage", "pipeline", "flows")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).glob("**/*.py"))

FORBIDDEN = {
    "storage": {"pipeline", "flows", "torch", "transformers", "accelerate", "prefect", "cyclopts"},
    "pipeline": {"flows", "prefect", "cyclopts", "rich"},
    "flows": {"torch", "transformers", "accelerate", "numpy", "pyarrow", "polars", "deltalake", "safetensors"},
}

PIPELINE = {
    *("CaptureConfig", "TrainConfig", "EvaluateConfig", "DistillConfig"),
    *("ColumnsConfig", "TeacherConfig", "SequencesConfig", "SelectionConfig", "ShardsConfig"),
    *("StudentConfig", "LossConfig", "StreamConfig", "OptimiserConfig"),
    *("capture", "train", "evaluate", "CaptureReport", "TrainReport", "EvaluationReport", "Progress"),
    *("estimate", "EstimateConfig", "Estimate"),
    *("SoftLabelDataset", "distillation_loss"),
    *("reprocess", "ReprocessConfig", "ReprocessReport", "VerifyConfig", "MaintainConfig", "MixConfig"),
}
STORAGE = {
    *("Table", "Shard", "Identity", "SoftLabels", "read", "inspect", "history"),
    *("verify", "remove_damaged", "Verification", "maintain", "Maintenance"),
    *("View", "make_view", "open_table"),
    *("Tag", "tag", "tags", "untag", "Pin", "pin", "pins", "unpin"),
    *("SoftlabelError", "UsageError", "DocumentsError", "TeacherError", "StudentError", "TrainingError"),
    "WorkerError",
    *("TableError", "TableNotFoundError", "PurgedError", "ProvenanceError", "IntegrityError", "DisagreementError"),
}

ALONE = ("loss", "divergence", "targets", "selection", "teacher")
"""Modules of the pipeline that work where prefect, polars and deltalake are absent."""


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their package"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_only_downward(path: Path):
    assert not imported(path) & FORBIDDEN[path.relative_to(ROOT).parts[0]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_is_run_as_code_or_as_a_query(path: Path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"eval", "exec", "compile", "__import__"}
    assert not {call.attr for call in calls if isinstance(call, ast.Attribute)} & {"sql", "sql_expr", "SQLContext"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_may_bring_code_come_in_through_one_door(path: Path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)} | imported(path)
    door = path == ROOT / "pipeline" / "pretrained.py"
    assert door or not named & {"from_pretrained", "from_config", "_from_config", "dynamic_module_utils"}
    assert not named & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "allow_pickle"}
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load_url"):
            assert "weights_only=True" in ast.unparse(node)


def test_files_stay_small():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: lines for name, lines in lengths.items() if lines >= 300}


def test_make_bench_prints_every_benchmark():
    text = (ROOT / "Makefile").read_text()
    named = re.findall(r"^(?:TEACHER|STORAGE|STUDENT) := \$\(addprefix bench-,(.*)\)$", text, re.MULTILINE)
    files = sorted(path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py"))
    assert sorted(" ".join(named).split()) == files


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is_for(path: Path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize(("package", "names"), [("pipeline", PIPELINE), ("storage", STORAGE)])
def test_public_names(package: str, names: set[str]):
    module = __import__(package)
    assert set(module.__all__) == names
    for name in names:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018


def test_the_loss_the_selection_and_the_teacher_stand_alone():
    absent = "import sys; sys.modules.update(dict.fromkeys(['prefect', 'polars', 'deltalake', 'cyclopts', 'flows']))"
    imports = ", ".join(f"pipeline.{module}" for module in ALONE)
    subprocess.run([sys.executable, "-c", f"{absent}; import {imports}"], cwd=ROOT, check=True)


def test_asking_for_settings_loads_no_heavy_library():
    heavy = {"torch", "transformers", "prefect", "polars", "pyarrow", "deltalake", "matplotlib"}
    code = f"import sys, softlabel.flows.cli, softlabel.pipeline.config.capture; print(*({heavy!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
