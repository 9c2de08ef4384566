"""A student's model from its files: every weight of it is there, has the right shape and is a number, or it is refused.

transformers itself would fill what is missing, or does not fit, with random numbers. Loads nothing but safetensors.
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
from softlabel.pipeline.models.files import UntrustedCodeError
from softlabel.storage.errors import StudentError


def load_model(
    architecture: Any, source: Path, dtype: torch.dtype, **settings: Any
) -> tuple[PreTrainedModel, dict[str, str]]:
    """A model, and what is wrong with the weights that its files do not give, by their names.

    Args:
        architecture: one of transformers' Auto classes.
        source: folder.
        dtype: of the weights.
        settings: of the model's configuration.

    Raises:
        StudentError: if it can't be loaded.
    """
    with _without_report():
        model, report = explained(
            source,
            "model",
            lambda: pretrained.load_model(architecture, source, dtype=dtype, ignore_mismatched_sizes=True, **settings),
        )
    wrong = dict.fromkeys(report["missing_keys"], "missing")
    wrong |= {name: f"{tuple(there)}, not {tuple(wanted)}" for name, there, wanted in report["mismatched_keys"]}
    return model, wrong


def require_weights(model: PreTrainedModel, source: Path, wrong: dict[str, str], but: str = "") -> None:
    """Refuse a model some of whose weights are not those of its files, or are no numbers.

    Args:
        model: as it was loaded.
        source: where it was loaded from.
        wrong: what ``load_model`` said, without what does not matter.
        but: which weights these are, for the message.
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
def _without_report() -> Iterator[None]:
    """Keep transformers from warning of what is told in an error, or is what is wanted: a new head."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def finite(model: nn.Module) -> bool:
    """Whether all weights are numbers; of a student that is divided, this rank's share of them."""
    shares = (each.to_local() if isinstance(each, DTensor) else each for each in model.parameters())
    return bool(torch.stack([share.detach().isfinite().all() for share in shares]).all())


T = TypeVar("T")


def explained(source: Path, what: str, load: Callable[[], T]) -> T:
    """The loaded thing, or an error that says where it was looked for.

    Raises:
        StudentError: if it can't be loaded.
    """
    try:
        return load()
    except Exception as error:  # damaged files fail in as many ways as there are readers
        raise StudentError(
            f"the student's {what} can't be loaded",
            expected="a folder or a hub repository with config.json, *.safetensors and a tokenizer",
            found=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            where=source.absolute(),
            do="use a model and a tokenizer that transformers loads without extra code; a student's code is never run"
            if isinstance(error, UntrustedCodeError)
            else "download or save the model again; its weights must be in safetensors",
        ) from error
