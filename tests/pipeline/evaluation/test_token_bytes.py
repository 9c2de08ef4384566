"""Bytes of text per token: those of a text's tokens add up to the text's own."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from softlabel.pipeline.evaluation.token_bytes import token_bytes
from tests.conftest import _tiny_tokenizer

TEXTS = ["plain words, and more of them", "naïve größe\n\n  spaces\t", "日本語 and Ελληνικά 🙂", ""]


def with_byte_fallback():
    """As SentencePiece makes them: ▁ for a space, and bytes for characters that are in no token."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz,ï"]
    merges = [("▁", "a"), ("n", "d"), ("▁a", "nd")]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "▁a", "nd", "▁and"])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [_tiny_tokenizer, with_byte_fallback])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_all_tokens_are_those_of_the_text(make, text):
    tokenizer = make()
    tokenizer.add_tokens(["🙂 added"])
    sizes = token_bytes(tokenizer, len(tokenizer))
    for whole in (text, f"{text}🙂 added{text}"):
        ids = tokenizer.encode(whole, add_special_tokens=False)
        assert sizes[ids].sum() == len(whole.encode())
    assert sizes[tokenizer.eos_token_id] == 0
