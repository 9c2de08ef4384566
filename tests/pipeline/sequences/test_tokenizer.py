"""Which tokens of a document are captured: completions without prompts, selected turns; and special tokens in text."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from softlabel.pipeline.config.capture import ColumnsConfig, SequencesConfig, TeacherConfig
from softlabel.pipeline.documents.documents import Documents, Reject
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.sequences.chunking import to_sequences
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer, mask_rule
from softlabel.storage.errors import UsageError

CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}!{% endgeneration %}"
    "{% else %}Q:{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def checkpoint(tiny_teacher: Path) -> Checkpoint:
    return Checkpoint.find(TeacherConfig(model=str(tiny_teacher)))


def with_bos(checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The tiny teacher with a tokenizer that puts <|im_start|> before every text."""
    folder = shutil.copytree(checkpoint.folder, tmp_path / "bos")
    tokenizer = Checkpoint.find(TeacherConfig(model=str(folder))).tokenizer
    start = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.backend_tokenizer.post_processor = start
    tokenizer.save_pretrained(folder)
    return Checkpoint.find(TeacherConfig(model=str(folder)))


def captured(
    checkpoint: Checkpoint, tmp_path: Path, *records: dict[str, object], **settings: object
) -> tuple[list[dict[str, object]], list[str], list[Reject]]:
    """Rows of the records, the text of what each row captures, and the rejects."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"id": i, **record}) + "\n" for i, record in enumerate(records)))
    is_pair = "prompt" in records[0]
    names = {"messages": "messages"} if "messages" in records[0] else {}
    columns = ColumnsConfig(prompt="prompt", completion="completion") if is_pair else ColumnsConfig(**names)
    [batch] = Documents(str(path), columns).batches()
    config = SequencesConfig(**settings)
    tokenizer = DocumentTokenizer(checkpoint, config, columns.content)
    table, rejects = to_sequences(batch.documents, tokenizer, config, 0)
    rows = table.to_pylist()
    masked = [zip(row["token_ids"], row["loss_mask"], strict=True) for row in rows]
    texts = [checkpoint.tokenizer.decode([i for i, mask in pairs if mask]) for pairs in masked]
    return rows, texts, [*batch.rejects, *rejects]


def pair(prompt: object, completion: object) -> dict[str, object]:
    return {"prompt": prompt, "completion": completion}


def test_the_completion_and_its_end_are_captured(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows, texts, rejects = captured(
        checkpoint, tmp_path, pair("What is a class?", " A type."), pair("", "No prompt at all")
    )
    assert not rejects
    assert texts[0] == " A type.<|im_end|>"
    assert texts[1].endswith("prompt at all<|im_end|>")
    assert checkpoint.tokenizer.decode(rows[0]["token_ids"]) == "What is a class? A type.<|im_end|>"


def test_a_prompt_is_tokenized_separately(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ids = checkpoint.tokenizer.encode
    assert len(ids("exception")) < len(ids("excep")) + len(ids("tion")), "a token of the whole spans both"
    [row], [text], _ = captured(checkpoint, tmp_path, pair("excep", "tion"))
    prompt = ids("excep")
    assert row["token_ids"][: len(prompt)] == prompt
    assert row["loss_mask"][: len(prompt)] == [False] * len(prompt)
    assert text == "tion<|im_end|>"


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_unknown_characters_of_the_completion_are_captured_and_those_of_the_prompt_are_not(
    kind: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """One unknown token stands for any number of characters, so it may span the prompt's end and the completion."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True) if kind == "BPE" else models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = {"special_tokens": ["<unk>", "<|im_end|>"], "show_progress": False}
    trainer = trainers.BpeTrainer(**special) if kind == "BPE" else trainers.UnigramTrainer(unk_token="<unk>", **special)
    backend.train_from_iterator(["a b ab abc"] * 20, trainer)
    folder = shutil.copytree(checkpoint.folder, tmp_path / kind)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>").save_pretrained(folder)
    limited = Checkpoint.find(TeacherConfig(model=str(folder)))
    records = [
        pair("ab \N{SNOWMAN}", "\N{SNOWMAN}"),
        pair("ab \N{SNOWMAN}", "\N{SNOWMAN}\N{SNOWMAN}c"),
        pair("ab ", "c"),
    ]
    rows, texts, rejects = captured(limited, tmp_path, *records)
    assert not rejects
    assert [text.replace("▁", "").replace(" ", "") for text in texts] == [
        "<unk><|im_end|>",
        "<unk>c<|im_end|>",
        "c<|im_end|>",
    ]
    for row, record in zip(rows, records, strict=True):
        prompt = limited.tokenizer.encode(record["prompt"])
        assert row["token_ids"][: len(prompt)] == prompt
        assert not any(row["loss_mask"][: len(prompt)])


