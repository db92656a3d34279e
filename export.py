"""Hand a finished run on: as a checkpoint of transformers, a PEFT adapter or an ONNX file, each with a model card.

    python export.py runs/lora_r8 exported --format transformers

The directory must not exist yet, or be empty. `transformers` and `peft` hold the backbone or its LoRA, and the pooling
and head as `head.safetensors`; the card shows how predictions follow from them. `onnx` is waveform in, labels out.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import run
import weights
from config import Config
from formats.adapter import save_adapter
from formats.card import card
from formats.huggingface import save_backbone, settings_of
from formats.onnx import save_onnx
from model import EmotionModel

RANDOM = "random, as "  # begins the source of a backbone of the demo that has no checkpoint
FORMATS = ("transformers", "peft", "onnx")


def export(directory: str | Path, out: str | Path, form: str, backbone: str | None = None) -> Path:
    """Write a finished run to `out` in one of FORMATS, all of it or nothing.

    `backbone` says where the run's backbone is now, if it has moved.
    Raises FileNotFoundError or ValueError for what is no finished run, cannot be exported so or would be overwritten.
    """
    directory, out = Path(directory), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already, and not empty; expected a new directory")
    result, config, source = read_run(directory)
    config = replace(config, backbone=backbone or config.backbone)
    if form == "peft":
        require_adapter(directory, config, source)
    model = run.load_run(directory, merged=form != "peft", backbone=backbone)
    beside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        beside.mkdir(parents=True)
        if form == "onnx":
            save_onnx(model, beside / "model.onnx")
        else:
            save_head(model, beside / "head.safetensors")
        if form == "transformers":
            save_backbone(model.backbone, beside, family(source, config.backbone))
        if form == "peft":
            save_adapter(model.backbone, beside, config.backbone)
            write_json(beside / "preprocessor_config.json", settings_of(model.backbone.config)[1])
        base = source if source.startswith(RANDOM) else config.backbone
        text = card(result, run.plain(config), changes(config), base, form, model.targets, model.label_range)
        (beside / "README.md").write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.replace(beside, out)
    except SafetensorError as error:
        raise OSError(f"{out}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def read_run(directory: Path) -> tuple[dict, Config, str]:
    """What `result.json` holds, the configuration, and the backbone's source. Raises where there is no finished run."""
    best, config = run.load_best(directory)
    if not (directory / "result.json").is_file():
        raise ValueError(f"{directory}: has no result.json, so this run is not finished; train.py continues it")
    if config.backbone == "logmel":
        raise ValueError(f"{directory}: has backbone: logmel, which other programs do not know; there is but a head")
    return weights.read_json(directory / "result.json"), config, best["backbone"]["source"]


def require_adapter(directory: Path, config: Config, source: str) -> None:
    """Raise ValueError unless an adapter, its head and the named base model are the whole model."""
    reason = None
    if config.lora_rank == 0:
        reason = "it has no LoRA (lora_rank is 0)"
    elif config.trainable_layers not in (0, []):
        reason = f"layers of the backbone train besides (trainable_layers is {config.trainable_layers!r})"
    elif config.adapter is not None:
        reason = f"its base is no checkpoint but {source}"
    elif source.startswith(RANDOM):
        reason = "its backbone was random weights, which nobody else has"
    elif Path(config.backbone).is_file():
        reason = (
            f"its backbone is a file, {config.backbone}; transformers and PEFT load directories and names of the hub"
        )
    if reason:
        raise ValueError(
            f"{directory}: cannot be a PEFT adapter: {reason}; expected a LoRA run, or --format transformers"
        )


def family(source: str, backbone: str) -> str:
    """`model_type` of the checkpoint that a run began with; wav2vec2 if no settings are with it."""
    files = [] if source.startswith(RANDOM) else weights.locate(backbone)
    settings = [weights.read_json(file) for file in files if file.name == "config.json"]
    return settings[0].get("model_type", "wav2vec2") if settings else "wav2vec2"


def changes(config: Config) -> dict:
    """The settings that differ from the defaults, but for the places of one machine."""
    default = run.plain(Config())
    return {
        key: value for key, value in run.plain(config).items() if key not in run.PLACE_KEYS and value != default[key]
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_head(model: EmotionModel, path: Path) -> None:
    """Pooling and head: `output.*`, `hidden.*` for one with a hidden layer, `score.weight` or `layer_weights`."""
    linears = [layer for layer in model.head if isinstance(layer, nn.Linear)]
    layers = dict(zip(("output", "hidden"), reversed(linears), strict=False))
    tensors = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.named_parameters()}
    if model.pooling == "attentive":
        tensors["score.weight"] = model.score.weight
    if model.pooling == "layers":
        tensors["layer_weights"] = model.layer_weights
    about = {"targets": json.dumps(model.targets), "label_range": json.dumps(model.label_range)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt", "pooling": model.pooling, **about})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a finished run for other programs, with a model card.")
    parser.add_argument("run", help="the directory of a run of train.py")
    parser.add_argument("out", help="a new directory")
    parser.add_argument("--backbone", help="where the run's backbone is now, if it has moved: a path or a hub id")
    parser.add_argument("--format", choices=FORMATS, default="transformers")
    arguments = parser.parse_args()
    out = export(arguments.run, arguments.out, arguments.format, arguments.backbone)
    print("\n".join(f"{file}  {file.stat().st_size / 1e6:.1f} MB" for file in sorted(out.iterdir())))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; nothing is written")
