"""Settings of the job that does all the others one after the other, like those of ``pipeline.config.capture``."""

from typing import Self

from pydantic import model_validator

from softlabel.pipeline.config.base import Location
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import LossConfig, OptimizerConfig, StreamConfig, StudentConfig, TrainConfig


class DistillConfig(CaptureConfig):
    """Capture, train and evaluate, from one file."""

    output: Location
    """Folder for the student (student/), its control (control/) and the report (report/)."""
    student: StudentConfig = StudentConfig()
    loss: LossConfig = LossConfig()
    stream: StreamConfig = StreamConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    control: bool = True
    """Also train the same student on hard labels alone, with the same optimizer settings, to compare with."""

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        """Said here too, before the teacher has run for hours."""
        if len(self.student.given) != 1:
            found = " and ".join(self.student.given) or "none of them"
            raise ValueError(
                f"give one of student.model, student.layers, student.depth and student.config, not {found}"
            )
        return self

    def capture(self) -> CaptureConfig:
        """The first stage's settings."""
        return CaptureConfig(**{name: getattr(self, name) for name in CaptureConfig.model_fields})

    def train(self) -> dict[str, TrainConfig]:
        """The second stage's settings: the student's and, if asked for, the control's, by name."""
        hard_only = LossConfig(hard_weight=1.0, soft_weight=0.0)
        losses = {"student": self.loss} | ({"control": hard_only} if self.control else {})
        return {
            name: TrainConfig(
                table=self.table,
                output=f"{self.output}/{name}",
                student=self.student,
                loss=loss,
                stream=self.stream,
                optimizer=self.optimizer,
            )
            for name, loss in losses.items()
        }

    def evaluate(self) -> EvaluateConfig:
        """The third stage's settings."""
        students = tuple(config.output for config in self.train().values())
        return EvaluateConfig(
            table=self.table, students=students, report=f"{self.output}/report", device=self.optimizer.device
        )
