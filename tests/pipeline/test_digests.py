"""DigestSet behaves like a set of Python, for any bytes and any size of batch."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.pipeline.digests import DigestSet, as_digests, digests, side_by_side

FEW = st.lists(st.binary(min_size=16, max_size=16).map(lambda b: bytes(x % 3 for x in b[:2]) + bytes(14)), max_size=20)
"""Batches with many equal values, nearly all of whose bytes are zero."""


@settings(max_examples=50)
@given(st.lists(st.one_of(FEW, st.lists(st.binary(min_size=16, max_size=16), max_size=20)), max_size=8))
def test_added_values_are_found_and_new_ones_are_reported(batches: list[list[bytes]]) -> None:
    ours, theirs = DigestSet(), set()
    for batch in batches:
        expected = [value not in theirs and value not in batch[:i] for i, value in enumerate(batch)]
        packed = as_digests(pa.chunked_array([pa.array(batch, pa.binary())]))
        assert ours.has(packed).tolist() == [value in theirs for value in batch]
        assert ours.add(packed).tolist() == expected
        theirs |= set(batch)
        assert ours.has(packed).all()


def test_pairs_of_names_and_numbers_are_distinguished() -> None:
    names = digests(["a", "b", "a", "a"])
    pairs = side_by_side(names, np.array([0, 0, 256, 0], np.int32))
    assert pairs.dtype == "S20"
    assert DigestSet().add(pairs).tolist() == [True, True, True, False]
    assert len(side_by_side(names[:0], np.zeros(0, np.int32))) == 0
