"""LoRA adapters as PEFT keeps them: one of ours written, and one made elsewhere merged into a backbone."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from data import raise_listed, say_once
from lora import LoRALinear
from model import Wav2Vec2
from weights import OWN, PREFIX, ROOT, hub_id, our_name, read, read_json, require_finite, translate, unusable

FILES = ("adapter_config.json", "adapter_model.safetensors")
KNOWN = (  # settings that are read below, or that change nothing in what the tensors compute
    "peft_type base_model_name_or_path r lora_alpha use_rslora init_lora_weights rank_pattern alpha_pattern bias "
    "lora_bias task_type auto_mapping peft_version revision inference_mode lora_dropout target_modules exclude_modules "
    "layers_to_transform layers_pattern megatron_core qalora_group_size modules_to_save"
)
INITIAL = (True, False, None, "gaussian", "eva")  # the others that PEFT knows start from a base model that they change
Tensors = dict[str, Tensor]


def save_adapter(backbone: Wav2Vec2, directory: str | Path, base: str) -> None:
    """Write the LoRA of a backbone so that `PeftModel.from_pretrained` puts it onto `base`, a hub id or a directory.

    Raises ValueError if there is none, or where PEFT would not apply it.
    """
    layers = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, LoRALinear)}
    if not layers:
        raise ValueError(f"{directory}: there is no LoRA to write; expected a backbone with LoRA that is not merged")
    if backbone.config.relative_buckets and any(".attention." in name for name in layers):
        # transformers' WavLM reads the weights of these layers past the modules that PEFT puts in their place
        raise ValueError(f"{directory}: PEFT's LoRA on WavLM's q, k, v or o does nothing; use --format transformers")
    tensors, targets = {}, []
    for name, layer in layers.items():
        targets.append(translate(f"{name}.weight")[0].removesuffix(".weight"))
        for matrix, tensor in (("A", layer.A), ("B", layer.B)):
            tensors[f"base_model.model.{targets[-1]}.lora_{matrix}.weight"] = tensor.detach().cpu().float().contiguous()
    rank = layer.A.shape[0]  # `inject` gives all the same
    repository, revision = hub_id(base) or (base, None)
    settings = {"peft_type": "LORA", "base_model_name_or_path": repository, "revision": revision, "r": rank}
    settings |= {"lora_alpha": layer.scale * rank, "lora_dropout": layer.dropout, "target_modules": targets}
    (Path(directory) / FILES[0]).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, Path(directory) / FILES[1], {"format": "pt"})


@torch.no_grad()
def merge_adapter(backbone: Wav2Vec2, directory: str | Path, base: str | None = None) -> list[str]:
    """Add a PEFT LoRA adapter to a backbone's weights, `W + s B A`; returns the names of the weights that it changes.

    `s` is alpha / R, with rank stabilisation alpha / sqrt(R) (Kalajdzievski 2023, arXiv 2312.03732). Trained biases
    replace those of the backbone, and a bias of B is added to them, `s b`. A head that was trained with the adapter is
    left out with a note. `base` is what the backbone was loaded from. Raises FileNotFoundError, or ValueError for an
    adapter of another kind or another model.
    """
    directory = Path(directory)
    settings = read_settings(directory, base)
    parameters = dict(backbone.named_parameters())
    modules, problems = read_modules(directory / FILES[1])
    updates: Tensors = {}
    beside = []
    for module, (inner, found) in modules.items():
        name = our_name(f"{inner}.weight")
        if name in parameters:
            rank, scale = strength(settings, module, directory)
            try:
                updates |= update(name.removesuffix(".weight"), module, found, parameters, rank, scale)
            except ValueError as error:
                problems.append(str(error))
        elif name or OWN.match(inner):
            problems.append(f"{module} is no part of this backbone")
        else:
            beside.append(module)
    if not problems and not updates:
        problems = [f"{module} is no part of this backbone" for module in beside] or ["it holds no tensors"]
    raise_listed(f"{directory}: the adapter does not fit the backbone{f' {base}' if base else ''}", problems, limit=8)
    if beside:
        say_once(f"note: {directory}: what was trained beside the backbone is left out: {', '.join(beside)}")
    backbone.load_state_dict(updates, strict=False, assign=True)
    return list(updates)


def update(name: str, module: str, found: Tensors, parameters: Tensors, rank: int, scale: float) -> Tensors:
    """The new values of the parameters of `name`, PEFT's `module`, of which it saved what was `found`."""
    new, weight, bias = {}, parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
    if "weight" in found:
        raise ValueError(f"{module}.weight would replace a weight of the backbone, which is more than LoRA")
    if biases := [key for key in ("bias", "lora_B.bias") if key in found]:
        if bias is None or any(found[key].shape != bias.shape for key in biases):
            raise ValueError(f"{module} has no bias of the size of {' and '.join(biases)}")
        added = scale * found["lora_B.bias"].float() if "lora_B.bias" in found else 0
        new[f"{name}.bias"] = found.get("bias", bias).float() + added
    pair = {matrix: found[f"lora_{matrix}.weight"] for matrix in "AB" if f"lora_{matrix}.weight" in found}
    if pair or "lora_B.bias" in found:
        shapes = {matrix: tuple(tensor.shape) for matrix, tensor in pair.items()}
        expected = {"A": (rank, *weight.shape[1:]), "B": (weight.shape[0], rank)}
        if weight.ndim != 2 or shapes != expected:
            raise ValueError(f"{module} has {shapes}, expected {expected if weight.ndim == 2 else 'a linear layer'}")
        new[f"{name}.weight"] = weight + scale * pair["B"].float() @ pair["A"].float()
    return new


