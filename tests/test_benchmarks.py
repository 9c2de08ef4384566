"""What the benchmarks say, not what they measure."""

import importlib.util

import pytest

from tests.benchmarks import stream
from tests.figures import verdict


def test_a_limit_is_said_to_hold_or_not():
    assert verdict("a step", 1.04, "of another", at_most=1.05) == "a step: 1.040 of another, at most 1.05: holds"
    assert verdict("a step", 1.06, "of another", at_most=1.05).endswith("at most 1.05: DOES NOT HOLD")
    assert verdict("the stream", 4e5, "a second", at_least=500_000) == (
        "the stream: 400,000 a second, at least 500,000: DOES NOT HOLD"
    )


@pytest.mark.parametrize("there", [True, False])
def test_what_is_not_installed_is_left_out_before_anything_is_measured(there, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    assert (stream.HUGGING_FACE in stream.compared(None, None, None)) == there
    assert ("pip install -e '.[bench]'" in capsys.readouterr().out) != there
