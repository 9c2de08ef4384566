"""Turn the content of a document into token ids with the teacher's tokenizer.

This also decides which tokens are wanted (worth predicting): all of a text, the assistant's words in a chat, the
completion of a prompt. ``pipeline.sequences.chunking`` cuts the ids into sequences.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from softlabel.pipeline.config.capture import Content, SequencesConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.models.files import sha256
from softlabel.pipeline.models.pretrained import keep_rules
from softlabel.pipeline.models.tokenizer_rules import without_dummy_prefix
from softlabel.pipeline.sequences.chat import ChatRefusedError, ChatTemplate, RenderedChat
from softlabel.storage.errors import UsageError

_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of some documents, concatenated, without the prefix that every sequence begins with."""

    ids: NDArray[np.int32]
    wanted: NDArray[np.bool_]
    """Which tokens are worth predicting."""
    lengths: NDArray[np.int64]
    begins: NDArray[np.bool_]
    """Which documents begin with the tokenizer's prefix."""


class _Row(NamedTuple):
    """One document's token ids and which of them are wanted, or why it was refused."""

    ids: list[int]
    wanted: NDArray[np.bool_]
    refused: str | None = None


class _Tokens(NamedTuple):
    """Tokens of a text, and the range of characters of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    @classmethod
    def of(cls, encoding: Encoding) -> Self:
        return cls(encoding.ids, encoding.offsets)


class DocumentTokenizer:
    """Turns documents into token ids with the teacher's tokenizer.

    A text gets the tokenizer's usual prefix (often BOS), and the end-of-sequence token at its end, so that a student
    learns where to stop. So does a prompt with its completion; ``_encode_pairs`` describes where the prompt ends. A
    chat is rendered by the teacher's chat template, which adds its own special tokens. Names of special tokens inside a
    document are plain text unless ``sequences.special_tokens`` says otherwise.

    Args:
        checkpoint: the teacher's files.
        settings: chunking, the date of the chat template, which turns are captured, how special tokens in text are
            read.
        content: kind of the documents' content.

    Raises:
        TeacherError: if the tokenizer can't be loaded.
        UsageError: if chats need a chat template and there is no usable one, or ``max_tokens`` is too small.
    """

    def __init__(self, checkpoint: Checkpoint, settings: SequencesConfig, content: Content) -> None:
        tokenizer = checkpoint.tokenizer
        self._checkpoint, self._settings, self._eos = checkpoint, settings, tokenizer.eos_token_id
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        if getattr(self._backend.model, "dropout", None):
            self._backend.model.dropout = None  # for the training of tokenizers: the same text gets ids at random
        self.prefix = np.array(_prefix(self._backend), np.int32)
        """Ids that the tokenizer puts before a text; every sequence of a text begins with them."""
        self._backend.post_processor = None  # it may trim space from the tokens' offsets
        self._continuing = without_dummy_prefix(self._backend)
        self._added = self._backend.get_added_tokens_decoder()
        self._greedy = {i for i, token in self._added.items() if token.lstrip or token.rstrip}
        self._content = content
        self.answers = 0
        """Number of answers in chats that were to be captured so far, without those of refused chats."""
        self.partial_answers = 0
        """Number of these that the chat template does not write whole: it leaves out a thought, a tool call, or content
        beside a tool call."""
        if content == "chat":
            _ = self._template
        if settings.max_tokens <= len(self.prefix) + settings.context:
            raise UsageError(
                "sequences.max_tokens leaves no room for a token to predict",
                expected=f"sequences.max_tokens above {len(self.prefix) + settings.context}: {len(self.prefix)} for "
                f"the tokens that the tokenizer puts before a text, {settings.context} for sequences.context",
                found=f"sequences.max_tokens: {settings.max_tokens}",
                do="set sequences.max_tokens higher",
            )

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files into a folder, in a form that transformers loads with the same rules, no code."""
        for path in tokenizer_files(self._checkpoint.folder):
            shutil.copy(path, folder)
        keep_rules(folder, self._checkpoint.tokenizer)

    @cached_property
    def _template(self) -> ChatTemplate:
        return _chat_template(self._checkpoint, self._settings)

    def encode(self, contents: Sequence[str]) -> tuple[Encoded, dict[int, str]]:
        """Token ids of documents and, by index, why a document was refused."""
        if self._content == "text":
            rows = self._encode_pairs([("", text) for text in contents])
        elif self._content == "chat":
            rows = self._encode_chats(contents)
        else:
            parts = [json.loads(content) for content in contents]
            are_chats = [isinstance(part["prompt"], list) for part in parts]
            chats = iter(self._encode_chats([c for c, is_chat in zip(contents, are_chats, strict=True) if is_chat]))
            texts = [part for part, is_chat in zip(parts, are_chats, strict=True) if not is_chat]
            pairs = iter(self._encode_pairs([(part["prompt"], part["completion"]) for part in texts]))
            rows = [next(chats if is_chat else pairs) for is_chat in are_chats]
        return self._joined(rows), {i: row.refused for i, row in enumerate(rows) if row.refused is not None}

    def _joined(self, rows: list[_Row]) -> Encoded:
        """The documents concatenated, without the prefix."""
        size, prefix = len(self.prefix), self.prefix.tolist()
        begins = np.array([size > 0 and row.ids[:size] == prefix for row in rows], bool)
        skips = np.where(begins, size, 0).tolist()
        ids = [row.ids[skip:] for row, skip in zip(rows, skips, strict=True)]
        wanted = [row.wanted[skip:] for row, skip in zip(rows, skips, strict=True)]
        lengths = np.array([len(part) for part in ids], np.int64)
        flat = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
        return Encoded(flat, np.concatenate([*wanted, np.zeros(0, bool)]), lengths, begins)

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[_Row]:
        """Encode texts, each a prompt (which may be empty) and a completion, whose tokens are wanted.

        The prompt is encoded separately, as it is when a student is used. The completion gets the remaining ids of the
        whole text; if a token of the whole text would span both, the completion is encoded separately, too, and without
        the space that some tokenizers put before a text.
        """
        prompts = self._ids([prompt for prompt, _ in pairs])
        texts = [prompt + completion for prompt, completion in pairs]
        if any(prompts):
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
            wholes = [encoding.ids for encoding in encodings]
            torn = [i for i, e in enumerate(encodings) if self._spans_both(e, pairs[i][0], prompts[i])]
        else:
            wholes, torn = self._ids(texts), []
        for i, completion in zip(torn, self._ids([pairs[i][1] for i in torn], continue_a_text=True), strict=True):
            wholes[i] = prompts[i] + completion
        start, end = self.prefix.tolist(), [] if self._eos is None else [self._eos]
        rows = []
        for prompt, whole in zip(prompts, wholes, strict=True):
            if len(whole) == len(prompt):
                rows.append(_Row([], np.zeros(0, bool), "the tokenizer has no tokens for the text to capture"))
                continue
            # A text may already contain both if special tokens in it are parsed.
            before = [] if whole[: len(start)] == start else start
            ids = before + whole + (end if whole[-1:] != end else [])
            rows.append(self._readable(_Row(ids, np.arange(len(ids)) >= len(before) + len(prompt))))
        return rows

    def _spans_both(self, whole: Encoding, prompt: str, ids: list[int]) -> bool:
        """Whether a token of the whole text spans both the prompt (which has these ids alone) and the completion."""
        if not ids or whole.ids[: len(ids)] != ids:
            return whole.ids[: len(ids)] != ids
        # Even if the ids agree, the last one may be a token for several unknown characters on both sides.
        _, end = self._bare(ids[-1], prompt, *whole.offsets[len(ids) - 1])
        return end > len(prompt)

    def _ids(self, texts: list[str], continue_a_text: bool = False) -> list[list[int]]:
        quoted = self._settings.special_tokens == "text"
        if continue_a_text and self._continuing is not None:
            return [self._tokens(text, continues=True, quoted=quoted).ids for text in texts]
        self._backend.encode_special_tokens = quoted
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_chats(self, chats: Sequence[str]) -> list[_Row]:
        rendered: list[RenderedChat | str] = []
        for content in chats:
            try:
                rendered.append(self._template.write(content, self._settings.assistant_turns))
            except ChatRefusedError as reason:
                rendered.append(str(reason))
        chats_with_pieces = [chat.pieces for chat in rendered if isinstance(chat, RenderedChat)]
        pieces = self._encode_pieces([(*piece, i > 0) for chat in chats_with_pieces for i, piece in enumerate(chat)])
        return [_Row([], np.zeros(0, bool), c) if isinstance(c, str) else self._row(c, pieces) for c in rendered]

    def _row(self, chat: RenderedChat, pieces: Iterator[_Tokens]) -> _Row:
        """The row of a chat with these pieces. A token is wanted if it overlaps a turn of the assistant."""
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        position = 0
        for text, _ in chat.pieces:
            tokens_of_piece, offsets = next(pieces)
            if not self._greedy.isdisjoint(tokens_of_piece):
                offsets = [self._bare(i, text, *at) for i, at in zip(tokens_of_piece, offsets, strict=True)]
            ids += tokens_of_piece
            starts += [position + start for start, _ in offsets]
            ends += [position + end for _, end in offsets]
            position += len(text)
        tokens = np.array([starts, ends], np.int64)
        wanted = _sharing(tokens, chat.turns)
        if not all(_sharing(tokens, [(place.start, place.end)]).any() for place in chat.answers):
            return _Row([], wanted[:0], "the tokenizer has no tokens for the text to capture")
        if (_sharing(tokens, [(place.start, place.end) for place in chat.others]) & wanted).any():
            return _Row([], wanted[:0], "a token covers text of both the assistant and another message")
        row = self._readable(_Row(ids, wanted))
        if row.refused is None:
            self.answers += len(chat.whole)
            self.partial_answers += chat.whole.count(False)
        return row

    def _bare(self, token: int, text: str, start: int, end: int) -> tuple[int, int]:
        """Character range of a token, without the surrounding space that some special tokens include."""
        if token in self._greedy:
            taken = text[start:end]
            return end - len(taken.lstrip()), start + len(taken.rstrip())
        return start, end

    def _encode_pieces(self, pieces: list[tuple[str, bool, bool]]) -> Iterator[_Tokens]:
        """Encode pieces of chats: texts, each with whether special tokens in it are plain text, and what it follows."""
        if self._continuing is not None and any(continues for _, _, continues in pieces):
            return (self._tokens(text, continues, quoted) for text, quoted, continues in pieces)
        encoded = {}
        for quoted in (False, True):
            self._backend.encode_special_tokens = quoted
            texts = [text for text, is_quoted, _ in pieces if is_quoted == quoted]
            encoded[quoted] = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return (_Tokens.of(next(encoded[quoted])) for _, quoted, _ in pieces)

    def _tokens(self, text: str, continues: bool, quoted: bool) -> _Tokens:
        """Tokens of a text; if it continues another one, they begin without the space that is put before a text."""
        self._backend.encode_special_tokens = quoted
        tokens = _Tokens.of(self._backend.encode(text, add_special_tokens=False))
        if self._continuing is None or not continues:
            return tokens
        # After an added token, the tokenizer's own rules say whether there is a space.
        count = next((i for i, token in enumerate(tokens.ids) if token in self._added), len(tokens.ids))
        end = tokens.offsets[count][0] if count < len(tokens.ids) else len(text)
        self._continuing.encode_special_tokens = quoted
        start = _Tokens.of(self._continuing.encode(text[:end], add_special_tokens=False))
        return _Tokens(start.ids + tokens.ids[count:], start.offsets + tokens.offsets[count:])

    def _readable(self, row: _Row) -> _Row:
        """The row, refused if the teacher has no embedding for one of its tokens."""
        highest, rows = max(row.ids, default=0), self._checkpoint.padded_vocabulary
        if highest < rows:
            return row
        name = self._backend.id_to_token(highest)
        reason = f"the teacher has no embedding for the token {name!r} (its id is {highest}, and there are {rows} rows)"
        return _Row([], row.wanted[:0], reason)


