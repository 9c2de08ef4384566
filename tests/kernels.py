"""Compiles what numba compiles, for the parallel processes of the tests: each would do so for up to ten seconds."""

import tempfile
from pathlib import Path

import torch

from softlabel.pipeline.config.capture import SelectionConfig
from softlabel.pipeline.selection.select import Selection
from tests.pipeline.selection.test_select import run
from tests.storage.tables import add, identity, make_table


def main() -> None:
    """Select from both kinds of logits, and write a small table, which comes last."""
    for dtype in (torch.bfloat16, torch.float32):
        run(torch.zeros(2, 64, dtype=dtype), Selection.of(SelectionConfig()))
    with tempfile.TemporaryDirectory() as folder:
        add(make_table(Path(folder, "table"), identity()), ["a row"])


if __name__ == "__main__":
    main()
