"""Training by several processes: the student that one process trains."""

import pytest
import torch

from tests.pipeline.trainings import CHILD, history, run, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_ranks_train_the_same_student(uninterrupted, table, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = run(launcher, settings(table, tmp_path / "student"))
    assert done.returncode == 0, done.stderr
    for entry, other in zip(history(uninterrupted.output), history(tmp_path / "student"), strict=True):
        assert other == pytest.approx(entry, rel=1e-4)
    for name, tensor in weights(uninterrupted.output).items():
        torch.testing.assert_close(weights(tmp_path / "student")[name], tensor, rtol=1e-3, atol=1e-5)
