"""LoRA adapters as PEFT keeps them: one of ours written, and one made elsewhere merged into a backbone."""

import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora import LoRALinear
from model import Wav2Vec2
from weights import hugging_face_key, matches, read_json, require_finite, unusable

FILES = ("adapter_config.json", "adapter_model.safetensors")
READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "init_lora_weights"}
NOTHING_MORE = {  # settings that change nothing in what the tensors compute, or only where another one is set
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    "qalora_group_size",
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
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
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

    `s` is alpha / R, with rank stabilisation alpha / sqrt(R) (Kalajdzievski 2023, arXiv 2312.03732). `base` is what the
    backbone was loaded from. Raises FileNotFoundError, or ValueError for an adapter of another kind or another model.
    """
    directory = Path(directory)
    rank, scale = read_settings(directory, base)
    pairs, problems = read_pairs(directory / FILES[1])
    parameters, updates = dict(backbone.named_parameters()), {}
    for module, pair in pairs.items():
        name = next((ours and match.expand(ours) for match, ours in matches(f"{module}.weight")), None)
        if name not in parameters:
            problems.append(f"{module} is no part of this backbone")
            continue
        weight = parameters[name]
        expected = {"A": (rank, *weight.shape[1:]), "B": (weight.shape[0], rank)}
        found = {matrix: tuple(tensor.shape) for matrix, tensor in pair.items()}
        if weight.ndim != 2 or found != expected:
            problems.append(f"{module} has {found}, expected {expected if weight.ndim == 2 else 'a linear layer'}")
            continue
        updates[name] = scale * pair["B"].float() @ pair["A"].float()
    if problems or not updates:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        what = "; ".join(problems[:8]) or "it holds no tensors"
        raise ValueError(
            f"{directory}: the adapter does not fit the backbone{f' {base}' if base else ''}: {what}{more}"
        )
    for name, update in updates.items():
        module, _, weight = name.rpartition(".")
        merged = nn.Parameter(parameters[name] + update, requires_grad=parameters[name].requires_grad)
        setattr(backbone.get_submodule(module), weight, merged)
    return list(updates)


def read_settings(directory: Path, base: str | None) -> tuple[int, float]:
    """Rank and scale of an adapter. Raises FileNotFoundError, or ValueError unless it is plain LoRA for `base`."""
    for name in FILES:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"adapter: {directory} has no {name}; expected a directory as PEFT saves it")
    path = directory / FILES[0]
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {settings.get('peft_type')!r}; only 'LORA' is known here")
    plain = {key: not value or (key, value) == ("bias", "none") for key, value in settings.items()}
    if unknown := [key for key in settings if not (plain[key] or key in READ or key in NOTHING_MORE)]:
        found = ", ".join(f"{key} is {settings[key]!r}" for key in unknown)
        raise ValueError(f"{path}: {found}; only plain LoRA, with nothing beside its two matrices, is known here")
    if settings.get("init_lora_weights") not in INITIAL:
        found = settings["init_lora_weights"]
        raise ValueError(
            f"{path}: init_lora_weights is {found!r}, which changes the base model too; convert it to LoRA"
        )
    theirs = settings.get("base_model_name_or_path")
    if theirs != base and is_hub_id(theirs) and is_hub_id(base):
        raise ValueError(f"{path}: the adapter was made for {theirs}, and the backbone is {base}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or not 0 < rank < 2**31 or type(alpha) not in (int, float) or not abs(alpha) < 2**31:
        raise ValueError(f"{path}: expected r and lora_alpha as numbers, found {rank!r} and {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def is_hub_id(source: object) -> bool:
    return isinstance(source, str) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)) and not Path(source).exists()


def read_pairs(path: Path) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The matrices A and B of each module, by its name in the base model, and what has no place."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error})") from None
    pairs: dict[str, dict[str, Tensor]] = {}
    require_finite(tensors, path)
    problems = [f"{key} {problem}" for key, tensor in tensors.items() if (problem := unusable(tensor))]
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key):
            pairs.setdefault(match[1], {})[match[2]] = tensor
        else:
            problems.append(f"{key} is no matrix of LoRA")
    return pairs, problems
