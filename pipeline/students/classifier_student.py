"""Builds students that are classifiers, with a head for their labels."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.models.checkpoint import class_names, is_classifier
from softlabel.pipeline.models.padding import padding_id
from softlabel.pipeline.models.pretrained import blank_model, fresh_model, load_config
from softlabel.pipeline.models.student_loading import load_or_raise, load_student_model, require_weights
from softlabel.pipeline.students.build import name_special_tokens, pruned
from softlabel.pipeline.students.labels import LabelMap
from softlabel.pipeline.students.source import StudentSource
from softlabel.storage.views.view import AnyTable


def build_classifier(
    config: StudentConfig, labels: LabelMap, table: AnyTable, source: StudentSource
) -> PreTrainedModel:
    """The student that the settings describe, on the CPU, with a head for its labels.

    A head for the same labels is kept; a model without one, or with one for other labels, gets a new random head.

    Args:
        config: settings of the student.
        labels: the student's labels.
        table: the table that it has to fit.
        source: the files that it is made from, which ``require_fitting`` has checked.

    Raises:
        StudentError: if it can't be loaded.
    """
    folder, names = source.path, labels.names
    head: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    dtype, tokenizer = getattr(torch, config.dtype), source.origin.tokenizer()
    if config.config is not None:
        settings = load_or_raise(folder, "configuration", lambda: load_config(folder, **head))
        name_special_tokens(settings, tokenizer)
        student = load_or_raise(
            folder, "model", lambda: fresh_model(AutoModelForSequenceClassification, settings, dtype=dtype)
        )
    else:
        student = pruned(_load(folder, dtype, head), config, table)
    padding_id(student, tokenizer)
    return student


def _load(source: Path, dtype: torch.dtype, head: dict[str, Any]) -> PreTrainedModel:
    settings = load_or_raise(source, "configuration", lambda: load_config(source))
    # A model that was not saved as a classifier has no head, even if its configuration names classes.
    same_labels = is_classifier(settings) and class_names(settings) == tuple(head["id2label"].values())
    student, wrong = load_student_model(AutoModelForSequenceClassification, source, dtype, **head)
    if not same_labels:  # also if there are equally many of them
        _reset_head(student)
    # Only a new head and its pooling layer may be missing from the file.
    body = f"{student.base_model_prefix}."
    needed = {name for name in wrong if same_labels or (name.startswith(body) and ".pooler." not in name)}
    require_weights(
        student, source, {name: wrong[name] for name in needed}, but="" if same_labels else " but its head's"
    )
    return student


def blank_classifier(config: Any, source: Path) -> PreTrainedModel:
    """A classifier without weights, of a configuration from these files; see ``blank_model``."""
    model: PreTrainedModel = blank_model(AutoModelForSequenceClassification, config)
    model.config.name_or_path = str(source)
    return model


@torch.no_grad()
def _reset_head(student: PreTrainedModel) -> None:
    """Initialize the linear layers outside the model's body at random."""
    for name, module in student.named_children():
        if name != student.base_model_prefix:
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    nn.init.normal_(part.weight, std=getattr(student.config, "initializer_range", 0.02))
                    if part.bias is not None:
                        nn.init.zeros_(part.bias)