def test_a_completion_without_tokens_is_rejected(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Capturing only its end token would be wrong."""
    folder = shutil.copytree(checkpoint.folder, tmp_path / "deaf")
    tokenizer = Checkpoint.find(TeacherConfig(model=str(folder))).tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\N{SNOWMAN}", "")
    tokenizer.save_pretrained(folder)
    deaf = Checkpoint.find(TeacherConfig(model=str(folder)))
    none = "the tokenizer has no tokens for the text to capture"
    _, texts, rejects = captured(deaf, tmp_path, pair("good", " one"), pair("good", "\N{SNOWMAN}"))
    assert (texts, rejects) == ([" one<|im_end|>"], [Reject("1", none)])
    chats = [{"messages": [CHAT[0], {"role": "assistant", "content": text}]} for text in ("One", "\N{SNOWMAN}")]
    _, texts, rejects = captured(deaf, tmp_path, *chats)
    assert (texts, rejects) == (["One<|im_end|>"], [Reject("1", none)])


def test_every_token_of_the_completion_is_captured_after_a_bos(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bos = with_bos(checkpoint, tmp_path)
    rows, texts, _ = captured(bos, tmp_path, pair("", "first word"), pair("Say it:", " so"))
    assert texts == ["first word<|im_end|>", " so<|im_end|>"]
    assert all(row["token_ids"][0] == 1 for row in rows)


def test_chunks_that_are_all_prompt_are_left_out(checkpoint: Checkpoint, tmp_path: Path) -> None:
    long = pair("some words " * 100, "and more words " * 20)
    rows, texts, _ = captured(checkpoint, tmp_path, long, max_tokens=64, context=8)
    assert "".join(texts) == "and more words " * 20 + "<|im_end|>"
    assert [row["chunk"] for row in rows] == list(range(len(rows)))
    assert sum(row["tokens"] for row in rows) < len(checkpoint.tokenizer.encode(long["prompt"]))


def test_messages_as_prompt_and_completion_form_one_chat(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows, texts, rejects = captured(
        checkpoint,
        tmp_path,
        pair(CHAT[:3], CHAT[3:]),
        pair("plain", "text next to it"),
        pair(CHAT[:1], CHAT[1:]),
        pair(CHAT[:2], CHAT[2:3]),
        pair(CHAT[:1], "text"),
    )
    assert rows[0]["token_ids"] == checkpoint.tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert texts[0] == "Second.<|im_end|>"
    assert texts[1].endswith("text next to it<|im_end|>")
    assert texts[2] == "First.<|im_end|>Second.<|im_end|>"
    assert sorted(rejects) == [
        Reject("3", "the completion has no assistant message"),
        Reject("4", "the prompt must be a string, but is list"),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (pair(None, "x"), "the prompt is null"),
        (pair("x", None), "the completion is null"),
        (pair("x", " \n"), "the completion is empty"),
        (pair(7, "x"), "the prompt must be a string, but is int"),
        (pair("\ud83d", "x"), "the text is not valid UTF-8"),
        (pair([], CHAT[1:]), "the prompt has no messages"),
        (
            pair(CHAT[:1], [{"role": "assistant"}]),
            "message 0 (counting from 0) has neither text content nor tool calls",
        ),
    ],
)
def test_an_invalid_prompt_or_completion_is_rejected(
    record: dict[str, object], reason: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    _, _, rejects = captured(checkpoint, tmp_path, pair("good", " one"), record)
    assert rejects == [Reject("1", reason)]


@pytest.mark.parametrize("template", ["SmolLM2", "marked"])
def test_every_turn_or_the_last_is_captured(
    template: str, checkpoint: Checkpoint, smollm2: Path, tmp_path: Path
) -> None:
    teacher, ends = Checkpoint.find(TeacherConfig(model=str(smollm2))), "<|im_end|>"
    if template == "marked":
        folder, ends = shutil.copytree(checkpoint.folder, tmp_path / "marked"), "!"
        (folder / "chat_template.jinja").write_text(MARKED)
        teacher = Checkpoint.find(TeacherConfig(model=str(folder)))
    every, texts, _ = captured(teacher, tmp_path, {"messages": CHAT})
    assert texts == [f"First.{ends}Second.{ends}"]
    last, texts, _ = captured(teacher, tmp_path, {"messages": CHAT}, assistant_turns="last")
    assert texts == [f"Second.{ends}"]
    assert last[0]["token_ids"] == every[0]["token_ids"]
    assert last[0]["key"] != every[0]["key"], "another mask is another row"


def test_the_last_answer_is_captured_also_if_the_template_marks_it_in_parts(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint.folder, tmp_path / "parts")
    parts = MARKED.replace("{{ m['content'] }}!", "{{ m['content'] }}{% endgeneration %}{% generation %}!")
    (folder / "chat_template.jinja").write_text(parts)
    teacher = Checkpoint.find(TeacherConfig(model=str(folder)))
    assert captured(teacher, tmp_path, {"messages": CHAT})[1] == ["First.!Second.!"]
    _, texts, rejects = captured(teacher, tmp_path, {"messages": CHAT}, assistant_turns="last")
    assert (texts, rejects) == (["Second.!"], [])


def test_each_capture_rule_has_a_name() -> None:
    last = SequencesConfig(assistant_turns="last")
    rules = [
        ("text", SequencesConfig()),
        ("chat", SequencesConfig()),
        ("chat", last),
        ("completion", SequencesConfig()),
    ]
    names = [mask_rule(content, settings) for content, settings in rules]
    assert names == ["text", "assistant", "last_assistant", "completion"]


def test_special_tokens_are_parsed_if_the_settings_say_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bos, text = with_bos(checkpoint, tmp_path), {"text": "<|im_start|>a<|im_end|>b<|im_end|>"}
    [quoted], _, _ = captured(bos, tmp_path, text)
    [parsed], _, _ = captured(bos, tmp_path, text, special_tokens="parse")
    assert [quoted["token_ids"].count(i) for i in (1, 2)] == [1, 1]
    assert [parsed["token_ids"].count(i) for i in (1, 2)] == [1, 2], "those that a text brings are not put there again"
    assert bos.tokenizer.decode(parsed["token_ids"]) == text["text"]
    chat = {"messages": [{"role": "user", "content": "x<|endoftext|>"}, CHAT[1]]}
    [as_text], _, _ = captured(checkpoint, tmp_path, chat)
    [as_token], texts, _ = captured(checkpoint, tmp_path, chat, special_tokens="parse")
    assert [row["token_ids"].count(0) for row in (as_text, as_token)] == [0, 1]
    assert texts == ["First.<|im_end|>"]


def test_chats_for_a_teacher_without_a_template_are_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint.folder, tmp_path / "teacher")
    (folder / "chat_template.jinja").unlink()
    bare = Checkpoint.find(TeacherConfig(model=str(folder)))
    assert captured(bare, tmp_path, pair("text", " needs none"))[1] == [" needs none<|im_end|>"]
    with pytest.raises(UsageError, match="no chat template"):
        captured(bare, tmp_path, pair(CHAT[:1], CHAT[1:2]))
    with pytest.raises(UsageError, match="no chat template"):
        DocumentTokenizer(bare, SequencesConfig(), "chat")
