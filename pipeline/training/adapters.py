"""Optional libraries for a student's body: low-rank adapters (peft) and faster kernels (Liger).

Both change the student in place; loss and head remain softlabel's own. The saved student needs neither library.
"""

import warnings
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.models.adapter import merge
from softlabel.pipeline.models.experts import experts
from softlabel.storage.errors import StudentError, UsageError


def adapt(student: PreTrainedModel, config: StudentConfig) -> Callable[[], None]:
    """Freeze the student and add trainable low-rank adapters to its linear layers (LoRA, arXiv 2106.09685).

    Args:
        student: a causal language model; its head is not changed.
        config: settings of the student, with ``lora_r``.

    Returns:
        A function that merges the trained adapters into the weights; see ``pipeline.models.adapter.merge``.

    Raises:
        UsageError: if peft is not installed, or ``lora_target_modules`` names layers that the student does not have.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise _not_installed("student.lora_r", "peft", "adapters") from None
    head = student.get_output_embeddings()
    linear = [name for name, part in student.named_modules() if isinstance(part, nn.Linear | Conv1D) and part != head]
    # peft ignores names that it does not find, and would adapt the head, whose weights the loss reads directly.
    unknown = [
        name for name in config.lora_target_modules if not any(f".{layer}".endswith(f".{name}") for layer in linear)
    ]
    if unknown:
        raise UsageError(
            "student.lora_target_modules names layers that the student does not have",
            expected="the student's linear layers, without the head: "
            + ", ".join(sorted({layer.rpartition(".")[2] for layer in linear})),
            found=f"student.lora_target_modules: {' '.join(unknown)}",
            where=student.config.name_or_path,
            do="leave it out to adapt every linear layer except the head",
        )
    targets = list(config.lora_target_modules) or "all-linear"
    adapted = get_peft_model(student, LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=targets))
    return lambda: merge(adapted, student.config.name_or_path or "the student", StudentError) and None


def warn_of_experts(student: PreTrainedModel, adapted: bool) -> None:
    """Say what is not trained of a student with experts (MoE): its router's balance and, with adapters, its experts."""
    found = experts(student)
    if not found:
        return
    missing = ["the loss that keeps its router's load balanced is not part of the training"]
    fused = [part for part in found if not any(isinstance(layer, nn.Linear) for layer in part.modules())]
    if adapted and fused:
        missing.append("student.lora_r adapts linear layers only, not the experts, whose weights are fused")
    warnings.warn(f"the student is a mixture of experts: {'; '.join(missing)}.", stacklevel=2)


def use_liger(student: PreTrainedModel) -> None:
    """Use Liger's kernels for rotary positions, norms and feed-forward layers, where it supports the architecture.

    Raises:
        UsageError: if Liger is not installed, or there is no GPU.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        raise _not_installed("optimizer.use_liger_kernel", "liger-kernel", "liger") from None
    if not torch.cuda.is_available():
        raise UsageError("Liger's kernels need a GPU", found="no GPU", do="leave out optimizer.use_liger_kernel")
    _apply_liger_kernel_to_instance(model=student, cross_entropy=False, fused_linear_cross_entropy=False)


def _not_installed(setting: str, package: str, extra: str) -> UsageError:
    return UsageError(
        f"{setting} needs the package {package}, which is not installed",
        do=f"pip install 'softlabel[{extra}]'",
    )
