"""An estimate's numbers, its seconds among them, are within the bounds that its benchmark holds a real teacher to."""

from pathlib import Path

import pytest

from tests.benchmarks.estimate import compared
from tests.conftest import topics
from tests.pipeline.capturing.test_capture import write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.long
def test_all_numbers_are_within_their_bounds(tiny_teacher: Path, tmp_path: Path):
    """Seconds depend on what else this machine does: one try of three has to hold."""
    texts = list(topics().values())[::2]
    named = {f"{i}-{again}": text for again in range(2) for i, text in enumerate(texts)}
    settings = {
        "documents": str(write(tmp_path / "d.parquet", named)),
        "teacher": {"model": str(tiny_teacher), "dtype": "float32", "batch_tokens": 4096},
        "sequences": {"max_tokens": 256},
        "sample": {"megabytes": 0.1, "batches": 6},
    }
    tried = []
    while len(tried) < 3 and not (tried and all(each.holds for each in tried[-1])):
        tried.append(compared(settings, tmp_path / f"table-{len(tried)}")[1])
    assert all(each.holds for each in tried[-1]), tried
