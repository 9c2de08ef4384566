"""The fused loss where the head is sharded over processes (FSDP): the gradients of an unsharded one."""

import os

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.fused import distillation_loss
from tests.pipeline.dense import H, N, V, inputs, make_targets, next_ids

CONFIG = LossConfig(hard_weight=0.5)


class Student(nn.Module):
    """A layer, and a head whose weight the loss uses directly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(H, H, dtype=torch.float64)
        self.head = nn.Linear(H, V, bias=False, dtype=torch.float64)

    def forward(self, hidden, rows, recompute):
        targets = make_targets()[rows]
        return distillation_loss(
            self.body(hidden[rows]),
            self.head.weight,
            next_ids()[rows],
            targets,
            CONFIG,
            normalizer=N,
            recompute=recompute,
        ).total


def sharded(rank: int, rendezvous: str) -> None:
    """One of two ranks: some of the positions, half of each weight."""
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    hidden, _, _ = inputs()
    whole, student = Student(), Student()
    whole(hidden, slice(0, N), False).backward()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(student.body, mesh=mesh)
    fully_shard(student, mesh=mesh)
    rows = slice(0, N // 3) if rank == 0 else slice(N // 3, N)
    for recompute in (False, True):
        student.zero_grad()
        (student(hidden, rows, recompute) * 2).backward()  # FSDP averages over the ranks, but the loss has to be summed
        for (name, parameter), expected in zip(student.named_parameters(), whole.parameters(), strict=True):
            assert parameter.to_local().numel() < expected.numel(), name
            torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad)
    distributed.barrier()
    os._exit(0)  # a gloo thread may abort an interpreter that exits normally


def test_gradients_of_a_sharded_student_equal_those_of_a_whole_one(tmp_path):
    torch.multiprocessing.spawn(sharded, (str(tmp_path / "rendezvous"),), nprocs=2)
