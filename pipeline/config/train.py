"""Settings of a training: the student, its loss, its optimizer, and the stream of its batches."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from softlabel.pipeline.config.base import Location, Settings

SOURCES = ("model", "layers", "depth", "config")
"""Settings that say what a student starts from: exactly one is needed."""


Trackers = tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...]
"""Programs that show the curves and results of trainings."""


class StudentConfig(Settings):
    """The model to train: give exactly one of model, layers, depth and config."""

    model: Location | None = None
    """Folder or hub name of a model to continue training."""
    teacher: Location | None = None
    """Folder or hub name of the model to take layers from; if left out, the table's own teacher."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    layers: tuple[int, ...] | None = None
    """Prune the teacher to these layers, counted from 0."""
    depth: PositiveInt | None = None
    """Prune the teacher to this many layers, evenly spaced, including the first and the last."""
    intermediate_size: PositiveInt | None = None
    """With layers or depth: keep only this many neurons of each feed-forward layer, those most active on the
    table's text."""
    config: Location | None = None
    """Folder or JSON file with a model configuration; the student starts from random weights."""
    labels: tuple[str, ...] = ()
    """Labels of a classifier: NAME=CLASS,CLASS,... merges several of the teacher's classes into one label; the name
    of a class keeps it as it is. If left out, all classes are kept. Classes without a label are ignored, and the
    remaining probabilities renormalized."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Precision of the student's weights."""
    lora_r: PositiveInt | None = None
    """Train only low-rank adapters (LoRA) of this rank; the student is saved as a whole model, with the adapters
    merged."""
    lora_alpha: PositiveFloat = 16.0
    """Scaling of the adapters: their output is multiplied by lora_alpha / lora_r."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the layers that get adapters, such as q_proj; if left out, every linear layer except the head."""

    @model_validator(mode="after")
    def _intermediate_size_needs_pruning(self) -> Self:
        if self._source_is_known and self.intermediate_size and self.layers is None and self.depth is None:
            raise ValueError("intermediate_size applies only to a pruned teacher; give layers or depth too")
        return self

    @model_validator(mode="after")
    def _revision_needs_a_hub_model(self) -> Self:
        if self._source_is_known and self.revision and not (self.model or self.teacher or self.config):
            raise ValueError("revision applies only to a hub model; give model, teacher or config too")
        return self

    @property
    def _source_is_known(self) -> bool:
        """Whether the student's source is not left out, and so can't come from an earlier run's record."""
        return not self.model_fields_set.isdisjoint(SOURCES)

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the settings given for where the student comes from; a student needs exactly one."""
        return tuple(f"student.{name}" for name in SOURCES if getattr(self, name) is not None)


class LossConfig(Settings):
    """L = hard_weight x cross-entropy + soft_weight x divergence, each averaged over the captured positions."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"] = (
        "forward_kl"
    )
    """Divergence between teacher and student."""
    target: Literal["auto", "bucket", "sampled", "renormalized", "zero_tail"] = "auto"
    """How to treat the probability outside the head: bucket sums it up as one extra class; sampled uses the sampled
    tail (only forward KL at temperature 1); auto uses sampled where it can, else bucket. renormalized and zero_tail
    ignore that probability, and are biased."""
    mix: float = Field(default=0.5, gt=0, lt=1)
    """Mixture weight of jsd (beta) and of the skew divergences (lambda)."""
    temperature: PositiveFloat = 1.0
    """Temperature that softens both teacher and student; must be stored in the table."""
    hard_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy with the actual next token (for a classifier, with the document's label)."""
    soft_weight: float = Field(default=1.0, ge=0)
    """Weight of the divergence; 0 trains on hard labels only."""
    hard_weight_end: float | None = Field(default=None, ge=0)
    """Weight of the cross-entropy at the last step, reached linearly; if left out, the weight stays constant."""
    soft_weight_end: float | None = Field(default=None, ge=0)
    """Weight of the divergence at the last step, reached linearly; if left out, the weight stays constant."""

    @model_validator(mode="after")
    def _weights_are_not_both_zero(self) -> Self:
        for moment, end in (("first", ""), ("last", "_end")):
            each = [(f"{name}{end}", name) for name in ("hard_weight", "soft_weight")]
            now = [next(name for name in names if getattr(self, name) is not None) for names in each]
            if all(self.gives(name) and getattr(self, name) == 0 for name in now):
                raise ValueError(
                    f"hard_weight and soft_weight are both 0 at the {moment} step, so nothing would be learned; set"
                    f" hard_weight{end} or soft_weight{end} above 0"
                )
        return self

    def at(self, share: float) -> "LossConfig":
        """The loss with constant weights: those in effect when a share (0 to 1) of the run is done."""
        weights = {
            "hard_weight": _between(self.hard_weight, self.hard_weight_end, share),
            "soft_weight": _between(self.soft_weight, self.soft_weight_end, share),
        }
        return self.model_copy(update={**weights, "hard_weight_end": None, "soft_weight_end": None})

    def in_words(self, target: str | None = None) -> str:
        """The loss as a report shows it: ``0.5 × cross-entropy + forward KL (bucket) at temperature 2``.

        Args:
            target: the target that was used, for a report that shows it.
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
    "renormalized": "renormalized head",
    "zero_tail": "zero tail",
}
"""What a report calls each target."""


def _between(start: float, end: float | None, share: float) -> float:
    return start if end is None else start + share * (end - start)


def _weighted(weight: float, end: float | None, name: str) -> str:
    if end is not None and end != weight:
        return f"({weight:g} to {end:g}) × {name}"
    return name if weight == 1 else f"{weight:g} × {name}"


class OptimizerConfig(Settings):
    """How long and how fast the student is trained."""

    num_train_epochs: PositiveFloat = 1.0
    """Passes over the train split; a finished student that gets more of them is trained further."""
    max_steps: PositiveInt | None = None
    """Number of optimizer steps; replaces num_train_epochs. A finished student that gets more is trained further."""
    learning_rate: PositiveFloat = 5e-4
    """Peak learning rate of AdamW."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises. When a finished student is trained further, it rises and
    falls again over the further steps."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate changes after the warmup."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are clipped to it."""
    bf16: bool = False
    """Run the forward and backward passes in bfloat16; the weights stay in the student's dtype."""
    use_liger_kernel: bool = False
    """Use Liger kernels inside the student, on a GPU; softlabel still computes the loss."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    save_steps: PositiveInt = 500
    """Steps between checkpoints; a killed run continues from the last one."""
    eval_steps: PositiveInt = 100
    """Steps between evaluations on the eval split."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without a new lowest eval_kl; if left out, training runs to the
    end."""
    keep: Literal["auto", "last", "best"] = "auto"
    """Which weights to save: those of the last step, or of the evaluation with the lowest eval_kl (best). auto
    saves the best with early_stopping_patience, else the last."""
    device: str = "auto"
    """cpu or cuda; auto uses a GPU if there is one."""
    processes: PositiveInt | None = None
    """Processes that share each step, each with its own GPU; if left out, one per GPU, or one on the CPU."""
    sharding: Literal["none", "full"] = "none"
    """full divides weights, gradients and optimizer state among the processes (FSDP), for a student that does not
    fit on one GPU. It has no effect with one process."""
    seed: int = 0
    """Seed of the student's random numbers."""
    report_to: Trackers = ()
    """Trackers that show the curves during training and, of distill, the results of the evaluation; each needs its
    package. tensorboard writes into the student's folder; the others are configured by their own environment variables,
    as in transformers. The student's record and the report have the curves in any case."""

    @property
    def keeps_best(self) -> bool:
        """Whether the best weights are saved, rather than the last."""
        return self.keep == "best" or (self.keep == "auto" and self.early_stopping_patience is not None)


class StreamConfig(Settings):
    """How rows of the table become batches."""

    packing: bool = True
    """Pack as many sequences into each training row as fit. Without packing, each sequence gets a padded row of its
    own: that is slower, but required for students that would mix the sequences of one row (Mamba, Falcon, ...)."""
    max_length: PositiveInt = 1024
    """Length of a training row, in tokens; sequences are never cut, so it must be at least the table's longest.
    Without packing, a row is as long as the longest sequence of its forward pass."""
    batch_size: PositiveInt = 8
    """Training rows per optimizer step, over all devices."""
    micro_batch_size: PositiveInt = 8
    """Training rows per forward pass on one device; affects memory and speed, never the loss."""
    max_k: PositiveInt | None = None
    """Use only this many of the stored head ids; if left out, all of them. The probability of the others goes to the
    bucket; if the table stores more ids, the sampled tail can't be the target."""
    seed: int = 0
    """Seed for the order of the sequences."""


VERSION = "{version}"
"""What stands for the table's version in the name of an output folder."""


def _only_the_version(output: str) -> str:
    if unknown := [word for word in re.findall(r"\{[A-Za-z_][^{}]*\}", output) if word != VERSION]:
        raise ValueError(f"{', '.join(unknown)} stands for nothing; {VERSION} stands for the table's version")
    return output


Output = Annotated[Location, AfterValidator(_only_the_version)]
"""A folder to write to, whose name may contain ``{version}``."""


class TrainConfig(Settings):
    """Train a student from a table."""

    table: Location
    """Folder of the table; TABLE@12 opens version 12."""
    output: Output
    """Folder to write the student to. {version} in it stands for the table's version, as in students/{version}, so
    that each version of a growing table gets a student of its own."""
    student: StudentConfig = StudentConfig()
    loss: LossConfig = LossConfig()
    stream: StreamConfig = StreamConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
