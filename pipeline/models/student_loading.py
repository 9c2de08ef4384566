"""Load a student's model and check every weight: it must be in the files, have the right shape and be finite.

Transformers alone would fill missing or mismatched weights with random numbers. Only safetensors are loaded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging

from softlabel.pipeline.models import pretrained
from softlabel.pipeline.models.files import INSTALL, PACKAGES, UntrustedCodeError, first_line
from softlabel.storage.errors import StudentError


def load_student_model(
    architecture: Any, source: Path, dtype: torch.dtype, **settings: Any
) -> tuple[PreTrainedModel, dict[str, str]]:
    """A model and, by name, what is wrong with each weight that could not be taken from its files.

    Args:
        architecture: one of transformers' Auto classes.
        source: folder with the model.
        dtype: dtype of the weights.
        settings: values that replace those of the model's configuration.

    Raises:
        StudentError: if it can't be loaded.
    """
    with _quiet():
        model, report = load_or_raise(
            source,
            "model",
            lambda: pretrained.load_model(architecture, source, dtype=dtype, ignore_mismatched_sizes=True, **settings),
        )
    wrong = dict.fromkeys(report["missing_keys"], "missing")
    wrong |= {name: f"{tuple(there)}, not {tuple(wanted)}" for name, there, wanted in report["mismatched_keys"]}
    return model, wrong


def require_weights(model: PreTrainedModel, source: Path, wrong: dict[str, str], but: str = "") -> None:
    """Refuse a model with weights that are not from its files, or not finite.

    Args:
        model: the loaded model.
        source: folder that it was loaded from.
        wrong: problems that ``load_student_model`` returned, without those that are acceptable.
        but: exception to "every weight" in the error's text.

    Raises:
        StudentError: if any weight is missing, of another shape or not finite.
    """
    if wrong:
        first = min(wrong)
        raise StudentError(
            "the student's files lack some of its weights",
            expected=f"every weight of {type(model).__name__}{but}, in the shape that its configuration gives",
            found=f"{len(wrong)} missing or of another shape, starting with {first}: {wrong[first]}",
            where=source,
            do="download or save the model again",
        )
    if not finite(model):
        names = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
        raise StudentError(
            "some of the student's weights are not finite numbers",
            expected="finite numbers in every weight",
            found=f"NaN or infinity in {len(names)} weight tensors, starting with {names[0]}",
            where=source,
            do="use another model; this one may come from a training run that diverged",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings about weights: missing ones are an error here, unless a new head is wanted."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def finite(model: nn.Module) -> bool:
    """Whether all weights are finite; for a sharded student, those in this rank's shard."""
    local = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters())
    return bool(torch.stack([weight.detach().isfinite().all() for weight in local]).all())


T = TypeVar("T")


def load_or_raise(source: Path, what: str, load: Callable[[], T]) -> T:
    """What ``load`` returns; any error of it becomes a StudentError.

    Args:
        source: folder, for the error.
        what: what is loaded, for the error.
        load: loads it.

    Raises:
        StudentError: if ``load`` fails.
    """
    try:
        return load()
    except Exception as error:  # damaged files raise many kinds of errors
        missing = isinstance(error, ImportError)
        raise StudentError(
            f"the student's {what} can't be loaded",
            expected=PACKAGES
            if missing
            else "a folder or a hub repository with config.json, *.safetensors and a tokenizer",
            found=first_line(error) or repr(error),
            where=source.absolute(),
            do="use a model and a tokenizer that transformers loads without extra code; a student's code is never run"
            if isinstance(error, UntrustedCodeError)
            else INSTALL
            if missing
            else "download or save the model again; its weights must be in safetensors",
        ) from error
