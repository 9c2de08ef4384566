"""Data sets that the library ``datasets`` has saved (``save_to_disk``), read without that library.

Each is a folder of .arrow files. Its state.json lists them, because the library leaves files of its cache beside them.
"""

import json
from pathlib import PurePosixPath

from softlabel.pipeline.documents.paths import File
from softlabel.pipeline.documents.reading import reading
from softlabel.storage.errors import DocumentsError, printable


def without_caches(files: list[File]) -> list[File]:
    """The files of a folder without those .arrow files that a saved data set does not list.

    Raises:
        DocumentsError: if a listed file is missing, or rows were chosen without being written.
    """
    listed: dict[str, set[str]] = {}
    present = {file.name for file in files}
    for file in files:
        folder, name = PurePosixPath(file.name).parent, PurePosixPath(file.name).name
        if name == "state.json" and (state := _state(file)):
            names = {str(folder / str(each["filename"])) for each in state["_data_files"]}
            if (missing := sorted(names - present)) or state.get("_indices_data_files"):
                raise DocumentsError(
                    "a saved data set can't be read",
                    expected="every file that its state.json lists, and no separate list of its rows",
                    found=printable(f"no {', '.join(missing[:5])}") if missing else "a list of rows beside the files",
                    where=printable(file.address),
                    do="save the data set again with save_to_disk",
                )
            listed[str(folder)] = names

    def belongs(file: File) -> bool:
        names = listed.get(str(PurePosixPath(file.name).parent))
        return file.format != ".arrow" or names is None or file.name in names

    return [file for file in files if belongs(file)]


def _state(file: File) -> dict[str, list[dict[str, str]]] | None:
    """The content of a state.json, if it is one of ``datasets``."""
    with reading(file, "state.json"), file.open() as content:
        state = json.loads(content.read())
    is_own = isinstance(state, dict) and isinstance(state.get("_data_files"), list)
    return state if is_own else None
