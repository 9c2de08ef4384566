"""Settings of the estimate, and the computing rates of the GPUs that it knows."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from softlabel.pipeline.config.base import Location, Settings
from softlabel.pipeline.config.capture import CaptureConfig

Gpu = Literal["l4", "l40s", "a100", "h100", "h200", "b200", "mi300x"]

BF16_TERAFLOPS: dict[Gpu, float] = {
    "l4": 121,  # NVIDIA L4 Tensor Core GPU: 242 with sparsity
    "l40s": 362,  # NVIDIA L40S: 362.05, 733 with sparsity
    "a100": 312,  # NVIDIA A100 80GB SXM and PCIe: 312, 624 with sparsity
    "h100": 989,  # NVIDIA H100 SXM: 1,979 with sparsity
    "h200": 989,  # NVIDIA H200 SXM: 1,979 with sparsity
    "b200": 2250,  # NVIDIA HGX B200, one of eight: 4,500 with sparsity
    "mi300x": 1307,  # AMD Instinct MI300X: 1,307.4, 2,614.9 with sparsity
}
"""Dense bf16 rates of the boards that these data sheets are of; most sheets lead with the rate "with sparsity"."""


class SampleConfig(Settings):
    """How much is looked at; more is more exact, and takes longer."""

    megabytes: PositiveFloat = 4.0
    """Text that is tokenized, spread over all documents, and as much again of those that repeat another."""
    batches: PositiveInt = 4
    """Batches that the teacher is timed on, of teacher.batch_tokens each, of long sequences and of short ones."""


class EstimateConfig(CaptureConfig):
    """Say from a small sample what a capture would give, cost and take, before it is run.

    Settings are those of the capture, and nothing is written.
    """

    table: Location | None = None  # type: ignore[assignment]
    """Folder of a table: what it has already is left out. Without one, everything is new."""
    sample: SampleConfig = SampleConfig()
    gpu: Gpu = "h100"
    """The device whose hours are worked out from the floating-point operations, by arithmetic alone."""
    gpu_utilization: float = Field(default=0.4, gt=0, le=1)
    """Share of that device's dense bf16 rate that is taken to be reached."""

    def capture(self, table: str) -> CaptureConfig:
        """The settings of the capture into a table."""
        return CaptureConfig(**{name: getattr(self, name) for name in CaptureConfig.model_fields} | {"table": table})
