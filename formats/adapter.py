"""LoRA adapters as PEFT keeps them: one of ours written, and one made elsewhere merged into a backbone."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from formats.huggingface import hugging_face_key
from lora import LoRALinear
from model import Wav2Vec2
from weights import OWN, PREFIX, ROOT, hub_id, note, our_name, read_json, require_finite, unusable

FILES = ("adapter_config.json", "adapter_model.safetensors")
READ = {
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "init_lora_weights"),
    *("rank_pattern", "alpha_pattern", "bias", "lora_bias"),
}
NOTHING_MORE = {  # settings that change nothing in what the tensors compute, or only where another one is set
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("qalora_group_size", "modules_to_save"),  # of what is saved whole the tensors tell
}
INITIAL = (True, False, None, "gaussian", "eva")  # the others that PEFT knows start from a base model that they change


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
        targets.append(hugging_face_key(f"{name}.weight").removesuffix(".weight"))
        for matrix in ("A", "B"):
            tensor = getattr(layer, matrix).detach().to("cpu", torch.float32)
            tensors[f"base_model.model.{targets[-1]}.lora_{matrix}.weight"] = tensor.contiguous()
    rank = layer.A.shape[0]  # `inject` gives all the same
    repository, revision = hub_id(base) or (base, None)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": repository,
        "revision": revision,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": layer.scale * rank,
        "lora_dropout": layer.dropout,
        "target_modules": targets,
        "bias": "none",
    }
    directory = Path(directory)
    (directory / FILES[0]).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, directory / FILES[1], {"format": "pt"})


@torch.no_grad()
def merge_adapter(backbone: Wav2Vec2, directory: str | Path, base: str | None = None) -> list[str]:
    """Add a PEFT LoRA adapter to a backbone's weights, `W + s B A`; returns the names of the weights that it changes.

    `s` is alpha / R, with rank stabilisation alpha / sqrt(R) (Kalajdzievski 2023, arXiv 2312.03732). Trained biases
    take the place of the backbone's, and a bias of B is added to them, `s b`. A head that was trained with the adapter
    is left out with a note. `base` is what the backbone was loaded from. Raises FileNotFoundError, or ValueError for
    an adapter of another kind or another model.
    """
    directory = Path(directory)
    settings = read_settings(directory, base)
    parameters = dict(backbone.named_parameters())
    modules, problems = read_modules(directory / FILES[1])
    updates: dict[str, Tensor] = {}
    beside = []
    for module, (inner, found) in modules.items():
        name = our_name(f"{inner}.weight")
        if name in parameters:
            rank, scale = strength(settings, module, directory)
            try:
                updates |= update(name.removesuffix(".weight"), module, found, parameters, rank, scale)
            except ValueError as error:
                problems.append(str(error))
        else:
            (problems if name or OWN.match(inner) else beside).append(f"{module} is no part of this backbone")
    if problems or not updates:
        problems = problems or beside or ["it holds no tensors"]
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        of = f" {base}" if base else ""
        raise ValueError(f"{directory}: the adapter does not fit the backbone{of}: {'; '.join(problems[:8])}{more}")
    if beside:
        heads = ", ".join(problem.split()[0] for problem in beside)
        note(f"{directory}: what was trained beside the backbone is left out: {heads}")
    for name, tensor in updates.items():
        module, _, attribute = name.rpartition(".")
        merged = nn.Parameter(tensor, requires_grad=parameters[name].requires_grad)
        setattr(backbone.get_submodule(module), attribute, merged)
    return list(updates)


def update(
    name: str, module: str, found: Mapping[str, Tensor], parameters: Mapping[str, Tensor], rank: int, scale: float
) -> dict[str, Tensor]:
    """The new values of the parameters of `name`, PEFT's `module`, of which it saved what was `found`."""
    new, weight, bias = {}, parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
    if "weight" in found:
        raise ValueError(f"{module}.weight would replace a weight of the backbone, which is more than LoRA")
    if biases := [key for key in ("bias", "lora_B.bias") if key in found]:
        if bias is None or any(found[key].shape != bias.shape for key in biases):
            raise ValueError(f"{module} has no bias of the size of {' and '.join(biases)}")
        new[f"{name}.bias"] = found.get("bias", bias).float()
        if "lora_B.bias" in found:
            new[f"{name}.bias"] = new[f"{name}.bias"] + scale * found["lora_B.bias"].float()
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
    for name in FILES:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"adapter: {directory} has no {name}; expected a directory as PEFT saves it")
    path = directory / FILES[0]
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {settings.get('peft_type')!r}; only 'LORA' is known here")
    if unknown := [key for key, value in settings.items() if value and key not in READ | NOTHING_MORE]:
        found = ", ".join(f"{key} is {settings[key]!r}" for key in unknown)
        raise ValueError(f"{path}: {found}; only plain LoRA, which is added to the weights, is known")
    if (initial := settings.get("init_lora_weights")) not in INITIAL:
        raise ValueError(
            f"{path}: init_lora_weights is {initial!r}, which changes the base model too; convert it to LoRA"
        )
    theirs, ours = (hub_id(source) for source in (settings.get("base_model_name_or_path"), base))
    if theirs and ours and theirs[0] != ours[0]:
        raise ValueError(f"{path}: the adapter was made for {theirs[0]}, and the backbone is {base}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(key) or {}, dict):
            raise ValueError(f"{path}: {key} is {settings[key]!r}, expected an object of names and numbers")
    strength(settings, "", directory)
    return settings


def strength(settings: Mapping, module: str, directory: Path) -> tuple[int, float]:
    """Rank and scale of a module's LoRA: by the first pattern that its name ends in, as in PEFT, or the default."""

    def chosen(key: str, patterns: str) -> object:
        pairs = (settings.get(patterns) or {}).items()
        return next((value for end, value in pairs if re.match(rf"(.*\.)?({end})$", module)), settings.get(key))

    try:
        rank, alpha = chosen("r", "rank_pattern"), chosen("lora_alpha", "alpha_pattern")
    except re.error as error:
        raise ValueError(f"{directory / FILES[0]}: a pattern is no regular expression ({error})") from None
    if type(rank) is not int or not 0 < rank < 2**31 or type(alpha) not in (int, float) or not abs(alpha) < 2**31:
        found = f"expected r and lora_alpha as numbers, found {rank!r} and {alpha!r}"
        raise ValueError(f"{directory / FILES[0]}: {found}")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def read_modules(path: Path) -> tuple[dict[str, tuple[str, dict[str, Tensor]]], list[str]]:
    """Each module's name inside the backbone and its tensors, by its name in the base model; and what has no place."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error})") from None
    require_finite(tensors, path)
    problems = [f"{key} {problem}" for key, tensor in tensors.items() if (problem := unusable(tensor))]
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+?)\.(?:base_layer\.)?((?:lora_[AB]\.)?(?:weight|bias))", key)
        if match:
            found.setdefault(match[1], {})[match[2]] = tensor
        else:
            problems.append(f"{key} is no matrix of LoRA")
    roots = sorted({match[1] for module in found if (match := ROOT.match(f"{module}."))})
    if len(roots) > 1:
        raise ValueError(f"{path}: is for {len(roots)} encoders, under {' and '.join(map(repr, roots))}; expected one")
    root = roots[0] if roots else ""
    return {module: (PREFIX.sub("", module.removeprefix(root)), own) for module, own in found.items()}, problems
