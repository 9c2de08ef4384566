"""Two captures that overlap: what one has committed, the other does not run its teacher over, even if planned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softlabel.pipeline.capturing import labelling
from softlabel.pipeline.capturing.capture import CaptureReport, capture
from softlabel.pipeline.capturing.copies import copy_rows, own_order
from softlabel.pipeline.capturing.job import resolve
from softlabel.pipeline.capturing.plan import plan
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.tables import ReprocessConfig
from softlabel.pipeline.progress import Progress, Watch
from softlabel.pipeline.tables.reprocess import reprocess
from softlabel.storage.errors import ProvenanceError
from softlabel.storage.table import Table
from tests.pipeline.capturing.test_capture import rows_of, settings, texts, write


def capture_overtaken(config: CaptureConfig, by: CaptureConfig, watch: Watch) -> tuple[CaptureReport, CaptureReport]:
    """A capture during which, right after its plan, another capture runs from beginning to end."""
    first: list[CaptureReport] = []

    def overtaken(step: Callable[..., Any], /) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            result = step(*arguments)
            if step is plan:
                first.append(capture(by))
            return result

        return run

    return capture(config, watch, overtaken), first[0]


def test_a_capture_overtaken_by_another_runs_no_teacher(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_teacher, write(tmp_path / "a.parquet", texts(150)), tmp_path / "t")
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append(progress)
        if progress.stage == "capture":
            monkeypatch.setattr(labelling, "load_teacher", None)

    last, first = capture_overtaken(config, config, watch)
    assert (first.sequences, last.sequences, last.copied, last.positions) == (150, 0, 0, 0)
    assert (seen[-1].stage, seen[-1].done, seen[-1].total) == ("capture", first.positions, first.positions)
    assert len(rows_of(tmp_path / "t")) == 150


def test_texts_that_another_capture_added_under_other_ids_are_copied(tiny_teacher: Path, tmp_path: Path) -> None:
    same = {f"same-{name}": text for name, text in texts(40).items()}
    other = settings(tiny_teacher, write(tmp_path / "a.parquet", same), tmp_path / "t")
    config = settings(
        tiny_teacher, write(tmp_path / "b.parquet", texts(50) | {"d3-twin": texts(4)["d3"]}), tmp_path / "t"
    )
    seen: list[Progress] = []
    last, first = capture_overtaken(config, other, seen.append)
    assert (first.sequences, last.sequences, last.copied) == (40, 10, 41)
    copied = [(progress.done, progress.total) for progress in seen if progress.stage == "copy"]
    assert (copied[0][1], copied[-1]) == (41, (41, 41))
    asked = [progress for progress in seen if progress.stage == "capture"][-1]
    assert asked.done == asked.total == first.positions + last.positions
    assert 0 < asked.details["probability in the head"] < 1
    rows = rows_of(tmp_path / "t")
    assert len(rows) == len(set(rows)) == 91
    again = capture(config)
    assert (again.sequences, again.copied, again.unchanged) == (0, 0, 51)


def test_nothing_is_copied_into_a_table_that_was_replaced(tiny_teacher: Path, tmp_path: Path) -> None:
    capture(settings(tiny_teacher, write(tmp_path / "a.parquet", texts(20)), tmp_path / "t"))
    twins = {f"twin-{name}": text for name, text in texts(20).items()}
    job = resolve(settings(tiny_teacher, write(tmp_path / "b.parquet", twins), tmp_path / "t"))
    todo = plan(job, tmp_path / "plan")
    split = {"source": str(tmp_path / "t"), "shards": {"eval_fraction": 0.5}}
    version = reprocess(ReprocessConfig.model_validate(split)).version
    with pytest.raises(ProvenanceError, match="eval_fraction"):
        copy_rows(job, todo.copies[0])
    assert Table.open(str(tmp_path / "t")).version == version


def test_each_run_has_its_own_order_of_shards_except_for_the_first_of_a_new_table(tmp_path: Path) -> None:
    shards = [tmp_path / str(number) for number in range(30)]
    one, other = (own_order(shards, str(tmp_path / "new")) for _ in range(2))
    assert one[0] == other[0] == shards[0]
    assert sorted(one) == sorted(other) == sorted(shards)
    assert list(one) != list(other)
