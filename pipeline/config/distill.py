"""Settings of ``distill``, which captures, trains and evaluates in one run."""

from typing import Self

from pydantic import model_validator

from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.evaluate import CostConfig, EvaluateConfig
from softlabel.pipeline.config.train import (
    LossConfig,
    OptimizerConfig,
    Output,
    StreamConfig,
    StudentConfig,
    TrainConfig,
)


class DistillConfig(CaptureConfig):
    """Capture, train and evaluate in one run."""

    output: Output
    """Folder for the student (student/), the control (control/) and the report (report/). {version} in it stands for
    the table's version after the capture, so that each version gets students of its own."""
    student: StudentConfig = StudentConfig()
    loss: LossConfig = LossConfig()
    stream: StreamConfig = StreamConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    cost: CostConfig = CostConfig()
    control: bool = True
    """Also train a control for comparison: the same student with the same optimizer settings, on hard labels
    only."""

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        """Training checks this as well; here it fails before the teacher has run for hours."""
        if len(self.student.given) != 1:
            found = " and ".join(self.student.given) or "none"
            raise ValueError(
                f"give exactly one of student.model, student.layers, student.depth and student.config; found {found}"
            )
        return self

    def capture(self) -> CaptureConfig:
        """Settings of the capture."""
        return CaptureConfig(**{name: getattr(self, name) for name in CaptureConfig.model_fields})

    def train(self) -> dict[str, TrainConfig]:
        """Settings of each training, by name: the student's and, if ``control`` is set, the control's."""
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
        """Settings of the evaluation."""
        students = tuple(config.output for config in self.train().values())
        control = students[1] if self.control else None
        return EvaluateConfig(
            table=self.table,
            students=students,
            control=control,
            report=f"{self.output}/report",
            report_to=self.optimizer.report_to,
            device=self.optimizer.device,
            cost=self.cost,
        )
