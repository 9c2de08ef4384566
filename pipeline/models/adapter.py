"""Merge a peft adapter into a model's weights: a teacher's when they are loaded, from safetensors only.

The merged model is an ordinary one, whose forward pass costs no more than without the adapter.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softlabel.pipeline.models.files import broken, first_line, locate, sha256
from softlabel.pipeline.models.pretrained import load_adapter_config
from softlabel.storage.errors import SoftlabelError, TeacherError, UsageError

if TYPE_CHECKING:
    import torch

ADAPTER = "adapter_config.json"
"""Name of the file that makes a folder an adapter."""
_FILES = (ADAPTER, "adapter_model.safetensors")
_PROBE = 16
"""Tokens whose logits are compared before and after merging."""
_MERGE_NOISE = {"torch.bfloat16": 0.1, "torch.float16": 0.02, "torch.float32": 1e-3}
"""Share of the spread of the logits by which rounding may change them, with weights of each precision."""


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk."""

    folder: Path

    @classmethod
    def find(cls, name: str) -> "Adapter":
        """The adapter in a folder or in a repository on the hub.

        Raises:
            TeacherError: if there is no adapter in safetensors.
            UsageError: if peft is not installed.
        """
        if find_spec("peft") is None:
            raise UsageError(
                "an adapter needs the peft package, which is not installed",
                found=f"adapter: {name}",
                do="pip install 'softlabel[adapters]', or name a model without an adapter",
            )
        folder, _ = locate(name, "adapter")
        if not all((folder / file).is_file() for file in _FILES):
            raise TeacherError(
                "this folder does not contain an adapter",
                expected=" and ".join(_FILES),
                found=", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "an empty folder",
                where=folder,
                do="name a folder that peft's save_pretrained() wrote",
            )
        return cls(folder)

    @property
    def base(self) -> str:
        """Folder or hub name of the model that it was trained on.

        Raises:
            TeacherError: if its configuration can't be read, or does not say.
        """
        try:
            name = load_adapter_config(self.folder).base_model_name_or_path
        except Exception as error:  # damaged files raise many kinds of errors
            raise broken("the adapter's adapter_config.json can't be read", self.folder, error) from error
        if not name:
            raise TeacherError(
                "this adapter does not say which model it was trained on",
                expected="base_model_name_or_path",
                found="none",
                where=self.folder / ADAPTER,
                do="add it to the file, or merge the adapter into its model and use the merged model",
            )
        return str(name)

    @property
    def weights(self) -> Path:
        """The file with its weights."""
        return self.folder / _FILES[1]

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the files that the adapter's effect depends on."""
        return hashlib.sha256("".join(sha256(self.folder / file) for file in _FILES).encode()).hexdigest()

    def merged(self, model: Any) -> Any:
        """The model with the adapter merged into its weights.

        Raises:
            TeacherError: if the adapter was made for another model, is damaged, or is of a kind that can't be merged.
        """
        from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftModel, XLoraModel

        try:
            config = load_adapter_config(self.folder)
        except Exception as error:  # damaged files raise many kinds of errors
            raise broken("the adapter's adapter_config.json can't be read", self.folder, error) from error
        # Checked before it is loaded: prompt tuning would load another tokenizer, X-LoRA adapters from other folders.
        kind = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
        if not hasattr(kind, "merge_and_unload") or kind is XLoraModel:
            raise TeacherError(
                "this kind of adapter can't be merged into a model's weights",
                expected="an adapter that changes weights, such as LoRA",
                found=f"peft_type: {config.peft_type}",
                where=self.folder,
                do="use another adapter, or a model that needs none",
            )
        try:
            adapted = PeftModel(model, config)
            report = adapted.load_adapter(str(self.folder), "default")
        except Exception as error:
            if "size mismatch" in str(error):  # torch's own words: another vocabulary or width
                raise self._of_another_model(first_line(error)) from error
            raise broken("the adapter can't be applied to its model", self.folder, error) from error
        mismatches = sorted([*report.missing_keys, *report.unexpected_keys])
        if mismatches:
            found = f"{len(mismatches)} missing or unexpected weights, starting with {', '.join(mismatches[:3])}"
            raise self._of_another_model(found)
        return merge(adapted, self.folder, TeacherError)

    def _of_another_model(self, found: str) -> TeacherError:
        return TeacherError(
            "the adapter was made for another model",
            expected="weights for exactly the layers that it adapts",
            found=found,
            where=self.folder,
            do="name the model that the adapter was trained on (in teacher.model of a capture; to evaluate it, as "
            f"base_model_name_or_path in its {ADAPTER}), or download the adapter again",
        )


def merge(adapted: Any, where: str | Path, error: type[SoftlabelError]) -> Any:
    """The model with its adapter merged into its weights. It gives the same logits as before, or is refused.

    An adapted weight that the model also uses elsewhere (an output layer tied to the embedding) gets a copy of its own,
    because an adapter has an effect only where it was trained.

    Args:
        adapted: a peft model.
        where: where the adapter is from, for the error.
        error: class of the error.

    Raises:
        SoftlabelError: of that class, if it can't be merged, or merging changes the logits by more than rounding.
    """
    adapted.eval()
    _untie(adapted)
    before = _probe(adapted)
    try:
        merged = adapted.merge_and_unload()
    except Exception as problem:  # peft has many kinds of adapters, with errors of their own
        raise error(
            "the adapter can't be merged into the model's weights",
            expected="an adapter that only changes weights that the model has",
            found=f"{type(problem).__name__}: {first_line(problem)}",
            where=where,
            do="use another kind of adapter, or merge it yourself and use the merged model",
        ) from problem
    after = _probe(merged)
    scale = float((before - before.mean(-1, keepdim=True)).square().mean().sqrt())
    difference = float((after - before).square().mean().sqrt())
    if not difference <= _MERGE_NOISE[str(merged.dtype)] * scale:
        raise error(
            "merging the adapter into the model changes what the model computes",
            expected=f"the same logits as before, apart from rounding (their standard deviation is {scale:.3g})",
            found=f"logits that differ by {difference:.3g} (root mean square)",
            where=where,
            do="use another kind of adapter, or merge it yourself and use the merged model",
        )
    return merged


def _untie(adapted: Any) -> None:
    """Give each adapted layer weights of its own."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses = Counter(id(weight) for part in adapted.modules() for weight in part.parameters(recurse=False))
    for part in adapted.modules():
        if not isinstance(part, BaseTunerLayer):
            continue
        layer = part.get_base_layer()
        for name, weight in list(layer.named_parameters(recurse=False)):
            if uses[id(weight)] > 1:
                setattr(layer, name, torch.nn.Parameter(weight.detach().clone(), weight.requires_grad))
                adapted.config.tie_word_embeddings = False


def _probe(model: Any) -> "torch.Tensor":
    """Logits for some tokens, in float64."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(_PROBE, device=model.device) * max(1, rows // _PROBE) % rows
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits
    return logits.double()
