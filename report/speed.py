"""What `bench.py` measured, in tables and a picture, and what a method must compute at the least."""

import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import freeze
from machine.fast import linear
from model import EmotionModel
from report.tables import find_plots, markdown
from weights import read_json

RATE = 16_000  # Hz
WARM_UP = 2  # of everything that is measured; reported, and not in the medians


def make_turns(count: int, lengths: str = "mixed", seed: int = 0) -> list[np.ndarray]:
    """Waveforms `(S,)` at 16 kHz filled with noise, 5.7 s each; "mixed": of 2.75 to 11 s as in MSP-Podcast."""
    random = np.random.default_rng(seed)
    seconds = 2.75 + 8.25 * random.beta(1.1, 1.97, size=count) if lengths == "mixed" else np.full(count, 5.7)
    return [0.1 * random.standard_normal(int(s * RATE)).astype("f4") for s in seconds]


def summarise(answers: Sequence[dict]) -> dict:
    """Median and spread after the warm-up, and the peak of the process's memory."""
    seconds = [answer["seconds"] for answer in answers]
    warm = seconds[WARM_UP:]
    found = {"seconds": statistics.median(warm), "seconds_min": min(warm), "seconds_max": max(warm)}
    return found | {"warm_up_seconds": seconds[:WARM_UP], "peak_memory_bytes": answers[-1]["peak_memory_bytes"]}


def versions() -> dict[str, str | None]:
    found = {package: find_spec(package) and version(package) for package in ("torch", "numpy", "transformers", "peft")}
    return {"python": platform.python_version(), **found}


