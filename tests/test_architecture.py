"""The structure of the code: imports run one way, and every public name can be imported."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = ("storage", "pipeline", "flows")
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))

FOREIGN = {
    "storage": {"torch", "transformers", "accelerate", "prefect", "cyclopts"},
    "pipeline": {"prefect", "cyclopts", "rich"},
    "flows": {"torch", "transformers", "accelerate", "numpy", "pyarrow", "polars", "deltalake", "safetensors"},
}
"""Libraries that each folder never imports."""

DEPENDS_ON = {
    "storage.credentials": [],
    "storage.errors": ["storage.credentials"],
    "storage.location": ["storage.errors"],
    "storage.identity": ["storage.errors"],
    "storage.lock": ["storage.identity"],
    "storage.places": ["storage.location", "storage.lock"],
    "storage.schema": ["storage.errors"],
    "storage.log": ["storage.places", "storage.schema"],
    "storage.records": ["storage.log"],
    "storage": ["storage.records"],
    "storage.upkeep": ["storage"],
    "storage.views": ["storage.upkeep"],
    # The base of the pipeline ...
    "pipeline": ["storage.views"],
    "pipeline.config": ["pipeline"],
    "pipeline.devices": ["pipeline.config"],
    "pipeline.documents": ["pipeline.config"],
    "pipeline.models": ["pipeline.config"],
    "pipeline.selection": ["pipeline.config"],
    # ... the packages that make and maintain tables ...
    "pipeline.sequences": ["pipeline.documents", "pipeline.models", "pipeline.selection"],
    "pipeline.teachers": ["pipeline.sequences", "pipeline.devices"],
    "pipeline.capturing": ["pipeline.teachers"],
    "pipeline.tables": ["pipeline.teachers"],
    "pipeline.estimation": ["pipeline.capturing"],
    # ... and the packages that train students.
    "pipeline.loss": ["pipeline.config"],
    "pipeline.students": ["pipeline.loss", "pipeline.models", "pipeline.selection"],
    "pipeline.stream": ["pipeline.students"],
    "pipeline.evaluation": ["pipeline.stream", "pipeline.devices"],
    "pipeline.objectives": ["pipeline.evaluation"],
    "pipeline.evaluation.evaluate": ["pipeline.objectives"],
    "pipeline.evaluation.compare": ["pipeline.evaluation.evaluate"],
    "pipeline.training": ["pipeline.objectives"],
    "pipeline.distillation": ["pipeline.capturing", "pipeline.training", "pipeline.evaluation.compare"],
    "pipeline.lineage": ["pipeline.students"],
    "pipeline.dry_run": ["pipeline.distillation", "pipeline.estimation", "pipeline.tables"],
    "pipeline.examples": ["pipeline.models"],
    "flows.running": ["pipeline.dry_run", "pipeline.lineage"],
    "flows": ["flows.running"],
    "flows.display": ["flows"],
    "flows.cli": ["flows.display"],
}
"""Each package (and some single modules) with the packages that it depends on: it may import these, and everything
that they may import. The plain modules of ``storage`` and ``pipeline`` count as one package each."""

STANDALONE = (
    "loss.fused",
    "loss.divergence",
    "loss.targets",
    "selection.select",
    "teachers.teacher",
)
"""Modules of the pipeline that work without prefect, polars and deltalake."""


def below(package: str) -> set[str]:
    """Packages that a package may import, itself included."""
    return {package}.union(*map(below, DEPENDS_ON[package]))


def package_of(module: str) -> str:
    """The package in ``DEPENDS_ON`` that a module belongs to, without the leading ``softlabel``."""
    parts = module.split(".")
    return next(name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in DEPENDS_ON)


def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    """The code of each file."""
    return {path: parsed(path) for path in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that a piece of code imports anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their package"
            module = node.module or ""
            for alias in node.names:
                below = (ROOT / module.removeprefix("softlabel.").replace(".", "/")) / alias.name
                yield f"{module}.{alias.name}" if below.is_dir() or below.with_suffix(".py").is_file() else module


def test_every_folder_is_listed_as_a_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {f"softlabel.{'.'.join(path.parent.parts)}" for path in FILES}
    assert set(project["tool"]["setuptools"]["packages"]) == packages - {"softlabel.flows.softlabel"} | {"softlabel"}
    package_dir = {"softlabel": "flows/softlabel", **{f"softlabel.{name}": name for name in FOLDERS}}
    assert project["tool"]["setuptools"]["package-dir"] == package_dir
    folders = [ROOT / name.replace(".", "/") for name in DEPENDS_ON]
    assert all(folder.is_dir() or folder.with_suffix(".py").is_file() for folder in folders)


def test_imports_run_one_way(trees: dict[Path, ast.Module]):
    for path, tree in trees.items():
        own, found = path.with_suffix("").parts, list(imported(tree))
        assert not {name.split(".")[0] for name in found} & (FOREIGN[own[0]] | set(FOLDERS)), path
        allowed = below(package_of(".".join(own).removesuffix(".__init__")))
        ours = {name: package_of(name.removeprefix("softlabel.")) for name in found if name.startswith("softlabel.")}
        assert not {name: package for name, package in ours.items() if package not in allowed}, path


def packages(requirements: Iterable[str]) -> set[str]:
    """Names of the required packages."""
    parsed = map(Requirement, requirements)
    return {canonicalize_name(each.name) for each in parsed if not each.marker or each.marker.evaluate({"extra": ""})}


def test_a_plain_install_has_every_package_that_is_imported():
    """Packages of an extra are imported only inside functions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plain = packages(project["dependencies"])
    plain |= packages(each for name in plain for each in requires(name) or [])
    extras = project["optional-dependencies"]
    optional = packages(each for name in extras.keys() - {"dev"} for each in extras[name])
    owners = packages_distributions()  # of what is not installed here, the packages have the names of their modules
    for path in FILES:
        tree = parsed(path)
        everywhere = list(imported(tree))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            function.body = []
        for names, known in ((everywhere, plain | optional), (imported(tree), plain)):
            foreign = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"softlabel"}
            owned = {name: set(map(canonicalize_name, owners.get(name, [name]))) for name in foreign}
            assert not {name for name in foreign if not known & owned[name]}, path


