"""Training a student that is sharded among processes (FSDP): it equals that of one process, and is whole on disk."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from softlabel.pipeline.students.folder import newest_checkpoint, step_of
from softlabel.pipeline.training import fsdp
from softlabel.pipeline.training.train import train
from tests.listening import family, listening, only_here
from tests.pipeline.trainings import curve, history, interrupt_at, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")
SHARDED = {"processes": 2, "sharding": "full"}


@pytest.fixture(scope="module")
def divided(table, tmp_path_factory):
    """A student that two processes trained in one run, sharded; they listened only on loopback."""
    open_to = set()
    config = settings(table, tmp_path_factory.mktemp("divided") / "student", optimizer=SHARDED)
    report = train(config, lambda _: open_to.update(listening(family(os.getpid()))))
    assert open_to
    assert only_here(open_to), open_to
    return report


def test_a_sharded_student_is_the_one_that_a_single_process_trains(divided, uninterrupted):
    record = json.loads(Path(divided.output, "softlabel.json").read_text())
    assert record["circumstances"].items() >= {"ranks": "2", "sharding": "full"}.items()
    assert (divided.steps, divided.positions, divided.parameters) == (
        uninterrupted.steps,
        uninterrupted.positions,
        uninterrupted.parameters,
    )
    for entry, other in zip(history(uninterrupted.output), history(divided.output), strict=True):
        assert other == pytest.approx(entry, rel=1e-4)
    norms = dict(curve(uninterrupted.output, "grad_norm"))
    assert dict(curve(divided.output, "grad_norm")) == pytest.approx(norms, rel=1e-3)
    assert_close(divided.output, uninterrupted.output)


@pytest.mark.long
def test_a_killed_sharded_run_resumes_sharded_or_in_one_process(divided, uninterrupted, table, tmp_path):
    config = settings(table, tmp_path / "student", optimizer=SHARDED)
    with pytest.raises(KeyboardInterrupt):  # which ends both processes at any point
        train(config, interrupt_at(6))
    shutil.copytree(tmp_path / "student.training", tmp_path / "alone.training")
    resumed = train(config)
    assert resumed.resumed_from == 4
    for name, tensor in weights(divided.output).items():
        assert torch.equal(weights(resumed.output)[name], tensor), name
    alone = train(settings(table, tmp_path / "alone"))
    assert alone.resumed_from == 4
    assert_close(alone.output, uninterrupted.output)


@pytest.mark.long
def test_a_sharded_run_skips_a_checkpoint_in_which_any_ranks_file_is_damaged(divided, table, tmp_path):
    config = settings(table, tmp_path / "student", optimizer=SHARDED)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(10))
    newest = newest_checkpoint(tmp_path / "student.training")
    (newest / "rng_state_1.pth").write_bytes(b"")
    with pytest.warns(UserWarning, match="rng_state_1.pth has 0 bytes") as warned:
        resumed = train(config)
    assert len([each for each in warned if "is damaged or incomplete" in str(each.message)]) == 1
    assert resumed.resumed_from == step_of(newest) - 4
    for name, tensor in weights(divided.output).items():
        assert torch.equal(weights(resumed.output)[name], tensor), name


class Taught(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.student = LlamaForCausalLM(LlamaConfig(vocab_size=99, tie_word_embeddings=True, **sizes))

    def measured(self, ids):
        """As the fused loss does, with the head's own weight."""
        return nn.functional.linear(self.student.get_decoder()(ids).last_hidden_state, self.student.lm_head.weight)


@torch.no_grad()
def hold_a_share(rank, rendezvous):
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    ids, module, before = torch.arange(9)[None], Taught(), fsdp.weights(Taught().student)
    fsdp.shard(module, torch.device("cpu"), bf16=True)
    for parameter in module.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().numel() <= parameter.numel() * 0.51
    found = module.measured(ids)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), Taught().measured(ids), rtol=0.05, atol=0.01)
    fsdp.reshard(module)
    saved = fsdp.weights(module.student)
    if rank == 0:
        assert_equal(saved, before)  # used in bfloat16, stored in float32
    fsdp.load_weights(module.student, {name: tensor + 1 for name, tensor in before.items()})
    fsdp.unshard(module.student)
    assert_equal(module.student.state_dict(), {"lm_head.weight": before["model.embed_tokens.weight"]}, 1)
    assert_equal(module.student.state_dict(), before, 1)
    assert module.student.lm_head.weight is module.student.model.embed_tokens.weight
    distributed.destroy_process_group()
    os._exit(0)  # without the interpreter's own end, in which a thread of gloo may still abort the process


@pytest.mark.long
def test_weights_are_saved_whole_and_loaded_in_shards(tmp_path):
    torch.multiprocessing.spawn(hold_a_share, (str(tmp_path / "rendezvous"),), nprocs=2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("bf16", [False, True])
def test_sharded_training_on_gpus_gives_the_same_student(bf16, uninterrupted, table, tmp_path):
    report = train(settings(table, tmp_path / "student", optimizer={**SHARDED, "device": "cuda", "bf16": bf16}))
    assert report.metrics["eval_kl"] == pytest.approx(uninterrupted.metrics["eval_kl"], rel=1e-2)


def assert_equal(found, expected, more=0):
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor + more), name


def assert_close(folder, other):
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
