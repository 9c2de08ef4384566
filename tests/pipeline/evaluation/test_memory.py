"""The memory of an evaluation does not grow with the table, nor with the students."""

import pytest

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from tests.memory import peak, reset_peak, resident
from tests.pipeline.captured import make_table
from tests.pipeline.evaluation.test_evaluate import make_student, recorded

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]

MOST = 16 << 20
"""Bytes. What the larger table's soft labels take when decoded, or its figures at each position, is more than that."""


def test_neither_ten_times_the_table_nor_three_students_take_more_memory(tiny_teacher, tmp_path):
    small = make_table(tmp_path / "small", tiny_teacher, train=10, held_out=300)
    large = make_table(tmp_path / "large", tiny_teacher, train=10, held_out=3000)
    students = [
        str(make_student(tmp_path / name, tiny_teacher, recorded(small), noise=noise))
        for name, noise in (("one", 0.01), ("two", 0.03), ("three", 0.05))
    ]

    def grown(table, models, name):
        reset_peak()
        before = resident()
        settings = {"table": table.location, "students": models, "report": str(tmp_path / name), "device": "cpu"}
        found = evaluate(EvaluateConfig(**settings, batch_tokens=512))
        return found.positions, peak() - before

    grown(small, students[:1], "warm-up")
    positions, first = grown(small, students[:1], "small")
    more, of_large = grown(large, students[:1], "large")
    _, of_three = grown(large, students, "three")
    assert more > 9 * positions
    assert of_large < first + MOST
    assert of_three < of_large + MOST
