"""A sequence depends only on its document, and each token after the first is predicted exactly once."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.pipeline.config.capture import ColumnsConfig, SequencesConfig, TeacherConfig
from softlabel.pipeline.documents.documents import Documents
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.sequences.chunking import cut, split_of, to_sequences
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer, Encoded, tokenizer_files, tokenizer_hash
from softlabel.storage.errors import UsageError
from softlabel.storage.schema import SEQUENCE

SMALL = SequencesConfig(max_tokens=100, context=7)


@pytest.fixture(scope="module")
def checkpoint(tiny_teacher: Path) -> Checkpoint:
    return Checkpoint.find(TeacherConfig(model=str(tiny_teacher)))


def document_table(path: Path, texts: dict[str, str], **columns: list[object]) -> pa.Table:
    pq.write_table(pa.table({"id": list(texts), "text": list(texts.values()), **columns}), path)
    [batch] = Documents(str(path), ColumnsConfig(carry=tuple(columns))).batches()
    assert not batch.rejects
    return batch.documents


def rows_of(texts: dict[str, str], checkpoint: Checkpoint, tmp_path: Path, **columns: list[object]) -> list[dict]:
    documents = document_table(tmp_path / "x.parquet", texts, **columns)
    rows, rejects = to_sequences(documents, DocumentTokenizer(checkpoint, SMALL, "text"), SMALL, 0.5)
    assert not rejects
    return rows.to_pylist()


@settings(max_examples=200)
@given(st.data())
def test_each_token_after_the_first_is_predicted_exactly_once(data: st.DataObject) -> None:
    prefix = np.array(data.draw(st.sampled_from([[], [900], [900, 901]])), np.int32)
    context = data.draw(st.integers(1, 5))
    max_tokens = data.draw(st.integers(len(prefix) + context + 1, 20))
    lengths = np.array(data.draw(st.lists(st.integers(0, 60), max_size=6)), np.int64)
    begins = np.array([bool(len(prefix)) and data.draw(st.booleans()) for _ in lengths], bool)
    ids = np.arange(lengths.sum(), dtype=np.int32)  # each id is its own place
    wanted = np.array([data.draw(st.booleans()) for _ in ids], bool)
    chunks = cut(Encoded(ids, wanted, lengths, begins), prefix, max_tokens, context)

    first = np.cumsum(lengths) - lengths
    predictable = np.ones(len(ids), bool)
    predictable[first[(lengths > 0) & ~begins]] = False  # nothing stands before it
    assert sorted(chunks.ids[chunks.mask].tolist()) == np.flatnonzero(wanted & predictable).tolist()
    for i, (a, b) in enumerate(zip(chunks.offsets[:-1], chunks.offsets[1:], strict=True)):
        row, mask, document = chunks.ids[a:b], chunks.mask[a:b], chunks.documents[i]
        lead = len(prefix) if begins[document] else 0
        assert 2 <= len(row) <= max_tokens
        assert row[:lead].tolist() == prefix[:lead].tolist()
        assert mask.any()
        assert not mask[: max(lead, 1)].any(), "what is not predicted in its own row is not captured"
        body = row[lead:]
        assert (np.diff(body) == 1).all()
        assert first[document] <= body[0] <= body[-1] < first[document] + lengths[document]
        if body[0] > first[document]:
            assert not mask[lead : lead + context].any(), "tokens repeated as context are not predicted again"


def test_rows_follow_the_schema_of_the_table(checkpoint: Checkpoint, documents: Path) -> None:
    [batch] = Documents(str(documents), ColumnsConfig(carry=("source", "year"))).batches()
    tokenizer = DocumentTokenizer(checkpoint, SMALL, "text")
    rows, rejects = to_sequences(batch.documents, tokenizer, SMALL, 0.3)
    assert not rejects
    assert rows.schema == pa.schema([*SEQUENCE, ("source", pa.string()), ("year", pa.int64())])
    rows.validate(full=True)
    texts = dict(zip(*(batch.documents[name].to_pylist() for name in ("document_id", "content")), strict=True))
    for row in rows.to_pylist():
        ids, mask = np.array(row["token_ids"], "<i4"), np.array(row["loss_mask"])
        assert row["key"] == hashlib.blake2b(ids.tobytes() + mask.tobytes(), digest_size=16).digest()
        assert (row["tokens"], row["positions"]) == (len(ids), mask.sum())
        assert row["split"] == split_of(row["document_id"], 0.3)
        assert row["source"] == row["document_id"].rpartition("-")[2]
        if row["chunks"] == 1:
            text = checkpoint.tokenizer.decode(ids)
            assert text == texts[row["document_id"]] + "<|im_end|>", "a text ends with the token that says so"
            assert mask.tolist() == [False] + [True] * (len(ids) - 1)
    assert rows["chunks"].to_pylist().count(1) < rows.num_rows


def test_a_sequence_depends_only_on_its_document(checkpoint: Checkpoint, tmp_path: Path) -> None:
    texts = {f"d{i}": "some words and more of them " * (i * 4 + 1) for i in range(8)}
    rows = rows_of(texts, checkpoint, tmp_path)
    backwards = rows_of(dict(reversed(texts.items())), checkpoint, tmp_path, source=["x"] * 8)
    single = rows_of({"d5": texts["d5"]}, checkpoint, tmp_path)
    by_key = {(row["document_id"], row["chunk"]): row for row in rows}
    assert len(by_key) == len(rows) == len(backwards)
    for row in backwards + single:
        row.pop("source", None)
        assert row == by_key[row["document_id"], row["chunk"]]


def test_tokenizing_in_parts_does_not_change_the_rows(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {f"d{i}": "some words " * (i + 1) for i in range(20)}
    rows = rows_of(texts, checkpoint, tmp_path)
    monkeypatch.setattr("softlabel.pipeline.sequences.chunking._CHARACTERS", 100)
    assert rows_of(texts, checkpoint, tmp_path) == rows


def test_a_document_of_a_million_characters_becomes_thousands_of_chunks(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its thousands of chunks do not copy the whole document."""
    rows = rows_of({"a": "some words " * 100_000}, checkpoint, tmp_path)
    assert len(rows) == rows[0]["chunks"] > 2000
    assert sum(row["positions"] for row in rows) > 200_000


