"""Settings of the estimate, like those of ``pipeline.config``; and the rates of the devices that it can think of."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipeline.config import CaptureConfig
from pipeline.settings import Settings

Gpu = Literal["l4", "l40s", "a100", "h100", "h200", "b200", "mi300x"]

BF16_TERAFLOPS: dict[Gpu, float] = {
    "l4": 121,
    "l40s": 362,
    "a100": 312,
    "h100": 989,
    "h200": 989,
    "b200": 2250,
    "mi300x": 1307,
}
"""Dense bf16 rates by their makers' data sheets, which lead with twice as much, "with sparsity"; of the boards with
the highest rate (SXM, OAM)."""


class SampleConfig(Settings):
    """How much is looked at; more is more exact, and takes longer."""

    megabytes: PositiveFloat = 4.0
    """Text that is tokenised, spread over all documents."""
    batches: PositiveInt = 4
    """Batches that the teacher is timed on, of teacher.batch_tokens each, of long sequences and of short ones."""


class EstimateConfig(CaptureConfig):
    """Say from a small sample what a capture would give, cost and take, before it is run.

    Settings are those of the capture, and nothing is written.
    """

    table: str | None = None  # type: ignore[assignment]
    """Folder of a table: what it has already is left out. Without one, everything is new."""
    sample: SampleConfig = SampleConfig()
    gpu: Gpu = "h100"
    """The device whose hours are worked out from the floating-point operations, by arithmetic alone."""
    gpu_utilisation: float = Field(default=0.4, gt=0, le=1)
    """Share of that device's dense bf16 rate that is taken to be reached."""

    def capture(self, table: str) -> CaptureConfig:
        """The settings of the capture into a table."""
        return CaptureConfig(**{name: getattr(self, name) for name in CaptureConfig.model_fields} | {"table": table})
