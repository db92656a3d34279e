"""Which layers did finetuning change? Representations and weights of a finished run beside the pretrained ones.

    python -m tools.layers runs/full

Similarity (linear CKA) of every hidden state on speech that was not trained on, and relative change of every layer's
weights. What lies below all that trained is the same in both models, so it is computed once.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import run
from cache import Prefix
from lora import merge
from machine import hardware
from machine.programs import command
from model import Wav2Vec2
from report import tables

TOGETHER = 8  # utterances in memory at once
OUTSIDE = {"projection": "projection.norm projection.linear", "positional convolution": "position", "norm": "norm"}
PARTS = {"attention": "attention", "feed-forward": "feed_forward", "norms": "attention_norm feed_forward_norm"}
COLUMNS = ("part", "similarity", "change", *PARTS)
CHANGE = "Change of weights: ||W - W0|| / ||W0||. It grows with learning rate and steps, much alike wherever Adam "
CHANGE += "trains; what it amounts to, with all changes below, is in the similarity of the output."
Row = dict[str, str | float]


class LinearCKA:
    """Linear CKA of two representations of the same frames, added up batch by batch in memory that does not grow.

    `||Y^T X||^2 / (||X^T X|| ||Y^T Y||)` with centred columns and Frobenius norms (Kornblith et al. 2019, arXiv
    1905.00414): 1 for the same up to rotation, scale and offset, about `D / (D + frames)` for noise of D channels.
    """

    def __init__(self) -> None:
        self.frames = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Frames `(N, D)` and `(N, E)`. Channels are shifted by their first mean, so that an offset costs no digits."""
        if self.frames == 0:
            self.shifts = x.mean(0), y.mean(0)
        x, y = x - self.shifts[0], y - self.shifts[1]
        terms = [term.cpu().double() for term in (x.sum(0), y.sum(0), x.T @ x, y.T @ y, y.T @ x)]
        self.totals = [a + b for a, b in zip(self.totals, terms, strict=True)] if self.frames else terms
        self.frames += len(x)

    def value(self) -> float:
        """Of all frames so far; NaN if one side is constant."""
        x, y, xx, yy, yx = self.totals
        xx, yy = xx - torch.outer(x, x) / self.frames, yy - torch.outer(y, y) / self.frames
        yx = yx - torch.outer(y, x) / self.frames
        return (yx.square().sum() / (xx.norm() * yy.norm())).item()


def flat(model: nn.Module, names: Sequence[str]) -> Tensor:
    """All parameters `(P,)` of the submodules with these names, in fp64."""
    return torch.cat([p.double().flatten() for name in names for p in model.get_submodule(name).parameters()])


@torch.no_grad()
def relative_change(before: nn.Module, after: nn.Module, names: Sequence[str]) -> float:
    """`||W - W0|| / ||W0||` over all parameters of the submodules with these names together."""
    old, new = flat(before, names), flat(after, names)
    return ((new - old).norm() / old.norm()).item()