def test_equal_texts_have_equal_keys_and_their_own_rows(checkpoint: Checkpoint, tmp_path: Path) -> None:
    one, two = rows_of({"a": "the same", "b": "the same"}, checkpoint, tmp_path)
    assert one["key"] == two["key"]
    assert (one["document_id"], two["document_id"]) == ("a", "b")


def test_special_tokens_in_text_stay_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    text = "An <|im_end|> is <|endoftext|> no end."
    [row] = rows_of({"a": text}, checkpoint, tmp_path)
    specials = {checkpoint.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}
    assert not specials & set(row["token_ids"][:-1])
    assert checkpoint.tokenizer.decode(row["token_ids"][:-1]) == text


def with_tokenizer(checkpoint: Checkpoint, tmp_path: Path, **changes: object) -> Checkpoint:
    """The tiny teacher with a changed tokenizer."""
    import shutil

    from tokenizers import processors

    folder = tmp_path / "teacher"
    shutil.copytree(checkpoint.folder, folder)
    changed = Checkpoint.find(TeacherConfig(model=str(folder))).tokenizer
    if changes.pop("bos", False):
        changed.bos_token = "<|im_start|>"
        post = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
        changed.backend_tokenizer.post_processor = post
    for name, value in changes.items():
        setattr(changed, name, value)
    changed.save_pretrained(folder)
    return Checkpoint.find(TeacherConfig(model=str(folder)))


def test_every_chunk_begins_with_bos_if_the_tokenizer_adds_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    texts = {"a": "some words " * 200}
    plain, rows = rows_of(texts, checkpoint, tmp_path), None
    rows = rows_of(texts, with_tokenizer(checkpoint, tmp_path, bos=True), tmp_path)
    assert len(rows) > 2
    assert all(row["token_ids"][0] == 1 and not row["loss_mask"][0] for row in rows)
    assert rows[0]["loss_mask"][1], "the first word is predicted from BOS"
    assert sum(row["positions"] for row in rows) == sum(row["positions"] for row in plain) + 1


@pytest.mark.parametrize("content", ["text", "chat", "completion"])
def test_a_pad_token_equal_to_the_end_token_keeps_the_end_token(
    content: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    contents = {"text": "some words", "chat": json.dumps(messages), "completion": '{"prompt": "a", "completion": " b"}'}
    same = with_tokenizer(checkpoint, tmp_path, pad_token="<|im_end|>")
    assert same.tokenizer.pad_token_id == same.tokenizer.eos_token_id
    found, expected = (DocumentTokenizer(c, SMALL, content).encode([contents[content]])[0] for c in (same, checkpoint))
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.wanted.tolist() == expected.wanted.tolist()
    assert found.wanted[found.ids == same.tokenizer.eos_token_id][-1], "a student learns where to stop"


def test_a_document_of_one_token_is_rejected_if_there_is_no_end_token(checkpoint: Checkpoint, tmp_path: Path) -> None:
    endless = with_tokenizer(checkpoint, tmp_path, eos_token=None)
    documents = document_table(tmp_path / "x.parquet", {"one": "a", "two": "a b"})
    rows, rejects = to_sequences(documents, DocumentTokenizer(endless, SMALL, "text"), SMALL, 0)
    assert rows["document_id"].to_pylist() == ["two"]
    assert [tuple(reject) for reject in rejects] == [("one", "it has no token that can be predicted")]


def test_the_split_depends_only_on_the_id_and_grows_with_the_fraction() -> None:
    names = [str(i) for i in range(4000)]
    splits = {f: [split_of(name, f) == "eval" for name in names] for f in (0.0, 0.1, 0.5)}
    assert not any(splits[0.0])
    assert 0.08 < sum(splits[0.1]) / len(names) < 0.12
    assert all(more for less, more in zip(splits[0.1], splits[0.5], strict=True) if less), "a larger share keeps it"


def test_a_tokenizer_is_identified_by_its_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    files = tokenizer_files(checkpoint.folder)
    assert [path.name for path in files] == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    other = with_tokenizer(checkpoint, tmp_path, bos=True)
    assert tokenizer_hash(other.folder) != tokenizer_hash(checkpoint.folder)


def test_no_room_for_a_prediction_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with_bos = with_tokenizer(checkpoint, tmp_path, bos=True)
    with pytest.raises(UsageError, match="no room"):
        DocumentTokenizer(with_bos, SequencesConfig(max_tokens=3, context=2), "text")
