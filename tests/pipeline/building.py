"""Builds students for tests, as a training does."""

from transformers import PreTrainedModel

from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.objectives.decide import objective_of
from softlabel.pipeline.students.origin import Origin
from softlabel.storage.views.view import AnyTable


def built(config: StudentConfig, table: AnyTable, packing: bool = False) -> PreTrainedModel:
    """The student that the settings describe."""
    return objective_of(Origin.of(table)).build(config, table, packing)
