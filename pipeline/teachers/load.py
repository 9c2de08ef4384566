"""Load the teacher that the settings name."""

from collections.abc import Callable
from functools import lru_cache
from pkgutil import resolve_name

from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.teachers.classifier_teacher import ClassifierTeacher, LabelTeacher
from softlabel.pipeline.teachers.teacher import Teacher, TransformersTeacher


def load_teacher(config: TeacherConfig, checkpoint: Checkpoint) -> Teacher | LabelTeacher:
    """The teacher, run by the engine that the settings name; loaded once in each process while its files stay the same.

    Args:
        config: engine, device and memory.
        checkpoint: the teacher's files.
    """
    return _load(config, checkpoint, checkpoint.identity.model_dump_json())


@lru_cache(maxsize=1)
def _load(config: TeacherConfig, checkpoint: Checkpoint, identity: str) -> Teacher | LabelTeacher:
    if config.labels:
        return LabelTeacher(checkpoint)
    kind = TransformersTeacher if checkpoint.classes is None else ClassifierTeacher
    engine: Callable[..., Teacher] = kind if config.engine is None else resolve_name(config.engine)
    return engine(config, checkpoint)
