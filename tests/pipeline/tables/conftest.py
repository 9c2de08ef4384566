"""Small tables that a capture made, of texts and of chats in which everything is hostile."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.storage.table import Table

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202eevil"
TEXT = f"{HOSTILE} שלום 😀 </script><img src=x onerror=alert(2)> & \x07\tend\r\n" + "x" * 300


def captured(folder: Path, teacher: Path, documents: list[dict[str, object]], **settings: object) -> Table:
    """A table of these documents, or with these documents added."""
    pq.write_table(pa.Table.from_pylist(documents), folder.with_suffix(".parquet"))
    given = {
        "documents": str(folder.with_suffix(".parquet")),
        "table": str(folder),
        "teacher": {"model": str(teacher), "dtype": "float32", "device": "cpu"},
        **settings,
    }
    capture(CaptureConfig.model_validate(given))
    return Table.open(str(folder))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Table:
    """Six short documents, a hostile one, and one of several chunks, of which there are two texts."""
    folder = tmp_path_factory.mktemp("texts") / "table"
    settings = {
        "columns": {"carry": ["source", "year"]},
        "sequences": {"max_tokens": 64, "context": 4},
        "shards": {"eval_fraction": 0.3, "row_group_sequences": 4},
    }
    short = [{"id": f"short-{i}", "text": f"This is text {i}.", "source": "web", "year": 2000 + i} for i in range(6)]
    hostile = {"id": HOSTILE, "text": TEXT[:120], "source": f"{HOSTILE}|`*", "year": 1}
    long = {"id": "long", "text": "One of many words. " * 20, "source": "book", "year": 2}
    captured(folder, tiny_teacher, [*short, hostile, long], **settings)
    return captured(folder, tiny_teacher, [long | {"text": "Some other words! " * 10}], **settings)


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Table:
    """Two chats with two answers each."""

    def chat(*turns: str) -> list[dict[str, str]]:
        roles = ("user", "assistant") * len(turns)
        return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]

    documents = [
        {"id": "a", "messages": chat("What is a?", "It is one.", "And b?", "Two.")},
        {"id": "b", "messages": chat(TEXT[:60], TEXT[20:90])},
    ]
    folder = tmp_path_factory.mktemp("chats") / "table"
    return captured(folder, tiny_teacher, documents, columns={"messages": "messages"})