def changes(before: Wav2Vec2, after: Wav2Vec2, trained: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """Rows of what lies outside the layers, if it is among the parameters that `trained`, and of every layer."""
    outside, layers = [], []
    for part, names in OUTSIDE.items():
        starts = tuple(f"backbone.{name}." for name in names.split())
        if any(parameter.startswith(starts) for parameter in trained):
            outside.append({"part": part, "change": relative_change(before, after, names.split())})
    for number in range(len(before.layers)):
        layer = f"layers.{number}"
        row: Row = {"part": f"layer {number}", "change": relative_change(before, after, [layer])}
        for part, names in PARTS.items():
            row[part] = relative_change(before, after, [f"{layer}.{name}" for name in names.split()])
        layers.append(row)
    return outside, layers


@torch.no_grad()
def similarities(pretrained: Wav2Vec2, finetuned: Wav2Vec2, prefix: Prefix, count: int) -> tuple[list[float], int]:
    """CKA of every hidden state, 0 to L, over `count` utterances, and their frames; 1 up to where `prefix` ends."""
    depths = range(prefix.depth + 1, pretrained.config.layers + 1)
    found, frames = [LinearCKA() for _ in depths], 0
    batches = [range(i, min(i + TOGETHER, count)) for i in range(0, count, TOGETHER)] if depths else []
    for x, lengths in tqdm(prefix(batches), total=len(batches), unit="batch", disable=None, leave=False):
        y, frames = x, frames + len(x)
        for depth, cka in zip(depths, found, strict=True):
            x, y = pretrained(x, lengths, depth - 1, depth), finetuned(y, lengths, depth - 1, depth)
            cka.add(x, y)
    same = [1.0] * (pretrained.config.layers + 1 - len(depths))
    return same + [cka.value() for cka in found], frames


def choose(utterances: Sequence[data.Utterance], split: str, count: int) -> list[data.Utterance]:
    """At most `count` utterances of a split, from all over it."""
    there = [utterance for utterance in utterances if utterance.split == split]
    return [there[i * len(there) // count] for i in range(count)] if count < len(there) else there


def cell(row: Row, column: str) -> str:
    """A figure in a few digits; a similarity of 1 is that of the very same."""
    value = row.get(column, "")
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if column == "similarity" and value != 1 else f"{value:.3g}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which layers did finetuning change?")
    parser.add_argument("run", help="the directory of a run of train.py")
    parser.add_argument("--out", help="directory for what is written; otherwise that of the run")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="neither was trained on")
    parser.add_argument("--utterances", type=int, default=200, help="at most that many of the split")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--backbone", help="where the backbone of the run is now, if it has moved")
    arguments = parser.parse_args()
    if arguments.utterances < 2:
        parser.error(f"--utterances: expected at least 2, found {arguments.utterances}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device, directory = hardware.pick_device(arguments.device), Path(arguments.run)
    checkpoint, config = run.load_best(directory)
    config = replace(config, backbone=arguments.backbone or config.backbone)
    if config.backbone == "logmel":
        raise ValueError(f"{directory}: found backbone logmel, which has no layers; expected a run of Wav2Vec 2.0")
    out = Path(arguments.out or directory)
    out.mkdir(parents=True, exist_ok=True)
    chosen = choose(run.load_utterances(config)[0], arguments.split, arguments.utterances)
    data.check_audio(chosen)

    model = run.load_run(directory, merged=False, backbone=arguments.backbone)
    pretrained, _ = run.find_backbone(config)
    prefix = Prefix(model, [utterance.source for utterance in chosen], device, torch.float32)  # to the first LoRA
    merge(model)
    outside, layers = changes(pretrained, model.backbone, list(checkpoint["trained"]))
    run.prepare(model, device, "fp32")
    similarity, frames = similarities(pretrained.to(device), model.backbone, prefix, len(chosen))
    layers = [{**row, "similarity": value} for row, value in zip(layers, similarity[1:], strict=True)]

    note = run.DEMO_NOTE if config.corpus == "demo" else ""
    noise = pretrained.config.width / (pretrained.config.width + frames)
    heard = (
        f"{directory}, epoch {checkpoint['epoch']}. Similarity to the pretrained model: linear CKA over {frames:,} "
        f"frames of {len(chosen)} utterances of {arguments.split}, by which white noise would have {noise:.2f}."
    )
    rows = [*outside, {"part": "input of layer 0", "similarity": similarity[0]}, *layers]
    table = tables.markdown(COLUMNS, [[cell(row, column) for column in COLUMNS] for row in rows])
    text = "\n\n".join(filter(None, [note, heard if frames else "", CHANGE, table])) + "\n"
    hardware.write_text(out / "layers.md", text)
    tables.write_csv(out / "layers.csv", [*COLUMNS, "note"], [{**row, "note": note} for row in rows])
    drawn = "no picture: matplotlib is not installed"
    if plots := tables.find_plots():
        names = ["input", *(row["part"].removeprefix("layer ") for row in layers)]
        plots.layers(names, similarity, [row["change"] for row in layers], note, out / "layers")
        drawn = "layers.png, layers.pdf"
    print(f"{text}\n{out}: layers.md, layers.csv, {drawn}")


if __name__ == "__main__":
    command(main)
