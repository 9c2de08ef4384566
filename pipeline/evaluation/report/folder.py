"""The folder of a report, which is for one table and its students: another evaluation's report is never overwritten."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from softlabel.pipeline.evaluation.unfinished import claim, claimed, write_errors
from softlabel.storage.places import durable

REPORT_FILES = ("report.html", "report.json")
"""Files that an evaluation writes."""


def prepare(folder: Path, table: str, students: Sequence[str], *, dry_run: bool = False) -> Path:
    """The folder for a report, which is created, so that an unwritable one is found before anything is measured.

    It is the given one or, if that has the report of another table or of other students, the first with a number after
    its name that has not. A dry run creates none, and only looks at the permissions.

    Raises:
        UsageError: if the folder can't be created.
    """
    what = {"table": table, "students": sorted(students)}
    with write_errors(folder):
        for number in count(1):
            place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            if dry_run:
                durable.require_permission(place)
            else:
                durable.make_folder(place)
            if next(found for found in _abouts(place, what, dry_run) if found is not None) == what:
                return place
    raise AssertionError


def _abouts(folder: Path, what: dict[str, Any], dry_run: bool) -> Iterator[Mapping[str, Any] | None]:
    """What a folder is about: by its report, by its unfinished evaluation, or by the one that begins there now."""
    yield _reported(folder)
    yield claimed(folder)
    yield what if dry_run else claim(folder, what)
    yield {}


def _reported(folder: Path) -> dict[str, Any] | None:
    """What the report in a folder is about; None without a report."""
    try:
        report = json.loads((folder / "report.json").read_bytes())
        return {"table": report["table"], "students": sorted(student["folder"] for student in report["students"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return {}


def write(page: str, content: bytes, folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.json, each atomically, and return their paths.

    Raises:
        UsageError: if the folder can't be written to.
    """
    html, json = (folder / name for name in REPORT_FILES)
    with write_errors(folder):
        durable.write(json, content)
        durable.write(html, page.encode())
    return html, json
