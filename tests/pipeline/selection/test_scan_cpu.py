"""The CPU kernels give the same results as torch; the selection's tests compare the numbers with a reference."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.pipeline.selection import scan_cpu, scan_torch
from softlabel.pipeline.selection.scan import Draws
from tests.pipeline.selection.test_select import zipf


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 13, 1000])
def test_every_row_is_processed_once(count):
    done = Counter()
    scan_cpu._on_all_cores(lambda part: done.update(range(count)[part]), count)
    assert done == Counter(range(count))


def test_an_error_in_a_thread_is_raised_in_the_caller():
    def fail(part: slice) -> None:
        if part.start > 0:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        scan_cpu._on_all_cores(fail, 100)


def test_scans_agree_with_torch_for_any_number_of_threads():
    logits = zipf(37, 3001)
    found, expected = (way.scan(logits, 20, (1.0, 0.5, 3.0)) for way in (scan_cpu, scan_torch))
    for name in ("maxima", "values", "ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("rests", "rest_means", "block_bounds"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6, err_msg=name)


@st.composite
def rows(draw) -> tuple[torch.Tensor, int]:
    """A few short rows of logits with many ties and impossible ids; and the number of highest ids to return."""
    shape = draw(st.integers(1, 9)), draw(st.one_of(st.integers(1, 70), st.sampled_from([128, 192, 1000])))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
    special = [0.0, -0.0, -np.inf, torch.finfo(kind).min]
    logits = random.choice([*random.normal(0, draw(st.sampled_from([1, 30])), 40), *special], shape)
    logits[(logits < -1e4).all(1), 0] = 1
    return torch.from_numpy(logits).to(kind), draw(st.integers(1, 20))


@given(rows(), st.integers(0, 2**32))
@settings(max_examples=300)
def test_scans_and_draws_agree_with_torch(rows, seed):
    logits, singles = rows
    found, expected = (way.scan(logits, singles, (1.0, 0.5, 3.0)) for way in (scan_cpu, scan_torch))
    for name in ("maxima", "values", "ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    nothing = ~expected.rests[:, 0].isfinite()
    expected.rest_means[nothing] = expected.block_bounds[nothing] = 0  # undefined there
    for name in ("rests", "rest_means", "block_bounds"):
        found_, expected_ = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(found_, expected_, rtol=1e-6, atol=1e-5, err_msg=name)
    random = torch.Generator().manual_seed(seed)
    head = torch.randint(singles + 1, (len(logits), 1), generator=random) > torch.arange(singles)
    outside = expected.values[:, :-1].masked_fill(head, -torch.inf)
    tail = outside.isfinite().any(1) | ~nothing
    counts = torch.randint(8, (len(logits),), generator=random) * tail
    uniforms = torch.rand(len(logits), 7, 2, dtype=torch.float64, generator=random)
    drawn = [way.draw(logits, expected, outside, counts, uniforms) for way in (scan_cpu, scan_torch)]
    for name, one, other in zip(Draws._fields, *drawn, strict=True):
        assert torch.equal(one, other), name
    assert drawn[0].draws.sum() == counts.sum()
