"""What other programs read of an export; each function runs in a process that finds those programs.

``python -m tests.pipeline.tables.other_programs NAME ARGUMENT...`` prints the result as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


def datasets(folder: str, cache: str) -> dict[str, list[dict[str, Any]]]:
    """All rows of an export, by split, as the card says that they are read."""
    from datasets import disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()
    saved = (Path(folder) / "dataset_dict.json").exists()
    found = load_from_disk(folder) if saved else load_dataset(folder, cache_dir=cache)
    return {split: list(rows) for split, rows in found.items()}


def trl(folder: str, model: str, scratch: str, stored: str) -> dict[str, float]:
    """The loss of one step of the SFTTrainer on all rows, and the same from the model's logits and the stored rows."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset(folder, split="train", cache_dir=scratch)
    student = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    losses = [
        cross_entropy(student(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")[mask[1:]]
        for ids, mask in json.loads(Path(stored).read_text())
    ]
    settings = SFTConfig(
        scratch,
        per_device_train_batch_size=len(rows),
        max_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    trainer = SFTTrainer(student, settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return {"trainer": trainer.state.log_history[0]["loss"], "expected": float(torch.cat(losses).mean())}


def axolotl(folder: str, model: str) -> dict[str, Any]:
    """What the collator and the loss of the KD plugin make of an export, with this model as the student."""
    from axolotl.integrations.kd.collator import DataCollatorForKD
    from axolotl.integrations.kd.topk_logprob.forward_kl import loss
    from datasets import load_dataset

    rows = list(load_dataset("parquet", data_files=f"{folder}/data/train-*.parquet", split="train"))
    student = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    batch = DataCollatorForKD(AutoTokenizer.from_pretrained(Path(folder) / "tokenizer"))(rows)
    mask = batch["target_mask"].bool()
    predicted = mask.any(-1)
    shares = (batch["target_logprobs"].exp() * mask).sum(-1)[predicted]
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["target_token_ids"], batch["target_logprobs"], batch["target_mask"]
    return {
        "rows": len(rows),
        "aligned": bool((predicted[:, :-1] == (batch["labels"][:, 1:] != -100)).all()),
        "shares": [float(shares.min()), float(shares.max())],
        "loss": float(loss(logits, *targets, num_items_in_batch=int(predicted.sum()))),
        "loss one token later": float(loss(logits.roll(1, 1), *targets, num_items_in_batch=int(predicted.sum()))),
    }


if __name__ == "__main__":
    with torch.no_grad() if sys.argv[1] != "trl" else torch.enable_grad():
        result = globals()[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(result))
