"""Tells whether a location has a table or a view, and explains why a table can't be opened."""

from pathlib import Path

from softlabel.storage import log_files
from softlabel.storage.errors import IntegrityError, SoftlabelError, TableNotFoundError, UsageError, cause
from softlabel.storage.log_files import LOG, commit_file, commits
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import Place, inaccessible
from softlabel.storage.state import Chain
from softlabel.storage.versions import parse, spans

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


def open_error(location: str, version: int | None, error: Exception) -> SoftlabelError:
    """The error for a table that delta-rs could not open.

    Args:
        location: location as the caller gave it.
        version: requested version; None for the newest.
        error: error of delta-rs.
    """
    path = parse(location)[0]
    found = cause(error)
    if is_view(path):
        return UsageError(
            "this is a view over several tables, and a view can only be read",
            expected="a table",
            found="a view; softlabel inspect lists its tables",
            where=path,
            do="run the command on one of its tables, then make a new view with softlabel mix",
        )
    if not exists(path):
        kind = "a file" if Path(path).is_file() else "a folder without a table" if Path(path).is_dir() else "nothing"
        return TableNotFoundError(
            "there is no soft-label table here",
            expected="a table made by softlabel capture",
            found=kind,
            where=location,
            do="check the path, or run softlabel capture",
        )
    if version is not None and version not in commits(place_of(path)):
        return TableNotFoundError(
            f"there is no version {version} of this table",
            expected=f"one of {spans(commits(place_of(path)))}",
            where=location,
            do="run softlabel history to list its versions",
        )
    if isinstance(error, OSError):  # the log could not be read at all, so nothing shows that it is damaged
        return inaccessible(place_of(path).where(LOG), found)
    return IntegrityError(
        "the table's log can't be read",
        expected="a Delta log as softlabel wrote it",
        found=found,
        where=place_of(path).where(_first_damaged_commit(place_of(path)) or LOG),
        do="restore this from a copy of the table",
    )


def _first_damaged_commit(place: Place) -> str | None:
    """The first damaged commit; None if only the newest commit or a checkpoint may be damaged."""
    chain = Chain()
    for version in sorted(commits(place)):
        try:
            chain.add(version, place.read(commit_file(version)))
        except (OSError, ValueError):
            return commit_file(version)
    return next(iter(chain.damaged), None)
