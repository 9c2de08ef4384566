"""Shards a student among the ranks (FSDP): each rank holds a shard of every weight, its gradient and its moments.

A layer's weights are gathered while it computes; those of embedding and head for a whole step, since the loss
multiplies with them directly. Checkpoints are written whole and sharded when they are read, so they do not depend on
the number of ranks. The functions also accept a student that is not sharded, and return its tensors as they are.

torch.distributed.checkpoint.state_dict has functions for this, too. They were tried: they return a tied weight of a
sharded model once for each of its names, and know an optimizer's state only by the names of the weights, so that no
existing checkpoint could be loaded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from softlabel.pipeline.models.pruning import layer_stack


def shard(module: nn.Module, device: torch.device, bf16: bool) -> None:
    """Shard a student with its loss among all ranks, and move each shard to its rank's device.

    accelerate can do this too, but only on GPUs.

    Args:
        module: module with a model as its attribute ``student``, and with a method ``measured``.
        device: device of this rank.
        bf16: whether weights are gathered and used in bfloat16; shards and sums of gradients are not.

    Raises:
        StudentError: if the student has no list of layers.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in layer_stack(module.student)[1]:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(module, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(module, "measured")
    module._is_accelerate_prepared = True  # type: ignore[assignment]  # accelerate then doesn't wrap it in DDP


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is sharded among the ranks."""
    return isinstance(module, FSDPModule)


def reshard(module: nn.Module) -> None:
    """Free the weights gathered for an evaluation; a training step frees them automatically."""
    if isinstance(module, FSDPModule):
        module.reshard()


def gathered(state: Any) -> Any:
    """The state with its shards gathered: on the CPU of the first rank, None elsewhere. Every rank has to call it."""
    if isinstance(state, Mapping):
        return {name: gathered(value) for name, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    tensor = whole(state)
    return tensor.cpu() if distributed.get_rank() == 0 else None


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank. Every rank has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights and buffers by name, ``gathered``; a tied one only by the first of its names."""
    return dict(gathered(_state(model)))


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load exactly what ``weights`` returned; each rank takes its shard."""
    for name, parameter in _state(model).items():
        parameter.copy_(_like(tensors[name], parameter))


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a copy of an optimizer's ``gathered`` state; each rank takes its shard."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: _like(value, parameters[number]).clone() for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def unshard(model: nn.Module) -> None:
    """Gather the whole model on the CPU of each rank after training."""
    gathered_parameters: dict[nn.Parameter, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if parameter not in gathered_parameters:
                    gathered_parameters[parameter] = nn.Parameter(
                        whole(parameter.detach()).cpu(), parameter.requires_grad
                    )
                setattr(part, name, gathered_parameters[parameter])


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, sharded like another tensor of its shape."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
