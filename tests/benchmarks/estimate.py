"""Compares ``softlabel estimate`` with the capture that follows: SmolLM2 over some of the demo's documents.

``python -m tests.benchmarks.estimate`` prints one table. The estimate tokenizes part of the text and runs the teacher
over a few of the batches. The capture is a real one, from reading the documents to the last commit, and loads the
teacher again. Both run one after the other on the same machine, so seconds are comparable only if nothing else runs.
The exit code is 1 if an estimate is further off than ``BOUNDS`` allows.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.estimation.estimate import Estimate, estimate
from softlabel.pipeline.examples.language_model import prepare_documents, prepare_teacher
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.teachers import load

TEACHER = Path(".demo/teacher")
BOUNDS = {"sequences": 0.15, "positions": 0.15, "bytes": 0.15, "seconds": 0.3}
"""Largest allowed error of an estimate, as a share of the captured value."""


@dataclass(frozen=True)
class Compared:
    """One number, as estimated and as captured."""

    name: str
    estimate: float
    capture: float

    @property
    def error(self) -> float:
        return self.estimate / self.capture - 1

    @property
    def holds(self) -> bool:
        return abs(self.error) <= BOUNDS[self.name]


def main() -> None:
    """Estimate, capture, print both, and check that they agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=24, help="number of the demo's documents")
    parser.add_argument("--batches", type=int, default=3, help="batches that the estimate runs the teacher over")
    parser.add_argument("--megabytes", type=float, default=0.03, help="megabytes of text that the estimate tokenizes")
    given = parser.parse_args()
    prepare_teacher(TEACHER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_documents(folder / "all.parquet")
        pq.write_table(pq.read_table(folder / "all.parquet").slice(0, given.documents), folder / "documents.parquet")
        found, numbers = compared(
            {
                "documents": str(folder / "documents.parquet"),
                "teacher": {"model": str(TEACHER), "batch_tokens": 2048},
                "sequences": {"max_tokens": 512},
                "shards": {"positions": 4096},
                "sample": {"batches": given.batches, "megabytes": given.megabytes},
            },
            folder / "table",
        )
    print(f"{found.tokenized:.0%} of the text tokenized, teacher run on {found.sampled_positions:,} positions", end="")
    print(f" on {found.device}; seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in vars(found.seconds).items()))
    print(f"\n{'':<12}{'estimate':>12}{'capture':>12}{'error':>9}{'bound':>8}")
    for each in numbers:
        row = f"{each.name:<12}{each.estimate:>12,.0f}{each.capture:>12,.0f}{each.error:>+9.1%}"
        print(f"{row}{BOUNDS[each.name]:>8.0%}  {'holds' if each.holds else 'does not hold'}")
    sys.exit(not all(each.holds for each in numbers))


def compared(settings: dict[str, object], table: Path) -> tuple[Estimate, list[Compared]]:
    """The estimate of a capture, and its numbers next to those of the capture into a new table."""
    config = EstimateConfig.model_validate(settings)
    load.load_teacher(config.teacher, Checkpoint.find(config.teacher))  # so that the imports count for neither
    load._load.cache_clear()
    found = estimate(config)
    load._load.cache_clear()
    report = capture(config.capture(str(table)))
    numbers = [Compared(name, getattr(found, name), getattr(report, name)) for name in list(BOUNDS)[:-1]]
    return found, [*numbers, Compared("seconds", sum(vars(found.seconds).values()), report.seconds)]


if __name__ == "__main__":
    main()