def operations(model: EmotionModel, samples: Sequence[int], cached: bool = False) -> dict[str, int]:
    """Floating-point operations for waveforms of these lengths: of a training "step", of "build", of "infer".

    Matrix products and convolutions, a multiply-add is two; without the head. Backward, a product costs its forward
    once for its weight if that trains and once for its input if something before it trains; attention twice. What
    gradient checkpointing computes again is no part of the method.
    """
    backbone, depth, c = model.backbone, freeze.prefix_depth(model), model.backbone.config
    frames, convolutions = samples, 0
    for conv, kernel, stride in zip(backbone.feature_encoder.convs, c.conv_kernels, c.conv_strides, strict=True):
        frames = [(count - kernel) // stride + 1 for count in frames]
        convolutions += 2 * sum(frames) * conv.weight.numel()
    # projection and positional convolution, over which a norm trains if they do
    embedding = 2 * sum(frames) * (backbone.projection.linear.weight.numel() + backbone.position.conv.weight.numel())
    parts = [(convolutions, 0), (embedding, 2 * embedding)]
    parts += [layer(module, frames, first=i == depth) for i, module in enumerate(backbone.layers)]
    split = min(depth, len(backbone.layers)) + 2  # parts of the prefix: hidden state -1 comes after the first
    before, after = (sum(forward for forward, _ in some) for some in (parts[:split], parts[split:]))
    training = after + sum(backward for _, backward in parts[split:])
    return {"step": training + (0 if cached else before), "build": before, "infer": before + after}


def layer(module: nn.Module, frames: Sequence[int], first: bool) -> tuple[int, int]:
    """Forward and backward of a transformer layer; the `first` that trains owes its input no gradient."""
    rows, forward, backward = sum(frames), 0, 0
    first = first and not (module.pre_norm and module.attention_norm.weight.requires_grad)
    from_input = ("attention.q", "attention.k", "attention.v") if first else ()
    for name, weight in module.named_parameters():
        if weight.ndim == 2:  # of a product; that with LoRA's B has A's output before it, which trains
            to_input = name.endswith(".B") or not name.startswith(from_input)
            product = 2 * rows * weight.numel()
            forward += product
            backward += product * (weight.requires_grad + to_input)
    attention = 4 * sum(count**2 for count in frames) * module.attention_norm.weight.numel()
    return forward + attention, backward + 2 * attention


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of this machine's matrix products: the fastest of a few shapes and libraries."""
    best = 0.0
    rows = 2048 if device.type == "cpu" else 65536
    for inputs, outputs in ((768, 3072), (3072, 768)):
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        for product in [F.linear, linear] * (WARM_UP + 5):
            start, seconds, products = time.perf_counter(), 0.0, 0
            while seconds < 0.1:  # steps of 16 ms are a sixth of that at most
                product(x, weight)
                synchronize(device)
                seconds, products = time.perf_counter() - start, products + 1
            best = max(best, products * 2 * rows * inputs * outputs / seconds)
    return best


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def read_result(path: Path) -> dict:
    """What a run wrote. Raises OSError, or ValueError for another file."""
    result = read_json(path)
    if "groups" not in result:
        raise ValueError(f"{path}: has no `groups`; expected what bench.py wrote with --out")
    return result


def tables(result: dict) -> str:
    """Markdown: what was measured in a paragraph, a table of training steps, and one of all else."""
    options, found = result["options"], result["versions"]
    peers = f" Peers: transformers {found['transformers']}, PEFT {found['peft']}." if options["peer"] else ""
    measured = (
        f"{result['machine']}, {options['precision']}, PyTorch {found['torch']}; {options['turns']} turns of "
        f"{options['lengths']} length, {result['audio_seconds']:.1f} s of audio ({result['padded_seconds']:.1f} s if "
        f"padded). Medians of {options['rounds']} rounds, methods in turn, after {result['warm_up']} of warm-up. The "
        f"machine multiplies matrices at {result['matmul_flops'] / 1e9:,.0f} GFLOP/s, of which a method's share counts "
        f"what it needs: nothing for padding, nor for gradients that nothing trains on.{peers}"
    )
    epochs = (
        f"{options['epochs']} epochs on an hour of audio: that many steps and, where there is a cache, one build, from "
        "their medians; builds were measured before the steps, not in turn with them."
    )
    rows = [cells(*methods, result["audio_seconds"], options["epochs"]) for methods in compared(result)]
    steps, others = (
        markdown([column for column, _ in table[0]], [[cell for _, cell in row] for row in table])
        for table in zip(*rows, strict=True)
    )
    return "\n\n".join([measured, steps, epochs, others])


def compared(result: dict) -> list[tuple[dict, dict | None, dict | None]]:
    """Each method's record with those it was measured in turn with: our full finetuning, and its peer."""
    found = []
    for group in result["groups"]:
        full = next((r for r in group if r["side"] in ("ours", "reference") and r["config"] == "full"), None)
        peer = next((r for r in group if r["side"] == "peer"), None)
        found += [(r, full, peer if r is not peer else None) for r in group if r["side"] != "reference"]
    return found


Row = list[tuple[str, str]]  # of a table, each cell behind the name of its column


def cells(record: dict, full: dict | None, other: dict | None, seconds: float, epochs: int) -> tuple[Row, Row]:
    """What both tables say of a method, for so many seconds of audio."""
    step, read, build, infer = (record[phase] for phase in ("step", "read", "build", "infer"))
    total, memory = record["epochs_seconds"], step["peak_memory_bytes"]
    steps = [
        ("method", record["name"]),
        ("s a step (min to max)", "{seconds:.3g} ({seconds_min:.3g} to {seconds_max:.3g})".format(**step)),
        ("audio s/s", f"{seconds / step['seconds']:.1f}"),
        ("vs our full", factor(full, record, "step")),
        ("vs peer", factor(other, record, "step")),
        ("of the matmul rate", f"{step['share']:.0%}" if step["share"] else ""),  # of the head nothing is counted
        ("peak memory", f"{memory / 1e9:.2f} GB"),
        ("vs peer", f"{memory / other['step']['peak_memory_bytes']:.2f}" if other else ""),
        ("trainable", f"{record['trainable_parameters'] / 1e6:.2f} M"),
    ]
    others = [
        ("method", record["name"]),
        ("to the first step (start-up)", f"{record['first_step_seconds']:.1f} s ({record['startup_seconds']:.1f})"),
        ("cache build", f"{build['seconds']:.3g} s" if build else ""),
        ("reading the cache", f"{1000 * read['seconds']:.1f} ms" if read else ""),
        (f"{epochs} epochs on 1 h", f"{total / seconds * 3600:.0f} s"),
        ("vs peer", f"{other['epochs_seconds'] / total:.2f}x" if other else ""),
        ("inference, audio s/s", f"{seconds / infer['seconds']:.1f}" if infer else ""),
        ("vs peer", factor(other, record, "infer")),
        ("its peak memory", f"{infer['peak_memory_bytes'] / 1e9:.2f} GB" if infer else ""),
    ]
    return steps, others


def factor(base: dict | None, record: dict, phase: str) -> str:
    """How many times faster than `base`."""
    return f"{base[phase]['seconds'] / record[phase]['seconds']:.2f}x" if base and record[phase] else ""


def draw(result: dict, path: Path) -> str:
    """Bars of time and memory of every method; returns what to say of the picture."""
    if not (plots := find_plots()):
        return " (no picture: matplotlib is not installed)"
    records = [record for record, *_ in compared(result)]
    per_hour = 3600 / result["audio_seconds"]
    seconds = [(r["step"]["seconds"] * per_hour, r["step"]["bound_seconds"] * per_hour) for r in records]
    gigabytes = [(r["step"]["peak_memory_bytes"] / 1e9, r["floor_bytes"] / 1e9) for r in records]
    plots.bars([(r["name"], r["side"]) for r in records], seconds, gigabytes, "", path)
    return f", {path}.png"
