"""Models, tokenizers and adapters that come with code, which creates a file if it is run."""

import json
import shutil
from pathlib import Path
from typing import Any

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

Path({ran!r}).touch()

class Config(LlamaConfig):
    model_type = "own"

class Model(LlamaForCausalLM):
    config_class = Config

class Classifier(LlamaForSequenceClassification):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass

def generate(model, *arguments, **named):
    return None
"""


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def hostile(folder: Path, model: Path, how: str, ran: Path) -> Path:
    """A copy of a model that comes with code, in one of the ways in which transformers finds it."""
    shutil.copytree(model, folder)
    own = folder if how not in ("elsewhere", "nested") else folder.with_name(f"{folder.name}-code")
    own.mkdir(exist_ok=True)
    (own / "own.py").write_text(CODE.format(ran=str(ran)))
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    lead = f"{own}--own" if own != folder else "own"
    classes = {
        "AutoConfig": f"{lead}.Config",
        "AutoModelForCausalLM": f"{lead}.Model",
        "AutoModelForSequenceClassification": f"{lead}.Classifier",
    }
    match how:
        case "model" | "elsewhere":
            change(config, model_type="own", auto_map=classes)
        case "nested":
            part = {"model_type": "trocr", "auto_map": {"AutoModel": f"{lead}.Model"}}
            config.write_text(json.dumps({"model_type": "fuyu", "vocab_size": 512, "text_config": part}))
        case "tokenizer":
            change(tokenizer, tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, f"{lead}.Tokenizer"]})
        case "slow tokenizer":
            change(tokenizer, tokenizer_class="OwnTokenizer", auto_map=[f"{lead}.Tokenizer", None])
        case "generate":
            (folder / "custom_generate").mkdir()
            shutil.move(folder / "own.py", folder / "custom_generate" / "generate.py")
        case "adapter":
            adapter(folder, hostile(folder.with_name("of-the-adapter"), model, "tokenizer", ran))
    return folder


def adapter(folder: Path, tokenizer: Path) -> Path:
    """An adapter that is initialized from a text, and therefore loads a tokenizer."""
    folder.mkdir(exist_ok=True)
    change(
        folder / "adapter_config.json",
        peft_type="PROMPT_TUNING",
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="a",
        tokenizer_name_or_path=str(tokenizer),
        base_model_name_or_path=str(folder),
    )
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder
