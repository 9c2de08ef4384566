"""Names and contents of documents can't hang a capture, and can't write into a terminal."""

import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.pipeline.config.capture import ColumnsConfig
from softlabel.pipeline.documents.documents import Documents
from softlabel.storage.errors import DocumentsError, UsageError

ESCAPE = "\x1b]0;owned\x07\x9b31m\r"


def names(path: Path, **columns: str | None) -> list[str]:
    batches = list(Documents(str(path), ColumnsConfig(**columns)).batches())
    return [name for batch in batches for name in batch.documents["document_id"].to_pylist()]


def test_pipes_sockets_and_loops_in_a_folder_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    os.mkfifo("a.jsonl")
    Path("b.jsonl").symlink_to("a.jsonl")
    Path("c.jsonl").symlink_to("/dev/zero")
    Path("loop").symlink_to(".")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("d.jsonl")
        (tmp_path / "elsewhere.jsonl").write_text('{"id": "linked", "text": "x"}\n')
        Path("e.jsonl").symlink_to("../elsewhere.jsonl")
        assert names(folder) == names(folder / "*.jsonl") == ["linked"]
        for special in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"):
            with pytest.raises(UsageError, match="a pipe, a socket or a device"):
                names(folder / special)


def test_a_link_to_a_missing_file_is_an_error_and_not_fewer_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "x"}\n')
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DocumentsError, match=r"b\.jsonl"):
            names(path)


def test_linked_folders_are_read_once_under_their_own_names_first(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path in (folder / "a" / "own.txt", elsewhere / "deep" / "far.txt", elsewhere / "near.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (folder / "b").symlink_to(elsewhere)
    (folder / "A").symlink_to(folder / "a")
    (elsewhere / "again").symlink_to("../elsewhere/deep")
    (elsewhere / "back").symlink_to(folder)
    assert names(folder) == ["a/own.txt", "b/deep/far.txt", "b/near.txt"]


def test_a_folder_that_can_not_be_listed_is_an_error_and_not_fewer_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "x"}\n')
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def denied(path: Any) -> Any:  # root, as whom these tests may run, may list every folder
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DocumentsError, match=r"folder of documents can't be read[\s\S]*closed"):
        names(tmp_path)


def test_errors_show_terminal_controls_of_names_and_columns_escaped(tmp_path: Path) -> None:
    folder = tmp_path / f"a{ESCAPE}\nb"
    folder.mkdir()
    record = {"id": 1, f"te{ESCAPE}\nxt": "x"}
    (folder / "x.jsonl").write_text(json.dumps(record))
    (folder / "y.csv").write_text(f"id,te{ESCAPE}xt\n1,x\n")
    pq.write_table(pa.table({name: [value] for name, value in record.items()}), folder / "z.parquet")
    (folder / f"{ESCAPE}.jsonl.gz").write_bytes(b"no gzip")
    (folder / "v.json").write_text("[1, 2")
    for name in ("x.jsonl", "y.csv", "z.parquet", f"{ESCAPE}.jsonl.gz", "v.json", "nowhere", "*"):
        with pytest.raises((UsageError, DocumentsError)) as caught:
            names(folder / name)
        shown = str(caught.value)
        assert all(character.isprintable() or character == "\n" for character in shown), shown
        assert len(shown.splitlines()) < 8
        assert r"\x1b]0;owned\x07" in shown


def test_a_hostile_id_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": f"{ESCAPE}\n", "text": "x"}))
    assert names(tmp_path) == [f"{ESCAPE}\n"]
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / f"{ESCAPE}\n.txt").write_text("x")
    assert names(tmp_path) == [f"{ESCAPE}\n.txt"]
