"""Settings of an estimate, and the computing rates of the GPUs that it can estimate for."""

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
"""Dense bf16 rates from the data sheets of these boards; most sheets lead with the rate "with sparsity"."""


class SampleConfig(Settings):
    """How large the sample is: a larger one is more exact, and takes longer."""

    megabytes: PositiveFloat = 4.0
    """Megabytes of text to tokenize, spread over all documents. Of documents that repeat another one, up to the
    same amount is tokenized as well."""
    batches: PositiveInt = 4
    """Batches to time the teacher on, of teacher.batch_tokens each; both long and short sequences are timed."""


class EstimateConfig(CaptureConfig):
    """Estimate from a small sample what a capture would store, how long it would take and what it would cost.

    The settings are those of the capture. Nothing is written.
    """

    table: Location | None = None  # type: ignore[assignment]
    """Folder of a table: what it already holds is not counted. Without a table, everything is new."""
    strict: bool = False
    """Has no effect here: an estimate only counts the documents that can't be used."""
    sample: SampleConfig = SampleConfig()
    gpu: Gpu = "h100"
    """GPU to estimate hours for, calculated from the floating-point operations; this machine need not have it."""
    gpu_utilization: float = Field(default=0.4, gt=0, le=1)
    """Share of that GPU's dense bf16 rate that the capture is assumed to reach."""

    def capture(self, table: str) -> CaptureConfig:
        """Settings of the capture that is estimated, into this table."""
        return CaptureConfig(**{name: getattr(self, name) for name in CaptureConfig.model_fields} | {"table": table})
