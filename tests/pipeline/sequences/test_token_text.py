"""The text of single tokens: read in order they are the text of the sequence, however it treats bytes."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from softlabel.pipeline.sequences.token_text import TokenTexts
from softlabel.storage.errors import TableError

HOSTILE = "naïve e\u0301 שלום 你好 😀👩‍👧 \x1b[31m\u202e\x00\t <b>&\r\n  two  spaces"


def pieces(path: Path) -> Tokenizer:
    """A tokenizer of the kind that SentencePiece makes: a mark for a space, bytes for unknown characters."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁two", "s", "p", "a", "c", "e", "▁sp", "ï"]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [("▁", "s"), ("▁s", "p")]
    vocabulary |= {"▁s": len(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


def word_parts(path: Path) -> Tokenizer:
    """A tokenizer of the kind that BERT has."""
    words = ["[UNK]", "two", "##s", "space", ","]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


def read(folder: Path, ids: list[int]) -> list[str]:
    return [token.reading for token in TokenTexts(folder).sequence(ids)]


@pytest.mark.parametrize("text", [HOSTILE, "😀" * 3, "plain", ""])
def test_read_in_order_the_tokens_of_a_byte_level_tokenizer_are_the_text(tiny_teacher: Path, text: str):
    ids = Tokenizer.from_file(str(tiny_teacher / "tokenizer.json")).encode(text).ids
    assert "".join(read(tiny_teacher, ids)) == text


def test_read_in_order_the_tokens_of_a_sentencepiece_tokenizer_are_the_text(tmp_path: Path):
    text = f"x{HOSTILE}"  # a decoder drops the space at the start of a text
    ids = pieces(tmp_path).encode(text).ids
    assert "".join(read(tmp_path, ids)) == text
    assert " sp" in read(tmp_path, ids)


def test_words_of_several_tokens_are_read_without_spaces(tmp_path: Path):
    ids = word_parts(tmp_path).encode("two twos, space").ids
    assert "".join(read(tmp_path, ids)).strip() == "two twos, space"


def test_a_character_belongs_to_the_last_of_its_tokens(tiny_teacher: Path):
    ids = Tokenizer.from_file(str(tiny_teacher / "tokenizer.json")).encode("a😀b").ids
    tokens = list(TokenTexts(tiny_teacher).sequence(ids))
    assert [token.own for token in tokens] == ["a", "\\xf0", "\\x9f", "\\x98", "\\x80", "b"]
    assert [token.reading for token in tokens] == ["a", "", "", "", "😀", "b"]


def test_bytes_that_never_become_a_character_are_escaped(tiny_teacher: Path):
    """As at the end of a chunk that was cut within a character, and at the start of the next one."""
    ids = Tokenizer.from_file(str(tiny_teacher / "tokenizer.json")).encode("😀").ids
    assert read(tiny_teacher, ids[:3]) == ["\\xf0", "\\x9f", "\\x98"]
    assert read(tiny_teacher, [*ids[2:], 0]) == ["\\x98", "\\x80", "<|endoftext|>"]


def test_special_tokens_and_ids_without_a_token_are_marked(tiny_teacher: Path):
    texts = TokenTexts(tiny_teacher)
    end, missing, a = list(texts.sequence([2, 511, 68]))
    assert (end.own, end.special) == ("<|im_end|>", True)
    assert (missing.own, missing.special) == ("<id 511>", True)
    assert not a.special


def test_a_tokenizer_that_can_not_be_loaded_is_one_clear_error(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TableError, match=r"tokenizer can't be loaded(.|\n)*tokenizers"):
        TokenTexts(tmp_path)
