"""What trains, and where the frozen prefix ends.

The prefix is everything before the first module that trains. It runs without autograd and in eval mode, whether its
output is cached or not, so both are the same experiment. The feature encoder belongs to it in every method.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from model import EmotionModel, Wav2Vec2

PARTS = {"feature_encoder": "feature encoder", "projection": "feature projection"}
PARTS |= {"position": "positional convolution", "norm": "norm", "relative_bias": "relative position bias"}


def layer_numbers(value: int | Sequence[int] | str, count: int, key: str = "trainable_layers") -> list[int]:
    """The layers that a count (the last k), a list of numbers or "all" stands for, of `count` layers."""
    if value == "all":
        return list(range(count))
    if isinstance(value, str):
        raise ValueError(f"{key}: expected a count, a list of numbers or 'all', found {value!r}")
    if isinstance(value, int):
        if not 0 <= value <= count:
            raise ValueError(f"{key}: the model has {count} layers, found {value}")
        return list(range(count - value, count))
    if outside := [number for number in value if not 0 <= number < count]:
        raise ValueError(f"{key}: no layer {outside[0]}; expected numbers from 0 to {count - 1}")
    return sorted(set(value))


def freeze(model: EmotionModel | Wav2Vec2, trainable_layers: int | Sequence[int] | str) -> None:
    """Leave these transformer layers of the backbone trainable and freeze the others.

    A count means the last k, 0 none (heads only). "all" trains the feature projection, the positional convolution and
    WavLM's relative position bias as well: everything but the feature encoder. A head stays as it is.
    """
    backbone = model.backbone if isinstance(model, EmotionModel) else model
    numbers = layer_numbers(trainable_layers, len(backbone.layers))
    backbone.requires_grad_(False)
    for number in numbers:
        backbone.layers[number].requires_grad_(True)
    if trainable_layers == "all":
        backbone.projection.requires_grad_(True)
        backbone.projection.mask_embedding.requires_grad_(backbone.config.mask_time_prob > 0)
        backbone.position.requires_grad_(True)
        backbone.norm.requires_grad_(True)
        if backbone.config.relative_buckets:
            backbone.relative_bias.requires_grad_(True)
    if backbone.config.pre_norm and numbers:
        backbone.norm.requires_grad_(True)  # it follows the last layer


def prefix_depth(model: EmotionModel | Wav2Vec2) -> int:
    """The hidden state at which the frozen prefix ends: -1 (features), 0..L-1, or if no layer trains the deepest.

    That is L+1 (pooled), or L where the pooling trains on frames.
    """
    backbone = model.backbone if isinstance(model, EmotionModel) else model
    for depth in range(-1, len(backbone.layers)):
        if any(parameter.requires_grad for module in backbone.before(depth + 1) for parameter in module.parameters()):
            return depth
    return getattr(model, "deepest", len(backbone.layers) + 1)


def train_mode(model: EmotionModel, depth: int) -> None:
    """Training mode (dropout, masking) for what comes after hidden state `depth`, eval mode for the prefix."""
    model.train()
    for module in model.backbone.before(depth):
        module.eval()


def drop_prefix(model: EmotionModel, depth: int) -> None:
    """Give up the memory of all that comes before hidden state `depth`: the cache holds its output."""
    for module in model.backbone.before(depth):
        module.to_empty(device="meta")


def cast_frozen(model: EmotionModel, dtype: torch.dtype) -> None:
    """Keep the frozen matrices in the type that autocast would cast them to at every step; norms stay in fp32."""
    for module in model.backbone.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and not module.weight.requires_grad:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What trains, by name, on the CPU: all that a checkpoint needs beside the pretrained weights."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `trained_state` took. Raises ValueError unless exactly the trainable parameters are there."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if different := sorted(parameters.keys() ^ state.keys()):
        raise ValueError(f"checkpoint does not fit the model: {', '.join(different[:5])} on one side only")
    for name, parameter in parameters.items():  # `copy_` would stretch one value over many without a word
        if state[name].shape != parameter.shape:
            found, expected = tuple(state[name].shape), tuple(parameter.shape)
            raise ValueError(f"checkpoint does not fit the model: {name} is {found}, expected {expected}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def table(model: EmotionModel) -> str:
    """What trains and how many parameters, one line a part; one for a run of layers that are alike."""
    (total, trainable), (below, trained) = count(model), count(model.backbone)
    rows = [(PARTS[name], *count(part)) for name, part in model.backbone.named_children() if name in PARTS]
    for (size, training), alike in groupby(enumerate(model.backbone.layers), lambda layer: count(layer[1])):
        first, *more = (number for number, _ in alike)
        name = f"layers {first} to {more[-1]}" if more else f"layer {first}"
        rows.append((name, size * (1 + len(more)), training * (1 + len(more))))
    rows += [("head", total - below, trainable - trained), ("all", total, trainable)]
    lines = [f"{name:24}{size:>14,}{training:>14,}" for name, size, training in rows]
    return "\n".join([f"{'':24}{'parameters':>14}{'trainable':>14}", *lines]) + f"  ({trainable / total:.2%})"


def count(module: nn.Module) -> tuple[int, int]:
    """Parameters of a module: all, and those that train."""
    sizes = [(p.numel(), p.numel() if p.requires_grad else 0) for p in module.parameters()]
    return sum(total for total, _ in sizes), sum(trainable for _, trainable in sizes)
