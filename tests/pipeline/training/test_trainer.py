"""What our trainer relies on inside transformers' Trainer: a release that changes it fails here, not in a training."""

import inspect

import pytest
from transformers import Trainer

from softlabel.pipeline.training.trainer import DistillationTrainer

OVERRIDDEN = {
    "get_train_dataloader": "self",
    "compute_loss": "self, model, inputs, return_outputs, num_items_in_batch",
    "log": "self, logs, start_time",
    "evaluate": "self, eval_dataset, ignore_keys, metric_key_prefix",
    "save_model": "self, output_dir, _internal_call",
    "create_scheduler": "self, num_training_steps, optimizer",
    "_clip_grad_norm": "self, model",
    "_save_optimizer_and_scheduler": "self, output_dir",
    "_load_from_checkpoint": "self, resume_from_checkpoint, model",
    "_load_optimizer_and_scheduler": "self, checkpoint",
}
"""Methods of the Trainer that ours replaces, with their parameters as transformers has them."""


def test_the_trainer_overrides_these_methods_and_no_others():
    ours = {name for name in vars(DistillationTrainer) if hasattr(Trainer, name) and not name.startswith("__")}
    assert ours == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_has_the_parameters_that_transformers_calls_it_with(name: str):
    assert ", ".join(inspect.signature(getattr(Trainer, name)).parameters) == OVERRIDDEN[name]
    call = [None] * len(inspect.signature(getattr(Trainer, name)).parameters)
    inspect.signature(getattr(DistillationTrainer, name)).bind(*call)
