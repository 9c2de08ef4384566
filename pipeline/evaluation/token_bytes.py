"""How many bytes of text each token stands for, so that losses can be given per byte instead of per token."""

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: Any, vocabulary: int) -> NDArray[np.int64]:
    """(vocabulary,) bytes of UTF-8 that each id adds to a text; 0 for special tokens, such as the end of a text.

    Args:
        tokenizer: a fast tokenizer.
        vocabulary: number of ids.
    """
    backend = tokenizer.backend_tokenizer
    of_bytes = "ByteLevel" in json.dumps(json.loads(backend.to_str())["decoder"])
    special = set(tokenizer.all_special_ids)
    added = backend.get_added_tokens_decoder()
    special |= {number for number, token in added.items() if token.special}
    sizes = np.zeros(vocabulary, np.int64)
    for token, number in tokenizer.get_vocab().items():
        if number >= vocabulary or number in special:
            continue
        if number in added:
            sizes[number] = len(token.encode())
        elif of_bytes:
            sizes[number] = len(token)  # each character stands for a byte
        elif _BYTE.fullmatch(token):
            sizes[number] = 1
        else:
            sizes[number] = len(_text(token).encode())
    return sizes


def _text(token: str) -> str:
    """A token of SentencePiece, whose ▁ is a space, or of WordPiece, which marks what continues a word with ##."""
    return token.removeprefix("##").replace("▁", " ")
