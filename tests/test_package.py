"""A built wheel is complete, and its modules, verbs and settings work wherever it is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("storage", "pipeline", "flows")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the unpacked wheel, without access to the working copy."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, because setuptools leaves files that would end up in the next wheel
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(source)]
    subprocess.run([*command, "--wheel-dir", str(folder)], check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_a_wheel_contains_every_file_of_the_three_folders(installed: Path):
    paths = [path.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).glob("**/*.*")]
    packed = {path.relative_to(installed / "softlabel") for path in installed.glob("softlabel/**/*.*")}
    top = Path("flows", "softlabel", "__init__.py")
    assert {path for path in paths if "__pycache__" not in path.parts} == packed - {Path(top.name)} | {top}
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"softlabel"}


def test_an_installed_wheel_runs_next_to_folders_of_the_same_names(installed: Path, tmp_path: Path):
    for name in (*FOLDERS, "softlabel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    code = (
        "import pickle, sys, softlabel.storage, softlabel.flows.cli as cli\n"
        "from softlabel.pipeline import CaptureConfig, capture\n"
        "config = CaptureConfig(documents='d', table='t', teacher={'model': 'm'})\n"
        "assert pickle.loads(pickle.dumps(config)) == config and pickle.loads(pickle.dumps(capture)) is capture\n"
        "print(*softlabel.storage.__path__)\n"
        "sys.exit(cli.run(['capture', '--help']))\n"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.startswith(f"{installed}/softlabel/storage\n")
    assert "--selection.top-k" in found.stdout
