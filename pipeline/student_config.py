"""The settings of a student, of its loss and of its optimiser.

Parts of ``pipeline.config``'s jobs; what they mean is written where they are used.
"""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.settings import Location, Settings


class StudentConfig(Settings):
    """The model that is trained: give exactly one of model, layers, depth and config."""

    model: Location | None = None
    """Folder or hub name of a model to go on from."""
    teacher: Location | None = None
    """Folder or hub name of the model that layers are taken from; left out, the table's own teacher."""
    revision: str | None = None
    """Commit, tag or branch of a hub name."""
    layers: tuple[int, ...] | None = None
    """Prune the teacher to these of its layers, counted from 0."""
    depth: PositiveInt | None = None
    """Prune the teacher to so many of its layers, evenly spread, the first and the last among them."""
    intermediate_size: PositiveInt | None = None
    """With layers or depth: keep only so many neurons of each feed-forward layer, the most active on the table's
    text."""
    config: Location | None = None
    """Folder or JSON file with a model configuration; the student starts from random weights."""
    labels: tuple[str, ...] = ()
    """Labels of a classifier: NAME=CLASS,CLASS,... for several of the teacher's classes together, or a class's name;
    left out, its classes. What the teacher says of classes without a label is left out, the rest renormalised."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Precision of the student's weights."""
    lora_rank: PositiveInt | None = None
    """Train only low-rank adapters (LoRA) of this rank; the student is saved whole, with the adapters merged."""
    lora_alpha: PositiveFloat = 16.0
    """What an adapter adds is scaled by this, divided by its rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get adapters, like q_proj; left out, every linear layer but the head."""

    @model_validator(mode="after")
    def _only_a_teacher_is_narrowed(self) -> Self:
        if self.intermediate_size is not None and self.layers is None and self.depth is None:
            raise ValueError("intermediate_size makes a pruned teacher narrower: give layers or depth")
        return self

    @model_validator(mode="after")
    def _a_revision_is_of_something(self) -> Self:
        if self.revision is not None and not (self.model or self.teacher or self.config):
            raise ValueError("revision is that of a hub name: give it with model, teacher or config")
        return self

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the settings that say where the student comes from; one of them, if it is to be built."""
        sources = ("model", "layers", "depth", "config")
        return tuple(f"student.{name}" for name in sources if getattr(self, name) is not None)


class LossConfig(Settings):
    """L = hard_weight x cross-entropy + soft_weight x divergence, each averaged over the captured positions."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"] = (
        "forward_kl"
    )
    """Divergence between teacher and student."""
    target: Literal["auto", "bucket", "sampled", "renormalised", "zero_tail"] = "auto"
    """The rest of the distribution: one bucket of its mass, or the sampled tail (forward KL at temperature 1, and
    what auto takes there if the table has one); renormalised and zero_tail drop it, and are biased."""
    mix: float = Field(default=0.5, gt=0, lt=1)
    """The mixture weight of jsd (beta) and of the skew divergences (lambda)."""
    temperature: PositiveFloat = 1.0
    """Softens teacher and student alike; one of the temperatures stored in the table."""
    hard_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy with the token that follows."""
    soft_weight: float = Field(default=1.0, ge=0)
    """Weight of the divergence; 0 trains on hard labels alone."""
    hard_weight_end: float | None = Field(default=None, ge=0)
    """Weight of the cross-entropy at the last step, reached in equal steps; left out, it stays as it is."""
    soft_weight_end: float | None = Field(default=None, ge=0)
    """Weight of the divergence at the last step, reached in equal steps; left out, it stays as it is."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        for moment, loss in (("first", self.at(0.0)), ("last", self.at(1.0))):
            if loss.hard_weight == 0 and loss.soft_weight == 0:
                raise ValueError(f"both weights are 0 at the {moment} step: nothing would be learned")
        return self

    def at(self, share: float) -> "LossConfig":
        """The loss, its weights constant, when a share (0 to 1) of the run is done."""
        weights = {
            "hard_weight": _between(self.hard_weight, self.hard_weight_end, share),
            "soft_weight": _between(self.soft_weight, self.soft_weight_end, share),
        }
        return self.model_copy(update={**weights, "hard_weight_end": None, "soft_weight_end": None})

    def in_words(self, target: str | None = None) -> str:
        """The loss as a reader of a report knows it: ``0.5 × cross-entropy + forward KL (bucket) at temperature 2``.

        Args:
            target: what the student is compared with, if that is in question.
        """
        divergence = self.divergence.replace("_", " ").replace("kl", "KL").replace("jsd", "JSD")
        mix = f"mix {self.mix:g}" if self.divergence == "jsd" or self.divergence.startswith("skew") else None
        notes = [note for note in (mix, target and _TARGETS[target]) if note]
        if notes:
            divergence += f" ({', '.join(notes)})"
        if self.temperature != 1:
            divergence += f" at temperature {self.temperature:g}"
        parts = [
            (self.hard_weight, self.hard_weight_end, "cross-entropy"),
            (self.soft_weight, self.soft_weight_end, divergence),
        ]
        return " + ".join(_weighted(*part) for part in parts if part[0] or part[1])


_TARGETS = {
    "bucket": "bucket",
    "sampled": "sampled tail",
    "renormalised": "renormalised head",
    "zero_tail": "zero tail",
}
"""Names of the targets in a sentence."""


def _between(start: float, end: float | None, share: float) -> float:
    return start if end is None else start + share * (end - start)


def _weighted(weight: float, end: float | None, name: str) -> str:
    if end is not None and end != weight:
        return f"({weight:g} to {end:g}) × {name}"
    return name if weight == 1 else f"{weight:g} × {name}"


class OptimiserConfig(Settings):
    """How long and how fast the student is trained."""

    epochs: PositiveFloat = 1.0
    """Passes over the train split."""
    max_steps: PositiveInt | None = None
    """Optimiser steps, instead of epochs."""
    learning_rate: PositiveFloat = 5e-4
    """Peak learning rate of AdamW."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after that."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_gradient_norm: PositiveFloat = 1.0
    """Gradients longer than this are shortened to it."""
    bf16: bool = False
    """Forward and backward in bfloat16, the weights staying in the student's dtype."""
    liger: bool = False
    """Use Liger's kernels in the student's body, on a GPU; the loss is softlabel's all the same."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    checkpoint_steps: PositiveInt = 500
    """Steps between checkpoints; a killed run goes on from the last one."""
    eval_steps: PositiveInt = 100
    """Steps between evaluations on the eval split."""
    patience: PositiveInt | None = None
    """Stop when so many evaluations in a row have brought no lower eval_kl; left out, all steps are done."""
    keep: Literal["auto", "last", "best"] = "auto"
    """The weights that the student is saved with: those of the last step, or of the evaluation with the lowest
    eval_kl; auto takes the best with patience, else the last."""
    device: str = "auto"
    """cpu or cuda; auto takes a GPU if there is one."""
    processes: PositiveInt | None = None
    """Processes that share each step, each with a GPU of its own; left out, one for each GPU that
    there is. On the CPU one, unless more are asked for."""
    sharding: Literal["none", "full"] = "none"
    """What the processes share beside the work: full divides weights, gradients and the optimiser's moments among them
    (FSDP), for a student that is too large for each of them to hold; one process holds all of it either way."""
    seed: int = 0
    """Seed of the student's random numbers."""

    @property
    def keeps_best(self) -> bool:
        """Whether the best weights are kept, and not the last."""
        return self.keep == "best" or (self.keep == "auto" and self.patience is not None)
