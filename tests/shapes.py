"""Teachers of real shapes with random weights, which exist only in memory, and documents for them.

The shapes are Llama 3.2 1B's, Qwen2.5-1.5B's (but for the biases of its attention) and Qwen3-8B's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from softlabel.pipeline.models.checkpoint import Checkpoint

SHAPES: dict[str, Any] = {
    "1B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    ),
    "1.5B": LlamaConfig(  # transformers can't give a Qwen2 a word-level tokenizer
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    ),
    "8B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        architectures=["Qwen3ForCausalLM"],
    ),
}


class RandomWeights(Checkpoint):
    """A teacher of a given shape with random weights in memory."""

    def load(self, device_map: Any, attention: str) -> Any:
        torch.manual_seed(0)
        with torch.device(device_map[""]):
            model = AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, self.dtype))
        model.base_model.norm.weight.data.mul_(4)  # a distribution of about 5 nats, not a flat one
        return model.eval()


def random_teacher(folder: Path, shape: str) -> None:
    """Write a folder with the shape's configuration and a tokenizer that can produce every id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = SHAPES[shape]
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t1").save_pretrained(folder)
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()


def documents(path: Path, teacher: str, first: int, count: int, tokens: int) -> str:
    """Write ``count`` documents of at least ``tokens`` tokens, numbered from ``first``; each has its own text."""
    if teacher in SHAPES:
        rng = np.random.default_rng(first)
        texts = [" ".join(f"t{i}" for i in rng.integers(2, SHAPES[teacher].vocab_size, tokens)) for _ in range(count)]
    else:
        from pydoc_data.topics import topics

        whole = "\n".join(text for _, text in sorted(topics.items()))
        texts = [whole[i * 12 * tokens : (i + 1) * 12 * tokens] for i in range(first, first + count)]
    pq.write_table(pa.table({"id": [f"{first + i}" for i in range(count)], "text": texts}), path)
    return str(path)