def test_no_text_is_run_as_code_or_as_a_query(trees: dict[Path, ast.Module]):
    for path, tree in trees.items():
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        named = {call.id for call in calls if isinstance(call, ast.Name)}
        assert not named & {"eval", "exec", "compile", "__import__"}, path
        methods = {call.attr for call in calls if isinstance(call, ast.Attribute)}
        assert not methods & {"sql", "sql_expr", "SQLContext"}, path


def test_files_that_may_contain_code_are_loaded_in_one_module(trees: dict[Path, ast.Module]):
    for path, tree in trees.items():
        nodes = list(ast.walk(tree))
        named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        named |= {part for name in imported(tree) for part in name.split(".")}
        is_loader = path == Path("pipeline", "models", "pretrained.py")
        loading = {"from_pretrained", "from_config", "_from_config", "dynamic_module_utils"}
        assert is_loader or not named & loading, path
        assert not named & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "allow_pickle"}, path
        for node in nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load_url"):
                assert "weights_only=True" in ast.unparse(node), path


def test_a_run_decides_once_between_language_model_and_classifier(trees: dict[Path, ast.Module]):
    """A training or an evaluation asks in ``objectives.decide`` whether there are classes, a capture or the upkeep of a
    table in ``teachers.kind``. Only the modules that read or show a table as such ask, too."""
    described = ("storage", "pipeline.config.table_settings", "pipeline.students.origin")
    described += ("flows.display.tables",)
    asked = {
        module: found
        for path, tree in trees.items()
        if not (module := ".".join(path.with_suffix("").parts)).startswith(described)
        if (
            found := [
                ast.unparse(node)
                for node in ast.walk(tree)
                if isinstance(node, ast.Compare)
                and ast.unparse(node.left).rpartition(".")[2] == "classes"
                and isinstance(node.ops[0], ast.Is | ast.IsNot)
            ]
        )
    }
    decided = {"pipeline.objectives.decide": ["origin.classes is None"], "pipeline.teachers.kind": ["classes is None"]}
    assert asked == decided


def test_make_bench_runs_every_benchmark():
    text = (ROOT / "Makefile").read_text()
    named = re.findall(r"^(?:TEACHER|STORAGE|STUDENT) := \$\(addprefix bench-,(.*)\)$", text, re.MULTILINE)
    files = sorted(path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py"))
    assert sorted(" ".join(named).split()) == files


def test_every_file_has_a_docstring(trees: dict[Path, ast.Module]):
    assert not [path for path, tree in trees.items() if not ast.get_docstring(tree)]


@pytest.mark.parametrize("package", ["pipeline", "storage"])
def test_every_public_name_can_be_imported(package: str):
    module = import_module(f"softlabel.{package}")
    assert len(module.__all__) > 20
    for name in module.__all__:
        found = getattr(module, name)
        assert found.__name__ == name
        assert found.__module__.startswith(module.__name__)
        assert found.__doc__
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize(
    "verb",
    [
        *("capture", "estimate", "train", "evaluate", "compare", "distill"),
        *("verify", "reprocess", "maintain", "mix", "inspect", "history", "lineage", "show", "export", "rejects"),
    ],
)
def test_every_verb_of_the_command_is_a_function(verb: str):
    from softlabel.flows.cli import app

    module = import_module("softlabel.pipeline")
    assert verb in app
    assert verb in dir(module)
    assert callable(getattr(module, verb))


def test_loss_selection_and_teacher_work_without_prefect_polars_and_deltalake():
    absent = "import sys; sys.modules.update(dict.fromkeys(['prefect', 'polars', 'deltalake', 'cyclopts']))"
    modules = ", ".join(f"softlabel.pipeline.{module}" for module in STANDALONE)
    subprocess.run([sys.executable, "-c", f"{absent}; import {modules}"], cwd=ROOT, check=True)


def test_a_worker_loads_no_model_of_transformers_before_its_engine_does():
    """That takes three seconds, and another engine does not need it."""
    code = "import sys, softlabel.pipeline.capturing.worker; print('transformers.modeling_utils' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout == "False\n"


def test_the_command_line_and_the_settings_load_no_heavy_library():
    heavy = {"torch", "transformers", "prefect", "polars", "pyarrow", "deltalake", "matplotlib"}
    code = f"import sys, softlabel.flows.cli, softlabel.pipeline; print(*({heavy!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