def read_settings(directory: Path, base: str | None) -> dict:
    """The settings of an adapter. Raises FileNotFoundError, or ValueError unless it is a sum of weights for `base`."""
    if missing := [name for name in FILES if not (directory / name).is_file()]:
        raise FileNotFoundError(f"adapter: {directory} has no {missing[0]}; expected a directory as PEFT saves it")
    settings = read_json(directory / FILES[0])
    kind, initial = settings.get("peft_type"), settings.get("init_lora_weights")
    unknown = ", ".join(f"{key} is {value!r}" for key, value in settings.items() if value and key not in KNOWN.split())
    theirs, ours = (hub_id(source) for source in (settings.get("base_model_name_or_path"), base))
    if kind != "LORA":
        problem = f"peft_type is {kind!r}; only 'LORA' is known here"
    elif unknown:
        problem = f"{unknown}; only plain LoRA, which is added to the weights, is known"
    elif initial not in INITIAL:
        problem = f"init_lora_weights is {initial!r}, which changes the base model too; convert it"
    elif theirs and ours and theirs[0] != ours[0]:
        problem = f"the adapter was made for {theirs[0]}, and the backbone is {base}"
    else:
        return settings
    raise ValueError(f"{directory / FILES[0]}: {problem}")


def strength(settings: Mapping, module: str, directory: Path) -> tuple[int, float]:
    """Rank and scale of a module's LoRA: by the first pattern that its name ends in, as in PEFT, or the default."""

    def chosen(key: str, patterns: str) -> object:
        given = settings.get(patterns) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{path}: {patterns} is {given!r}, expected an object of names and numbers")
        matching = (value for end, value in given.items() if re.match(rf"(.*\.)?({end})$", module))
        return next(matching, settings.get(key))

    path = directory / FILES[0]
    try:
        rank, alpha = chosen("r", "rank_pattern"), chosen("lora_alpha", "alpha_pattern")
    except re.error as error:
        raise ValueError(f"{path}: a pattern is no regular expression ({error})") from None
    if type(rank) is not int or not 0 < rank < 2**31 or type(alpha) not in (int, float) or not abs(alpha) < 2**31:
        raise ValueError(f"{path}: expected r and lora_alpha as numbers, found {rank!r} and {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def read_modules(path: Path) -> tuple[dict[str, tuple[str, Tensors]], list[str]]:
    """Each module's name inside the backbone and its tensors, by its name in the base model; and what has no place."""
    tensors = read([path])[0]
    require_finite(tensors, path)
    problems = [f"{key} {problem}" for key, tensor in tensors.items() if (problem := unusable(tensor))]
    found: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+?)\.(?:base_layer\.)?((?:lora_[AB]\.)?(?:weight|bias))", key)
        if match:
            found.setdefault(match[1], {})[match[2]] = tensor
        else:
            problems.append(f"{key} is no matrix of LoRA")
    roots = sorted({match[1] for module in found if (match := ROOT.match(f"{module}."))}) or [""]
    if len(roots) > 1:
        raise ValueError(f"{path}: is for {len(roots)} encoders, under {' and '.join(map(repr, roots))}; expected one")
    return {module: (PREFIX.sub("", module.removeprefix(roots[0])), own) for module, own in found.items()}, problems