def mask_rule(content: Content, settings: SequencesConfig) -> str:
    """Name of the rule that says which tokens are captured: all of a text that can be predicted ("text"), every turn of
    the assistant or the last ("assistant", "last_assistant"), what follows the prompt ("completion")."""
    answers = "assistant" if settings.assistant_turns == "all" else "last_assistant"
    return answers if content == "chat" else content


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer; they can be loaded without the hub."""
    found = chain.from_iterable(folder.glob(pattern) for pattern in _FILES)
    return sorted({path for path in found if path.is_file()})


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 over the files of a tokenizer."""
    lines = "".join(f"{path.name} {sha256(path)}\n" for path in tokenizer_files(folder))
    return hashlib.sha256(lines.encode()).hexdigest()


def template_hash(checkpoint: Checkpoint) -> str | None:
    """SHA-256 of the chat template; None without one."""
    template = checkpoint.tokenizer.chat_template
    return hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None


def _prefix(backend: Tokenizer) -> list[int]:
    """Ids that the tokenizer puts before every text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a").ids
    starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
    return list(full[: starts[0]]) if starts else []


def _chat_template(checkpoint: Checkpoint, settings: SequencesConfig) -> ChatTemplate:
    tokenizer = checkpoint.tokenizer
    try:
        source = tokenizer.get_chat_template()
    except ValueError:
        raise UsageError(
            "the teacher has no chat template",
            expected="a chat_template.jinja, or a template in tokenizer_config.json",
            found="documents that are chats, and a tokenizer without a template",
            where=checkpoint.folder,
            do="use an instruct model, or plain text with columns.text",
        ) from None
    named: dict[str, Any] = {
        name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
    }
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    quoted = special if settings.special_tokens == "text" else []
    named |= json.loads(settings.chat_template_kwargs or "{}")
    return ChatTemplate(source, named, quoted, settings.chat_template_date, special)


def _sharing(tokens: NDArray[np.int64], ranges: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens (given by starts and ends) overlap one of the ranges."""
    starts, ends = tokens[0], np.maximum(tokens[1], tokens[0] + 1)  # an empty token counts as the next character
    sharing = np.zeros(len(starts), bool)
    for a, b in ranges:
        if a < b:
            sharing |= (starts < b) & (ends > a)
    return sharing
