"""The CPU's passes over the vocabulary: beside what the selection's tests say of their numbers."""

from collections import Counter

import numpy as np
import pytest
import torch

from pipeline import scan_cpu, scan_torch
from tests.pipeline.test_selection import zipf


@pytest.fixture(params=["torch's threads", "its own"], autouse=True)
def threads(request, monkeypatch):
    if request.param == "its own":
        monkeypatch.setattr(scan_cpu, "_PARALLEL", None)  # as where torch's OpenMP is not GCC's
    else:
        assert scan_cpu._PARALLEL is not None
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 13, 1000])
def test_every_row_is_worked_on_once(count):
    done = Counter()
    scan_cpu._on_all_cores(lambda part: done.update(range(count)[part]), count)
    assert done == Counter(range(count))


def test_what_fails_in_a_thread_fails_the_capture():
    def fail(part: slice) -> None:
        if part.start > 0:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        scan_cpu._on_all_cores(fail, 100)


def test_on_any_number_of_threads_it_says_what_torch_says():
    logits = zipf(37, 3001)
    found, expected = (way.scan(logits, 20, (1.0, 0.5, 3.0)) for way in (scan_cpu, scan_torch))
    for name in ("maxima", "values", "ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("rests", "rest_means", "block_bounds"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6, err_msg=name)
