"""What is at a location: a table, a view, or neither; and why a table there can't be opened."""

from softlabel.storage import commit_files
from softlabel.storage.commit_files import LOG, commit_file, commits
from softlabel.storage.errors import IntegrityError, SoftlabelError, TableNotFoundError, UsageError, cause
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import Place, inaccessible
from softlabel.storage.state import Chain
from softlabel.storage.versions import parse, spans

VIEW_FILE = "view.json"
"""In the folder of a view."""


def is_view(location: str) -> bool:
    """Whether there is a view over tables (``storage.views.view``), which is no table itself."""
    try:
        place_of(location).stat(VIEW_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def exists(location: str) -> bool:
    """Whether there is a table, of softlabel's or another's making, or a view."""
    path = parse(location)[0]
    return commit_files.exists(place_of(path)) or is_view(path)


def unopened(location: str, version: int | None, error: Exception) -> SoftlabelError:
    """What to say of a table that delta-rs could not open.

    Args:
        location: as it was asked for.
        version: that is meant; None for the newest.
        error: what delta-rs said.
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
        return TableNotFoundError(
            "there is no soft-label table here",
            expected="a table made by softlabel capture",
            found=found,
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
    if isinstance(error, OSError):  # delta-rs has read nothing yet that could be damaged
        return inaccessible(place_of(path).where(LOG), found)
    return IntegrityError(
        "the table's log can't be read",
        expected="a Delta log as softlabel wrote it",
        found=found,
        where=place_of(path).where(_damaged(place_of(path)) or LOG),
        do="restore this from a copy of the table",
    )


def _damaged(place: Place) -> str | None:
    """The first commit that is not the one that was written; None if it is the newest, or a checkpoint."""
    chain = Chain()
    for version in sorted(commits(place)):
        try:
            chain.add(version, place.read(commit_file(version)))
        except (OSError, ValueError):
            return commit_file(version)
    return next(iter(chain.damaged), None)
