"""What ``softlabel estimate`` says, beside what the capture then gives: SmolLM2 over some of the demo's documents.

``python -m tests.benchmarks.estimate`` prints one table. The estimate tokenizes some of the text and runs the teacher
over a few of the batches; the capture is a real one, from reading the documents to the last commit, with the teacher
loaded anew. Both are on whatever this machine has, one after the other: seconds can be compared if nothing else is
at work. It ends with an error if a number is further off than ``BOUNDS`` allows.
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
from softlabel.pipeline.teachers.load import load_teacher

TEACHER = Path(".demo/teacher")
BOUNDS = {"sequences": 0.15, "positions": 0.15, "bytes": 0.15, "seconds": 0.3}
"""How far an estimate may be from what the capture gives, as a share of that."""


@dataclass(frozen=True)
class Compared:
    """One number, before and after."""

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
    """Estimate, capture, and print both, and whether they agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=24, help="of the demo's")
    parser.add_argument("--batches", type=int, default=3, help="that the estimate runs the teacher over")
    parser.add_argument("--megabytes", type=float, default=0.03, help="of text that the estimate tokenizes")
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
    print(f"{found.tokenized:.0%} of the text tokenized, {found.sampled_positions:,} positions by the teacher", end="")
    print(f" on {found.device}; seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in vars(found.seconds).items()))
    print(f"\n{'':<12}{'estimate':>12}{'capture':>12}{'error':>9}{'bound':>8}")
    for each in numbers:
        row = f"{each.name:<12}{each.estimate:>12,.0f}{each.capture:>12,.0f}{each.error:>+9.1%}"
        print(f"{row}{BOUNDS[each.name]:>8.0%}  {'holds' if each.holds else 'does not hold'}")
    sys.exit(not all(each.holds for each in numbers))


def compared(settings: dict[str, object], table: Path) -> tuple[Estimate, list[Compared]]:
    """The estimate of a capture, and each of its numbers beside what the capture into a new table then gives."""
    config = EstimateConfig.model_validate(settings)
    load_teacher(config.teacher)  # neither pays for the imports
    load_teacher.cache_clear()
    found = estimate(config)
    load_teacher.cache_clear()
    report = capture(config.capture(str(table)))
    numbers = [Compared(name, getattr(found, name), getattr(report, name)) for name in list(BOUNDS)[:-1]]
    return found, [*numbers, Compared("seconds", sum(vars(found.seconds).values()), report.seconds)]


if __name__ == "__main__":
    main()
