"""A student's labels as groups of its teacher's classes."""

import numpy as np
import pytest

from softlabel.pipeline.students.labels import LabelMap
from softlabel.storage.errors import UsageError

CLASSES = ("law", "history", "psalms", "prophets", "gospels")
LOGPROBS = np.log(np.array([[0.4, 0.3, 0.2, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]]) + 1e-300)


def test_without_labels_a_student_has_its_teachers_classes():
    labels = LabelMap.of((), CLASSES)
    assert labels.names == CLASSES
    merged, unmapped = labels.merge(LOGPROBS)
    np.testing.assert_allclose(np.exp(merged), np.exp(LOGPROBS), atol=1e-7)
    assert unmapped.tolist() == pytest.approx([0, 0], abs=1e-12)


def test_several_classes_become_one_label():
    labels = LabelMap.of(("verse=psalms,prophets", "prose=law,history,gospels"), CLASSES)
    merged, unmapped = labels.merge(LOGPROBS)
    np.testing.assert_allclose(np.exp(merged), [[0.3, 0.7], [0, 1]], atol=1e-7)
    assert unmapped.tolist() == pytest.approx([0, 0], abs=1e-12)
    assert labels.ids(["psalms", "verse", "gospels", None]).tolist() == [0, 0, 1, -1]


def test_a_subset_is_renormalized_and_the_rest_reported():
    labels = LabelMap.of(("law", "psalms"), CLASSES)
    merged, unmapped = labels.merge(np.array([[-np.inf, -np.inf, -np.inf, -np.inf, 0.0], LOGPROBS[0]]))
    assert np.isnan(merged[0]).all()
    np.testing.assert_allclose(np.exp(merged[1]), [2 / 3, 1 / 3], atol=1e-6)
    assert unmapped.tolist() == pytest.approx([1, 0.4])
    assert labels.ids(["history", "law"]).tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("low", "psalms"), "did you mean 'law'"),
        (("a=law,history", "b=history"), "history belongs to two labels"),
        (("law=history", "b=law"), "law is the name of a class that is not part of the label law"),
        (("a=law", "a=history"), "each with a different name"),
        (("a=law,history",), "at least two labels"),
        (("a=", "b=law"), "no class ''"),
    ],
)
def test_labels_that_do_not_fit_the_classes_are_refused(labels, message):
    with pytest.raises(UsageError, match=message):
        LabelMap.of(labels, CLASSES)


def test_an_unknown_label_of_a_document_is_named_in_the_error():
    with pytest.raises(UsageError, match="'lore'"):
        LabelMap.of((), CLASSES).ids(["law", "lore"])
