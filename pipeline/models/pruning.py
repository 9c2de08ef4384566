"""Prune a teacher to a smaller model: fewer layers, and fewer neurons in each feed-forward layer.

The remaining parts keep the teacher's weights, and the result reloads as an ordinary model of the same architecture.
Nothing is trained, and the residual stream, the heads and the vocabulary stay the same.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlabel.pipeline.models.body import inner
from softlabel.pipeline.models.files import first_line
from softlabel.storage.errors import StudentError, UsageError

_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
"""The three matrices of a gated feed-forward layer, as Llama, Qwen, Mistral, Gemma and similar models name them."""

_PLACES = ("layer_idx", "layer_id", "layer_number", "training")
"""Names of a layer's place, which pruning changes, and of what is not a setting."""


def spread(depth: int, count: int) -> tuple[int, ...]:
    """Numbers of ``depth`` out of ``count`` layers, evenly spread, with the first and the last.

    Raises:
        UsageError: if there are fewer layers.
    """
    if depth > count:
        raise UsageError(
            "student.depth exceeds the teacher's number of layers",
            expected=f"at most {count}",
            found=f"student.depth: {depth}",
        )
    return tuple(round(place * (count - 1) / max(1, depth - 1)) for place in range(depth))


def prune(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A smaller model of the same architecture with only these layers of the teacher, in this order.

    It is rebuilt from its own configuration, so that everything that depends on a layer's index is as after a reload.

    Raises:
        UsageError: if the layers are not distinct layers of the teacher.
        StudentError: if a model of this architecture can't have these layers in this order.
    """
    config = teacher.config
    require_layers(config, layers)
    name, stack = layer_stack(teacher)
    try:
        student = type(teacher)(type(config).from_dict(_settings(config, layers))).to(teacher.dtype)
        _require_same_layers(student, [stack[layer] for layer in layers], layers)
        teacher.set_submodule(name, nn.ModuleList(stack[layer] for layer in layers))
        student.load_state_dict(teacher.state_dict())
    except StudentError:
        raise
    except Exception as error:  # architectures raise many kinds of errors for layers that don't go together
        raise _irregular(teacher, layers, first_line(error)) from error
    if student.can_generate():
        student.generation_config = teacher.generation_config
    return student


def _settings(config: Any, layers: Sequence[int]) -> dict[str, Any]:
    """The configuration of a model with only these layers."""
    count: int = config.num_hidden_layers
    settings: dict[str, Any] = config.to_dict()
    for name, value in settings.items():
        if not isinstance(value, list):
            continue
        if name in ("moe_layers", "mlp_only_layers"):  # numbers of layers
            settings[name] = [place for place, layer in enumerate(layers) if layer in value]
        elif len(value) == count:  # a value for each layer
            settings[name] = [value[layer] for layer in layers]
    if "per_layer_config" in settings:  # what single layers have of their own, by their numbers
        own = {int(layer): values for layer, values in (settings["per_layer_config"] or {}).items()}
        settings["per_layer_config"] = {place: own[layer] for place, layer in enumerate(layers) if layer in own}
    step = settings.get("decoder_sparse_step")
    if step:  # each layer says for itself whether it has experts
        dense = {layer for layer in range(count) if (layer + 1) % step} | set(config.mlp_only_layers or ())
        settings["mlp_only_layers"] = [place for place, layer in enumerate(layers) if layer in dense]
        settings["decoder_sparse_step"] = 1
    if "first_k_dense_replace" in settings:
        settings["first_k_dense_replace"] = sum(layer < config.first_k_dense_replace for layer in layers)
    settings[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    return settings


def _require_same_layers(student: PreTrainedModel, kept: Sequence[nn.Module], layers: Sequence[int]) -> None:
    """Refuse a student whose layers are of another kind than those that they take the weights of.

    Some architectures decide by a layer's place what it does (its attention, its rotary embeddings, its experts).
    """
    for place, (new, old) in enumerate(zip(layer_stack(student)[1], kept, strict=True)):
        differing = sorted(set(_kind(old).items()) ^ set(_kind(new).items()))
        if differing:
            (name, setting), _ = differing[0]
            part = f"{name}.{setting}".strip(".")
            raise _irregular(
                student, layers, f"layer {layers[place]} differs in {part} from layer {place} of such a model"
            )


def _kind(layer: nn.Module) -> dict[tuple[str, str], str]:
    """What a layer consists of and how its parts are set, by their names, without its place."""
    kind = {}
    for name, part in layer.named_modules():
        kind[name, "class"] = type(part).__name__
        for setting, value in vars(part).items():
            plain = isinstance(value, bool | int | float | str | type(None))
            if plain and not setting.startswith("_") and setting not in _PLACES:
                kind[name, setting] = repr(value)
    return kind


def _irregular(model: PreTrainedModel, layers: Sequence[int], found: str) -> StudentError:
    return StudentError(
        "these layers of the teacher do not make a model of its architecture",
        expected=f"layers that {type(model).__name__} can have in this order, with student.layers or student.depth",
        found=f"layers {' '.join(map(str, layers))}: {found}",
        where=model.config.name_or_path,
        do="keep layers in the pattern of the teacher, from its beginning; or use student.model or student.config",
    )


def require_prunable(model: PreTrainedModel, layers: Sequence[int] | None, neurons: int | None) -> None:
    """Refuse what ``narrow`` or ``prune`` would refuse, but before any weights are loaded.

    Args:
        model: a model of the teacher's configuration, without weights (on the meta device); changed in place.
        layers: layers to keep; None for all.
        neurons: neurons to keep in each layer; None for all.

    Raises:
        UsageError: if the teacher does not have these layers or neurons.
        StudentError: if a model of this architecture can't have them.
    """
    with torch.device("meta"):
        if neurons is not None:
            _feed_forward_layers(model, neurons)
        if layers is not None:
            prune(model, layers)


@torch.no_grad()
def narrow(teacher: PreTrainedModel, neurons: int, sequences: Iterable[Tensor]) -> PreTrainedModel:
    """The teacher with fewer neurons in each feed-forward layer: the most active ones are kept.

    A neuron's importance is the L2 norm of its activations over some text (Minitron, arXiv 2407.14679, section 2.2).
    Norms of its weights would need no text, but were no better than chance in a test on SmolLM2-135M.

    Args:
        teacher: a causal language model with gated feed-forward layers; changed in place.
        neurons: number of neurons to keep in each layer.
        sequences: text to measure activations on, (L,) int64 token ids each.

    Raises:
        UsageError: if the layers have fewer neurons.
        StudentError: if the model's feed-forward layers are of another kind.
    """
    config, layers = teacher.config, _feed_forward_layers(teacher, neurons)
    for layer, activity in zip(layers, _activity(teacher, layers, sequences), strict=True):
        active = activity.topk(neurons).indices.sort().values
        for name in ("gate_proj", "up_proj"):
            _keep(getattr(layer, name), active, dimension=0)
        _keep(layer.down_proj, active, dimension=1)
        if hasattr(layer, "intermediate_size"):
            layer.intermediate_size = neurons
    config.intermediate_size = neurons
    return teacher


def _feed_forward_layers(teacher: PreTrainedModel, neurons: int) -> list[Any]:
    """The feed-forward layers of a teacher, if they can be narrowed to this size."""
    config = teacher.config
    layers = [part for part in teacher.modules() if _is_feed_forward(part)]
    sizes = {layer.down_proj.in_features for layer in layers}
    if len(layers) != config.num_hidden_layers or sizes != {_neurons(config)}:
        of_sizes = f", with {' and '.join(map(str, sorted(sizes)))} neurons," if sizes else ""
        raise StudentError(
            "this kind of model can't be made narrower",
            expected=f"{config.num_hidden_layers} feed-forward layers of one size with {', '.join(_FEED_FORWARD)}",
            found=f"{len(layers)} of these{of_sizes} in {type(teacher).__name__}",
            where=config.name_or_path,
            do="leave out student.intermediate_size",
        )
    require_neurons(config, neurons)
    return layers


def require_layers(config: Any, layers: Sequence[int]) -> None:
    """Refuse layers that a teacher with this configuration does not have.

    Raises:
        UsageError: if they are not distinct layers of the teacher.
    """
    count = config.num_hidden_layers
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
        raise UsageError(
            "the teacher can't be pruned to these layers",
            expected=f"distinct layers between 0 and {count - 1}",
            found=f"student.layers: {list(layers)}",
            where=config.name_or_path,
        )


def require_neurons(config: Any, neurons: int) -> None:
    """Refuse more neurons than a teacher with this configuration has in a feed-forward layer.

    Raises:
        UsageError: if there are more.
    """
    size = _neurons(config)
    if size is not None and neurons > size:
        raise UsageError(
            "student.intermediate_size exceeds that of the teacher",
            expected=f"at most {size}",
            found=f"student.intermediate_size: {neurons}",
            where=config.name_or_path,
        )


def _neurons(config: Any) -> int | None:
    """Neurons of each feed-forward layer; None if the configuration does not give one number for all."""
    try:
        size = getattr(config, "intermediate_size", None)
    except RuntimeError:  # transformers' answer if single layers have others
        return None
    return size if isinstance(size, int) else None


def _is_feed_forward(part: nn.Module) -> bool:
    return all(isinstance(getattr(part, name, None), nn.Linear) for name in _FEED_FORWARD)


def _activity(teacher: PreTrainedModel, layers: Sequence[Any], sequences: Iterable[Tensor]) -> list[Tensor]:
    """(neurons,) for each layer: sum of the squared inputs of its last matrix."""
    sums = [torch.zeros(layer.down_proj.in_features) for layer in layers]

    def listener(total: Tensor) -> Any:
        return lambda _, inputs: total.add_(inputs[0].float().square().flatten(0, -2).sum(0))

    hooks = [layer.down_proj.register_forward_pre_hook(listener(s)) for layer, s in zip(layers, sums, strict=True)]
    teacher.eval()
    for ids in sequences:
        inner(teacher, teacher.get_decoder())(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return sums


def _keep(layer: nn.Linear, indices: Tensor, dimension: int) -> None:
    layer.weight = nn.Parameter(layer.weight.index_select(dimension, indices))
    if dimension == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[indices])
    layer.out_features, layer.in_features = layer.weight.shape


def layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name of the list of layers, and the list, from the input to the output.

    Raises:
        StudentError: if the model does not have its layers in one list.
    """
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise StudentError(
        "this kind of model can't be pruned or sharded",
        expected=f"a single ModuleList of {count} layers",
        found=f"none in {type(model).__name__}",
        where=model.config.name_or_path,
        do="use student.model or student.config, and leave out optimizer.sharding",
    )
