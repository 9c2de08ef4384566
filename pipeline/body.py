"""Optional libraries at a student's body: low-rank adapters (peft) and faster kernels (Liger).

Both change the student in place; the loss and the head stay softlabel's own. What a student is saved as needs neither.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from pipeline.student_config import StudentConfig
from storage.errors import UsageError


def adapt(student: PreTrainedModel, config: StudentConfig) -> Callable[[], None]:
    """Freeze the student, but for low-rank adapters beside its linear layers (LoRA, arXiv 2106.09685).

    Args:
        student: a causal language model; its head is left alone.
        config: with ``lora_rank``.

    Returns:
        What merges the adapters into the weights, once they are trained.

    Raises:
        UsageError: if peft is not there, or the student has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise _missing("student.lora_rank", "peft", "adapters") from None
    targets = list(config.lora_targets) or "all-linear"
    settings = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
    try:
        adapted = get_peft_model(student, settings)
    except ValueError as error:
        raise UsageError(
            "the student has no such layers to adapt",
            expected="names of linear layers, like q_proj",
            found=f"student.lora_targets: {' '.join(config.lora_targets)}",
            where=student.config.name_or_path,
            do="leave it out to adapt every linear layer but the head",
        ) from error
    return lambda: adapted.merge_and_unload() and None


def use_liger(student: PreTrainedModel) -> None:
    """Liger's kernels for rotary positions, norms and feed-forward layers, where it has them for this architecture.

    Raises:
        UsageError: if Liger is not there, or no GPU.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        raise _missing("optimiser.liger", "liger-kernel", "liger") from None
    if not torch.cuda.is_available():
        raise UsageError("Liger's kernels need a GPU", found="none", do="leave out optimiser.liger")
    _apply_liger_kernel_to_instance(model=student, cross_entropy=False, fused_linear_cross_entropy=False)


def _missing(setting: str, package: str, extra: str) -> UsageError:
    return UsageError(
        f"{setting} needs {package}",
        expected=f"the package {package}",
        found="no such package",
        do=f"pip install 'softlabel[{extra}]'",
    )
