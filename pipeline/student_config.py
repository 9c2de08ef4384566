"""The settings of a student, of its loss and of its optimiser.

Parts of ``pipeline.config``'s jobs; what they mean is written where they are used.
"""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.settings import Settings


class StudentConfig(Settings):
    """The model that is trained: give exactly one of model, layers, depth and config."""

    model: str | None = None
    """Folder or hub name of a model to go on from."""
    teacher: str | None = None
    """Folder or hub name of the teacher that layers are taken from; left out, the one that the table names."""
    layers: tuple[int, ...] | None = None
    """Prune the teacher to these of its layers, counted from 0."""
    depth: PositiveInt | None = None
    """Prune the teacher to so many of its layers, evenly spread, the first and the last among them."""
    intermediate_size: PositiveInt | None = None
    """With layers or depth: keep only so many neurons of each feed-forward layer, the most active on the table's
    text."""
    config: str | None = None
    """Folder or JSON file with a model configuration; the student starts from random weights."""
    labels: tuple[str, ...] = ()
    """Labels of a classifier: NAME=CLASS,CLASS,... for several of the teacher's classes together, or a class's name;
    left out, its classes. What the teacher says of classes without a label is left out, the rest renormalised."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Precision of the student's weights."""

    @model_validator(mode="after")
    def _only_a_teacher_is_narrowed(self) -> Self:
        if self.intermediate_size is not None and self.layers is None and self.depth is None:
            raise ValueError("intermediate_size makes a pruned teacher narrower: give layers or depth")
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

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.hard_weight == 0 and self.soft_weight == 0:
            raise ValueError("hard_weight and soft_weight are both 0: nothing would be learned")
        return self


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
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    checkpoint_steps: PositiveInt = 500
    """Steps between checkpoints; a killed run goes on from the last one."""
    eval_steps: PositiveInt = 100
    """Steps between evaluations on the eval split."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    seed: int = 0
    """Seed of the student's random numbers."""
