"""The one decision of a run between the two kinds of models."""

from softlabel.pipeline.objectives.classifier import Classifier
from softlabel.pipeline.objectives.language_model import LanguageModel
from softlabel.pipeline.objectives.objective import Objective
from softlabel.pipeline.students.origin import Origin


def objective_of(origin: Origin) -> Objective:
    """The objective that soft labels allow: that of a language model or, with classes, that of a classifier."""
    return LanguageModel(origin) if origin.classes is None else Classifier(origin, origin.classes)
