"""Hand a finished run on: as a checkpoint of transformers, a PEFT adapter or an ONNX file, each with a model card.

    python export.py runs/lora_r8 exported --format transformers

The directory must not exist yet, or be empty. `transformers` and `peft` hold the backbone or its LoRA, and the pooling
and head as `head.safetensors`; the card shows how predictions follow from them. `onnx` is waveform in, labels out.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import run
import weights
from config import Config
from formats.adapter import save_adapter
from formats.card import card
from model import FIELD, EmotionModel, normalize

RANDOM = "random, as "  # begins the source of a backbone of the demo that has no checkpoint
FORMATS = ("transformers", "peft", "onnx")
ONE_FILE = 2_000_000_000  # bytes of weights: what a protobuf holds
PLACES = {"name", "output_dir", "data_root", "manifest", "cache_dir", "device", "backbone", "adapter"}


def export(directory: str | Path, out: str | Path, form: str) -> Path:
    """Write a finished run to `out` in one of FORMATS, all of it or nothing.

    Raises FileNotFoundError or ValueError for what is no finished run, cannot be exported so or would be overwritten.
    """
    directory, out = Path(directory), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already, and not empty; expected a new directory")
    result, config, source = read_run(directory)
    if form == "peft":
        require_adapter(directory, config, source)
    model = run.load_run(directory, merged=form != "peft")
    beside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        beside.mkdir(parents=True)
        if form == "onnx":
            save_onnx(model, beside / "model.onnx")
        else:
            save_head(model, beside / "head.safetensors")
        if form == "transformers":
            weights.save_backbone(model.backbone, beside, family(source, config.backbone))
        if form == "peft":
            save_adapter(model.backbone, beside, config.backbone)
            write_json(beside / "preprocessor_config.json", weights.settings_of(model.backbone.config)[1])
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
    return {key: value for key, value in run.plain(config).items() if key not in PLACES and value != default[key]}


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


# --- ONNX ------------------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """An emotion model for one waveform, with plain convolutions: no pieces, spectra or calls that ONNX lacks."""

    def __init__(self, model: EmotionModel):
        super().__init__()
        self.model = model

    def forward(self, waveform: Tensor) -> tuple[Tensor, ...]:
        """Waveform `(S,)` at 16 kHz -> a number `()` for each target, in the label's scale."""
        backbone, (low, high) = self.model.backbone, self.model.label_range
        config = backbone.config
        x = self.encode(normalize(waveform) if config.normalize_waveform else waveform)
        lengths = [x.shape[0]]
        x = backbone.projection(x, lengths)
        position = backbone.position.conv(x.mT[None])[0].mT[: x.shape[0]]  # (T, D) -> (1, D, T), and back
        x = x + F.gelu(position)
        states = [x if config.pre_norm else backbone.norm(x)]
        for layer in backbone.layers:
            states.append(layer(states[-1], lengths))
        if config.pre_norm:
            states[-1] = backbone.norm(states[-1])
        return (low + (high - low) * self.model.head(self.pool(states))).unbind()

    def encode(self, waveform: Tensor) -> Tensor:
        """`(S,)` -> `(T, C)`."""
        encoder = self.model.backbone.feature_encoder
        x = waveform[None, None]
        for i, conv in enumerate(encoder.convs):
            x = conv(x)  # (1, C, T)
            if not encoder.group_norm:
                x = encoder.norms[i](x.mT).mT
            elif i == 0:  # each channel over time
                x = F.group_norm(x, x.shape[1], encoder.norms[0].weight, encoder.norms[0].bias, encoder.norms[0].eps)
            x = F.gelu(x)
        return x[0].mT

    def pool(self, states: Sequence[Tensor]) -> Tensor:
        """All hidden states `(T, D)` -> what the head takes."""
        x, pooling = states[-1], self.model.pooling
        if pooling == "layers":
            return self.model.layer_weights.softmax(0) @ torch.stack([state.mean(0) for state in states])
        if pooling == "attentive":
            return (x * self.model.score(x).softmax(0)).sum(0)
        if pooling == "mean_std":
            return torch.cat([x.mean(0), x.var(0, correction=0).clamp_min(1e-10).sqrt()])
        return x.mean(0)


@torch.no_grad()
def save_onnx(model: EmotionModel, path: Path) -> None:
    """One file, "waveform" `(S,)` with S from 400 in, targets by name out; above 2 GB the weights lie beside it."""
    if model.backbone.config.relative_buckets:
        raise ValueError("--format onnx: cannot hold WavLM's attention bias; use --format transformers")
    graph = Graph(model).eval()
    example = torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    low, high = model.label_range
    difference = (torch.stack(graph(example)) - low - (high - low) * model.infer([example])[0]).abs().max().item()
    if difference > 1e-4 * (high - low):
        raise ValueError(f"--format onnx: the graph's predictions are {difference:.2g} off; use --format transformers")
    size = sum(parameter.nbytes for parameter in model.parameters())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every optional package that it does not find
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph,
                (example,),
                path,
                input_names=["waveform"],
                output_names=list(model.targets),
                dynamic_shapes=({0: torch.export.Dim("samples", min=FIELD)},),
                external_data=size > ONE_FILE,
                dynamo=True,
                verbose=False,
            )
    except ImportError as error:
        raise ValueError(f"--format onnx: needs onnx and onnxscript ({error}); pip install onnx onnxscript") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a finished run for other programs, with a model card.")
    parser.add_argument("run", help="the directory of a run of train.py")
    parser.add_argument("out", help="a new directory")
    parser.add_argument("--format", choices=FORMATS, default="transformers")
    arguments = parser.parse_args()
    out = export(arguments.run, arguments.out, arguments.format)
    print("\n".join(f"{file}  {file.stat().st_size / 1e6:.1f} MB" for file in sorted(out.iterdir())))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; nothing is written")
