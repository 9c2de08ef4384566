"""The Python code in README runs as it is written, with a tiny teacher and real text."""

import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import ROOT, topics


def test_the_python_code_runs_from_documents_to_an_evaluated_student(tiny_teacher: Path, tmp_path: Path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code
    texts = [text[:400] for text in topics().values()]
    pq.write_table(pa.table({"id": list(topics()), "text": texts}), tmp_path / "documents.parquet")
    (tmp_path / "teacher").symlink_to(tiny_teacher)
    found = subprocess.run([sys.executable, "-c", code[1]], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    captured, steps, kl = found.stdout.splitlines()
    positions, bytes_per_position = captured.split()
    assert int(positions) > 1000
    assert 0 < float(bytes_per_position) < 500
    assert int(steps) > 0
    assert 0 < float(kl) < 20
    assert {"table", "student", "report"} <= {path.name for path in tmp_path.iterdir()}
