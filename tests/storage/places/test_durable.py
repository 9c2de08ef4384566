"""A power cut at any moment leaves the old or the new; every state that it may leave is rebuilt and read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from softlabel.storage.places import durable
from tests.crashes import Disk, Tree, recorded

OLD, NEW = b"old " * 100, b"new " * 100


def states(disk: Disk) -> set[Tree]:
    return {tree for whole, cuts in disk.moments for tree in {whole, *cuts}}


def bytes_in(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def replace_file(disk: Path) -> None:
    durable.write(disk / "file", NEW)


def publish_folder(disk: Path) -> None:
    (disk / "unfinished" / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (disk / "unfinished" / name).write_bytes(NEW)
    durable.publish(disk / "unfinished", disk / "deep" / "folder")
    durable.remove_folder(disk / "kept", disk / "scratch")


@pytest.mark.parametrize("change", [replace_file, publish_folder])
def test_a_power_cut_leaves_the_old_or_the_new(change: Callable[[Path], None], tmp_path: Path):
    disk = tmp_path / "disk"
    (disk / "kept").mkdir(parents=True)
    (disk / "kept" / "one").write_bytes(OLD)
    (disk / "kept" / "two").write_bytes(OLD)
    (disk / "file").write_bytes(OLD)
    with recorded(disk) as recording:
        change(disk)
    seen = states(recording)
    assert len(seen) > 3
    for number, tree in enumerate(seen):
        left = bytes_in(recording.rebuild(tree, tmp_path / str(number)))
        assert left["file"] in (OLD, NEW)
        folder = {name: content for name, content in left.items() if name.startswith("deep/")}
        assert folder in ({}, {f"deep/folder/{name}": NEW for name in ("a", "b", "inner/c")})
        kept = {name for name in left if name.startswith("kept/")}
        assert kept == {"kept/one", "kept/two"} or (not kept and folder)
    last = {frozenset(tree) for tree in recording.moments[-1][1]}
    for number, tree in enumerate(last):
        left = bytes_in(recording.rebuild(tree, tmp_path / f"last-{number}"))
        assert left["file"] == (NEW if change is replace_file else OLD)
        assert change is replace_file or "deep/folder/inner/c" in left
