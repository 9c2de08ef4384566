"""What ``softlabel estimate`` says, beside what the capture then gives: SmolLM2 over some of the demo's documents.

``python -m tests.benchmarks.estimate`` prints one table. The estimate tokenises some of the text and runs the teacher
over a few of the batches; the capture is a real one, from reading the documents to the last commit, with the teacher
loaded anew. Both are on whatever this machine has, one after the other: seconds can be compared if nothing else is
at work.
"""

import argparse
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.capturing import capture, load_teacher
from pipeline.demo import prepare_documents, prepare_teacher
from pipeline.estimate_config import EstimateConfig
from pipeline.estimating import Estimate, estimate

TEACHER = Path(".demo/teacher")


def main() -> None:
    """Estimate, capture, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=24, help="of the demo's")
    parser.add_argument("--batches", type=int, default=3, help="that the estimate runs the teacher over")
    parser.add_argument("--megabytes", type=float, default=0.03, help="of text that the estimate tokenises")
    given = parser.parse_args()
    prepare_teacher(TEACHER)
    with tempfile.TemporaryDirectory() as folder:
        found, said, gave = compared(Path(folder), given.documents, given.batches, given.megabytes)
    print(f"{found.tokenised:.0%} of the text tokenised, {found.sampled_positions:,} positions by the teacher", end="")
    print(f" on {found.device}; seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in vars(found.seconds).items()))
    print(f"\n{'':<12}{'estimate':>12}{'capture':>12}{'error':>9}")
    for name, value in said.items():
        print(f"{name:<12}{value:>12,.0f}{gave[name]:>12,.0f}{value / gave[name] - 1:>+9.1%}")


def compared(
    folder: Path, documents: int, batches: int, megabytes: float
) -> tuple[Estimate, dict[str, float], dict[str, float]]:
    """The estimate, what it says, and what the capture gives."""
    prepare_documents(folder / "all.parquet")
    pq.write_table(pq.read_table(folder / "all.parquet").slice(0, documents), folder / "documents.parquet")
    config = EstimateConfig.model_validate(
        {
            "documents": str(folder / "documents.parquet"),
            "teacher": {"model": str(TEACHER), "batch_tokens": 2048},
            "sequences": {"max_tokens": 512},
            "shards": {"positions": 4096},
            "sample": {"batches": batches, "megabytes": megabytes},
        }
    )
    load_teacher(config.teacher)  # neither pays for the imports
    load_teacher.cache_clear()
    found = estimate(config)
    load_teacher.cache_clear()
    report = capture(config.capture(str(folder / "table")))
    names = ("sequences", "positions", "bytes")
    said, gave = ({name: float(getattr(of, name)) for name in names} for of in (found, report))
    return found, said | {"seconds": sum(vars(found.seconds).values())}, gave | {"seconds": report.seconds}


if __name__ == "__main__":
    main()
