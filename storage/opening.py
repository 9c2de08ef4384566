"""Tells whether a location has a table or a view, and explains why a table can't be opened."""

from contextlib import suppress
from pathlib import Path

from softlabel.storage.errors import SoftlabelError, TableNotFoundError, UsageError
from softlabel.storage.log import files as log_files
from softlabel.storage.log.files import commits
from softlabel.storage.places.open import place_of
from softlabel.storage.records.versions import parse, spans

VIEW_FILE = "view.json"
"""The file that defines a view, in the view's folder."""


def is_view(location: str) -> bool:
    """Whether a location has a view over tables (``storage.views.view``), and not a table."""
    try:
        place_of(location).stat(VIEW_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def exists(location: str) -> bool:
    """Whether a location has a view or a Delta table, made by softlabel or another program."""
    path = parse(location)[0]
    return log_files.exists(place_of(path)) or is_view(path)


def open_error(location: str, version: int | None) -> SoftlabelError:
    """The error for a location without a table, or a table without a version.

    Args:
        location: location as the caller gave it.
        version: requested version; None for the newest.
    """
    path = parse(location)[0]
    if is_view(path):
        return UsageError(
            "this is a view over several tables, and a view can only be read",
            expected="a table",
            found="a view; softlabel inspect lists its tables",
            where=path,
            do="run the command on one of its tables, then make a new view with softlabel mix",
        )
    there = commits(place_of(path))
    if version is None or not there:
        kind = "nothing"
        with suppress(OSError):  # the path may be too long
            kind = "a file" if Path(path).is_file() else "a folder without a table" if Path(path).is_dir() else kind
        return TableNotFoundError(
            "there is no soft-label table here",
            expected="a table made by softlabel capture",
            found=kind,
            where=location,
            do="check the path, or run softlabel capture",
        )
    return TableNotFoundError(
        f"there is no version {version} of this table",
        expected=f"one of {spans(there)}",
        where=location,
        do="run softlabel history to list its versions",
    )
