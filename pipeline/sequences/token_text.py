"""The text of single tokens, as far as they have one: a token may be part of a character, or no text at all."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from softlabel.pipeline.models.pretrained import load_tokenizer
from softlabel.storage.errors import TableError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""The character that stands for each byte in the tokens of a byte-level tokenizer."""


@dataclass(frozen=True)
class TokenText:
    """A token in its sequence."""

    own: str
    r"""Its own text; bytes that are no whole character are \xf0 and so on."""
    reading: str
    r"""What it adds to the text of the sequence. A character of several tokens belongs to the last of them, so this is
    empty for the others; bytes that never become a character are \xf0 and so on."""
    special: bool
    """Whether it is one of the tokenizer's special tokens."""


class _Piece(NamedTuple):
    data: bytes
    special: bool = False


class TokenTexts:
    """The texts of a tokenizer's tokens.

    Args:
        folder: the tokenizer's files, as a table has them.

    Raises:
        TableError: if they can't be loaded.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        file = folder / "tokenizer.json"
        try:
            self._use(Tokenizer.from_file(str(file)) if file.is_file() else self._loaded())
        except Exception as error:  # tokenizers raises nothing more precise
            raise self._unusable(error) from error
        self._pieces: dict[int, _Piece] = {}

    def _loaded(self) -> Tokenizer:
        """The tokenizer with the tokens that other files than tokenizer.json add; takes seconds."""
        loaded: Tokenizer = load_tokenizer(self._folder).backend_tokenizer
        return loaded

    def _use(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        kinds = set(_kinds(json.loads(backend.decoder.__getstate__()))) if backend.decoder else set()
        self._byte_level = "ByteLevel" in kinds

    def _unusable(self, error: Exception) -> TableError:
        return TableError(
            "the table's tokenizer can't be loaded, so its tokens have no text",
            expected="the files of a tokenizer that the tokenizers library reads",
            found=" ".join(str(error).split())[:200],
            where=self._folder,
            do="install the newest version of tokenizers and transformers",
        )

    def require(self, ids: Sequence[int]) -> None:
        """Make sure that these ids have a text as far as any of the tokenizer's files gives them one."""
        if any(self._backend.id_to_token(token) is None for token in set(ids)):
            try:
                self._use(self._loaded())
            except Exception as error:  # as above
                raise self._unusable(error) from error
            self._pieces.clear()

    def text(self, token: int) -> str:
        """A token's own text, outside of any sequence."""
        return _own(self._piece(token))

    def sequence(self, ids: Sequence[int]) -> Iterator[TokenText]:
        """The tokens of a sequence, in order."""
        pieces = [self._piece(token) for token in ids]
        ends = list(accumulate(len(piece.data) for piece in pieces))
        readings = [""] * len(pieces)
        at = token = 0
        for character in b"".join(piece.data for piece in pieces).decode("utf-8", "surrogateescape"):
            data = character.encode("utf-8", "surrogateescape")
            at += len(data)
            while ends[token] < at:
                token += 1
            readings[token] += data.decode("utf-8", "backslashreplace")
        for piece, reading in zip(pieces, readings, strict=True):
            yield TokenText(_own(piece), reading, piece.special)

    def _piece(self, token: int) -> _Piece:
        if token not in self._pieces:
            self._pieces[token] = self._read(token)
        return self._pieces[token]

    def _read(self, token: int) -> _Piece:
        name = self._backend.id_to_token(token)
        if name is None:
            return _Piece(f"<id {token}>".encode(), special=True)
        if token in self._added:
            return _Piece(self._added[token].content.encode(), self._added[token].special)
        if byte := _BYTE.fullmatch(name):
            return _Piece(bytes.fromhex(byte[1]))
        if self._byte_level and all(character in _BYTES for character in name):
            return _Piece(bytes(_BYTES[character] for character in name))
        if self._backend.decoder is None:
            return _Piece(name.encode())
        # After another token, because decoders drop space at the start of a text.
        return _Piece(self._backend.decoder.decode(["x", name]).removeprefix("x").encode())


def _kinds(decoder: Any) -> Iterator[str]:
    """Names of a decoder's parts."""
    yield decoder["type"]
    for part in decoder.get("decoders", []):
        yield from _kinds(part)


def _own(piece: _Piece) -> str:
    return piece.data.decode("utf-8", "backslashreplace")
