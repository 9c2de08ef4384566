"""A student that is divided among the ranks (FSDP): each holds a share of every weight, its gradient and its moments.

A layer's weights are whole for as long as it computes, those of embedding and head for a step's whole way, since the
loss multiplies with them itself. What is written is whole, and what is read is shared out, so that a checkpoint knows
nothing of how many there were. Of a student that is not divided, these functions give what it has.
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
    """Divide a student with its loss among all ranks, and move each share to its rank's device.

    accelerate would do the same, but on GPUs alone.

    Args:
        module: its attribute ``student`` is a model; its method ``measured`` may be called as well as itself.
        device: of this rank.
        bf16: whether weights are gathered, and so computed with, in bfloat16; shares and sums of gradients never are.

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


def is_sharded(module: nn.Module) -> bool:
    """Whether it is divided among the ranks."""
    return isinstance(module, FSDPModule)


def reshard(module: nn.Module) -> None:
    """Free what was gathered for a measurement; a training step does so by itself."""
    if isinstance(module, FSDPModule):
        module.reshard()


def gathered(state: Any) -> Any:
    """The same, with the tensors in it whole: on the first rank's CPU, and None elsewhere. Each rank has to call it."""
    if isinstance(state, Mapping):
        return {name: gathered(value) for name, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    tensor = whole(state)
    return tensor.cpu() if distributed.get_rank() == 0 else None


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process would have it, on each rank. Each has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights and buffers by name, ``gathered``; one that has several names by the first of them."""
    return dict(gathered(_own(model)))


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model what ``weights`` gave, to the bit; each rank takes its share."""
    for name, own in _own(model).items():
        own.copy_(_like(tensors[name], own))


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer a copy of what its ``gathered`` state was; each rank takes its share."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: _like(value, parameters[number]).clone() for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def unshard(model: nn.Module) -> None:
    """Make a model whole again, on the CPU of each rank, when its training is over."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if parameter not in made:
                    made[parameter] = nn.Parameter(whole(parameter.detach()).cpu(), parameter.requires_grad)
                setattr(part, name, made[parameter])


def _own(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}


def _like(tensor: Tensor, own: Tensor) -> Tensor:
    """This rank's share of a whole tensor, divided as another of its shape is."""
    if not isinstance(own, DTensor) or tensor.shape != own.shape:
        return tensor
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)
