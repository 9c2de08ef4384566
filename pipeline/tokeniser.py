"""The teacher's tokenizer, and how the content of a document becomes token ids.

Which of them are worth predicting is decided here: all of a text, the assistant's words of a chat. Cutting them into
sequences is ``pipeline.sequences``'s business.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from pipeline.chat import ChatRefusedError, ChatTemplate, Written
from pipeline.checkpoint import Checkpoint, sha256
from pipeline.config import SequencesConfig
from storage.errors import UsageError
from storage.provenance import TokenizerIdentity

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
    """Token ids of some documents, one after the other, without the ids that every sequence begins with."""

    ids: NDArray[np.int32]
    wanted: NDArray[np.bool_]
    """Which of them are worth predicting: all of a text, the assistant's of a chat."""
    lengths: NDArray[np.int64]
    begins: NDArray[np.bool_]
    """Which documents begin with the tokenizer's prefix."""


class Tokeniser:
    """The teacher's tokenizer, and how a document becomes token ids.

    Text gets what the tokenizer puts before a text by itself (BOS, for many), and the end-of-sequence token after its
    end, so that a student learns where to stop. Special tokens in it are taken as text. A chat is written by the
    teacher's chat template, which brings its own.

    Args:
        checkpoint: the teacher's files.
        settings: chunking, and the date of the chat template.
        chat: whether documents are chats.

    Raises:
        TeacherError: if the tokenizer can't be loaded.
        UsageError: if chats are asked for and there is no usable chat template, or no room for a token in a sequence.
    """

    def __init__(self, checkpoint: Checkpoint, settings: SequencesConfig, chat: bool) -> None:
        tokenizer = checkpoint.tokenizer
        self._checkpoint, self._settings, self._eos = checkpoint, settings, tokenizer.eos_token_id
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self.prefix = np.array(_prefix(self._backend), np.int32)
        """Ids that the tokenizer puts before a text, and that each of its sequences begins with."""
        self.mask = "assistant" if chat else "text"
        """Name of the rule that says which tokens are captured: the assistant's turns, or all that can be predicted."""
        self._template = _chat_template(checkpoint, settings) if chat else None
        if settings.max_tokens <= len(self.prefix) + settings.context:
            raise UsageError(
                "a sequence has no room for a token to predict",
                expected=f"sequences.max_tokens above {len(self.prefix)} (prefix) + {settings.context} (context)",
                found=f"sequences.max_tokens: {settings.max_tokens}",
                do="set sequences.max_tokens higher",
            )

    @cached_property
    def files(self) -> list[Path]:
        """The tokenizer's files; whoever has them needs no hub."""
        found = chain.from_iterable(self._checkpoint.folder.glob(pattern) for pattern in _FILES)
        return sorted({path for path in found if path.is_file()})

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files into a folder."""
        for path in self.files:
            shutil.copy(path, folder)

    @cached_property
    def identity(self) -> TokenizerIdentity:
        """What the tokenizer is, by the bytes of its files."""
        lines = "".join(f"{path.name} {sha256(path)}\n" for path in self.files)
        template = self._checkpoint.tokenizer.chat_template
        return TokenizerIdentity(
            files=hashlib.sha256(lines.encode()).hexdigest(),
            chat_template=hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None,
            chat_template_date=self._settings.chat_template_date,
        )

    def encode(self, contents: Sequence[str]) -> tuple[Encoded, dict[int, str]]:
        """Token ids of documents, and by its number why a document has none."""
        if self._template is None:
            return self._encode_texts(contents), {}
        return self._encode_chats(contents, self._template)

    def _encode_texts(self, texts: Sequence[str]) -> Encoded:
        self._backend.encode_special_tokens = True  # as text
        end = [] if self._eos is None else [self._eos]
        lists = [
            encoding.ids + end for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
        ids, lengths = _flat(lists)
        return Encoded(ids, np.ones(len(ids), bool), lengths, np.full(len(texts), len(self.prefix) > 0))

    def _encode_chats(self, chats: Sequence[str], template: ChatTemplate) -> tuple[Encoded, dict[int, str]]:
        written: list[Written] = []
        refused: dict[int, str] = {}
        for i, content in enumerate(chats):
            try:
                written.append(template.write(content))
            except ChatRefusedError as reason:
                written.append(Written([], []))
                refused[i] = str(reason)
        pieces = self._encode_pieces([piece for chat in written for piece in chat.pieces])
        lists, masks, begins, size = [], [], [], len(self.prefix)
        for chat in written:
            ids, starts, position = [], [], 0
            for text, _ in chat.pieces:
                encoding = next(pieces)
                ids += encoding.ids
                starts += [position + start for start, _ in encoding.offsets]
                position += len(text)
            begins.append(size > 0 and ids[:size] == self.prefix.tolist())
            skip = size if begins[-1] else 0
            lists.append(ids[skip:])
            masks.append(_within(np.array(starts[skip:], np.int64), chat.turns))
        flat, lengths = _flat(lists)
        wanted = np.concatenate([*masks, np.zeros(0, bool)])
        return Encoded(flat, wanted, lengths, np.array(begins, bool)), refused

    def _encode_pieces(self, pieces: list[tuple[str, bool]]) -> Iterator[Encoding]:
        encoded = {}
        for quoted in (False, True):
            self._backend.encode_special_tokens = quoted
            texts = [text for text, is_quoted in pieces if is_quoted == quoted]
            encoded[quoted] = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return (next(encoded[quoted]) for _, quoted in pieces)


def _prefix(backend: Tokenizer) -> list[int]:
    """Ids that the tokenizer puts before a text by itself."""
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
            expected="chat_template.jinja, to write chats as the teacher knows them",
            found="columns.messages, and a tokenizer without one",
            where=checkpoint.folder,
            do="give an instruct model, or plain text with columns.text",
        ) from None
    named = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    quoted = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return ChatTemplate(source, named, quoted, settings.chat_template_date)


def _flat(lists: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    lengths = np.array([len(ids) for ids in lists], np.int64)
    return np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum())), lengths


def _within(starts: NDArray[np.int64], ranges: list[tuple[int, int]]) -> NDArray[np.bool_]:
    inside = np.zeros(len(starts), bool)
    for a, b in ranges:
        inside |= (starts >= a) & (starts < b)
    return inside
