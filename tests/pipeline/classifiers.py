"""Small random classifiers, and documents with labels, for tests of classification."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaConfig
from transformers import LlamaForSequenceClassification as LlamaClassifier

from tests.conftest import topics

CLASSES = ("expressions", "statements", "types", "names")


def save_classifier(
    folder: Path, tiny_teacher: Path, classes: Sequence[str] = CLASSES, kind: str = "bert", layers: int = 2, **more
) -> Path:
    """A random classifier whose tokenizer puts a token before and one after each text; it reads 128 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher, model_max_length=128)
    ends = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=list(ends.items())
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
        **more,
    }
    model = (
        BertForSequenceClassification(BertConfig(**settings))
        if kind == "bert"
        else LlamaClassifier(LlamaConfig(**settings))
    )
    model.save_pretrained(folder)
    return folder


def save_documents(path: Path, count: int = 60, classes: Sequence[str] = CLASSES) -> Path:
    """Pages of Python's manual (id, text, label, source): one long, one without a label, one with an unknown label."""
    texts = list(topics().items())[: count - 1]
    long = next(text for text in topics().values() if len(text) > 3000)
    rows = [
        {"id": name, "text": text[: 40 + 7 * i], "label": classes[len(text) % len(classes)], "source": "manual"}
        for i, (name, text) in enumerate(texts)
    ]
    rows.append({"id": "long", "text": long, "label": classes[0], "source": "manual"})
    rows[0]["label"], rows[1]["label"] = None, "unheard of"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
