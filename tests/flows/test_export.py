"""``softlabel export`` on the command line."""

from pathlib import Path

import pytest

from tests.flows.commands import shown, softlabel
from tests.pipeline.captured import make_table


def test_the_command_exports_for_people_and_for_programs(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table = make_table(tmp_path / "table", tiny_teacher, train=3, held_out=2).location
    text = shown(capsys, "export", table, tmp_path / "a", "--format", "axolotl", "--no-draws")
    assert f"{tmp_path / 'a'} has {table}@2" in text
    assert "train 3 " in text
    assert "eval 2 " in text
    code, found, _ = softlabel(capsys, "export", table, tmp_path / "b", "--split", "eval")
    assert (code, found["splits"]["eval"]["sequences"], found["output"]) == (0, 2, str(tmp_path / "b"))
    code, found, _ = softlabel(capsys, "export", table, tmp_path / "b")
    assert (code, "not overwritten" in found["message"]) == (2, True)
    assert softlabel(capsys, "export", table, "s3://bucket/out")[0] == 2
