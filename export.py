"""Hand a finished run on: as a checkpoint of transformers, a PEFT adapter or an ONNX file, each with a model card.

transformers and peft hold the backbone or its LoRA, and the pooling and head as `head.safetensors`; the card shows how
predictions follow from them. onnx is waveform in, labels out.
"""

import argparse
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

import run
import weights
from config import Config, expand
from formats.adapter import save_adapter
from formats.card import card
from formats.huggingface import save_backbone, settings_of
from formats.onnx import save_onnx
from machine.programs import command
from model import EmotionModel

FORMATS = ("transformers", "peft", "onnx")


def export(directory: str | Path, out: str | Path, form: str, backbone: str | None = None) -> Path:
    """Write a finished run to `out` in one of FORMATS, all or nothing; `backbone` is where that is, if it moved.

    Raises FileNotFoundError or ValueError for what is no finished run, cannot be exported so or would be overwritten.
    """
    directory, out = Path(directory), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already, and not empty; expected a new directory")
    best, config = run.load_best(directory)
    source = best["backbone"]["source"]
    was = "small" if source == "small" else config.backbone  # the demo may have gone on with it
    config = replace(config, backbone=backbone or was)
    if not (directory / "result.json").is_file():
        raise ValueError(f"{directory}: has no result.json, so this run is not finished; train.py continues it")
    if config.backbone == "logmel":
        raise ValueError(f"{directory}: has backbone: logmel, which other programs do not know; there is but a head")
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
            save_backbone(model.backbone, beside, family(config.backbone))
        if form == "peft":
            save_adapter(model.backbone, beside, config.backbone)
            settings = json.dumps(settings_of(model.backbone.config)[1], indent=2)
            (beside / "preprocessor_config.json").write_text(settings + "\n", encoding="utf-8")
        result, plain, default = weights.read_json(directory / "result.json"), run.plain(config), run.plain(Config())
        changed = {key: value for key, value in plain.items() if key not in run.PLACE_KEYS and value != default[key]}
        text = card(result, plain, changed, config.backbone, form, model.targets, model.label_range)
        (beside / "README.md").write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.replace(beside, out)
    except SafetensorError as error:
        raise OSError(f"{out}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def require_adapter(directory: Path, config: Config, source: str) -> None:
    """Raise ValueError unless an adapter, its head and the named base model are the whole model."""
    layers, file = config.trainable_layers, Path(config.backbone).is_file()
    reasons = {
        "it has no LoRA (lora_rank is 0)": config.lora_rank == 0,
        f"layers of the backbone train besides (trainable_layers is {layers!r})": layers not in (0, []),
        f"its base is no checkpoint but {source}": config.adapter is not None,
        "its backbone is the small one of this repository, of which PEFT does not know": source == "small",
        f"its backbone is a file, {config.backbone}, and PEFT loads directories and names of the hub": file,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{directory}: cannot be a PEFT adapter: {reason}; export it with --format transformers")


def family(backbone: str) -> str:
    """`model_type` of the checkpoint that a run began with; wav2vec2 if no settings are with it."""
    settings = [weights.read_json(file) for file in weights.locate(backbone) if file.name == "config.json"]
    return settings[0].get("model_type", "wav2vec2") if settings else "wav2vec2"


def save_head(model: EmotionModel, path: Path) -> None:
    """Pooling and head: `output.*`, `hidden.*` for one with a hidden layer, `score.weight` or `layer_weights`."""
    tensors, last = {}, f"head.{len(model.head) - 1}."
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            ours = name.replace(last, "output.").replace("head.0.", "hidden.")
            tensors[ours] = parameter.detach().contiguous()
    about = {"targets": json.dumps(model.targets), "label_range": json.dumps(model.label_range)}
    save_file(tensors, path, {"format": "pt", "pooling": model.pooling, **about})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=expand, help="the directory of a run of train.py")
    parser.add_argument("out", type=expand, help="a directory that is new or empty")
    parser.add_argument("--backbone", type=expand, help="where the backbone of the run is now, if it has moved")
    parser.add_argument("--format", choices=FORMATS, default="transformers")
    arguments = parser.parse_args()
    out = export(arguments.run, arguments.out, arguments.format, arguments.backbone)
    print("\n".join(f"{file}  {file.stat().st_size / 1e6:.1f} MB" for file in sorted(out.iterdir())))


if __name__ == "__main__":
    command(main, "stopped; nothing is written")
