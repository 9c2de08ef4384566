"""Load the teacher that the settings name."""

from collections.abc import Callable
from functools import lru_cache
from pkgutil import resolve_name

from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.teachers.kind import kind_of
from softlabel.pipeline.teachers.teacher import Teacher


def load_teacher(config: TeacherConfig, checkpoint: Checkpoint) -> Teacher:
    """The teacher, run by the engine that the settings name; loaded once in each process while its files stay the same.

    Args:
        config: engine, device and memory.
        checkpoint: the teacher's files.
    """
    return _load(config, checkpoint, checkpoint.identity.model_dump_json())


@lru_cache(maxsize=1)
def _load(config: TeacherConfig, checkpoint: Checkpoint, identity: str) -> Teacher:
    engine: Callable[..., Teacher] = resolve_name(config.engine or kind_of(checkpoint.classes).engine)
    return engine(config, checkpoint)
