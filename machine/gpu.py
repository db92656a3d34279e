"""What only a GPU needs: its forms of what `machine.fast` has for a CPU, a cache in its memory, and whether it works.

`torch.compile` is looked at here too.
"""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from machine.fast import Bias, Frames, gated
from machine.hardware import parallel

ActivationCache = Any  # of `cache`, which loads this file when it needs it

# ---------------------------------------------------------------- one call for a whole batch


def places(frames: Frames, device: torch.device) -> Tensor:
    """Where the packed frames lie in a padded batch whose utterances lie one after the other: int64 `(N,)`."""
    starts = range(0, len(frames) * max(frames), max(frames))
    parts = (torch.arange(start, start + n) for start, n in zip(starts, frames, strict=True))
    return frames.once("_places", lambda: torch.cat(list(parts)), device)


def pad(x: Tensor, frames: Frames) -> Tensor:
    """Packed `(N, ...)` -> `(B, T, ...)` with zeros behind each utterance, without waiting for the GPU."""
    size = len(frames) * max(frames)
    padded = x.new_zeros(size, *x.shape[1:]).index_copy(0, places(frames, x.device), x)
    return padded.unflatten(0, (len(frames), -1))


def unpad(x: Tensor, frames: Frames) -> Tensor:
    """`(B, T, ...)` -> packed `(N, ...)`."""
    return x.flatten(0, 1).index_select(0, places(frames, x.device))


def convolve(conv: nn.Conv1d, x: Tensor, frames: Frames) -> Tensor:
    """As `fast.convolve`."""
    return unpad(conv(pad(x, frames).mT).mT[:, : max(frames)], frames)


def attend(q: Tensor, k: Tensor, v: Tensor, frames: Frames, dropout: float = 0.0, bias: Bias | None = None) -> Tensor:
    """As `fast.attend`: FlashAttention over packed sequences, which has no dropout and no bias, else padded."""
    if q.is_cuda and q.dtype != torch.float32 and dropout == 0 and bias is None and has_flash(q.device):
        from torch.nn.attention.varlen import varlen_attn

        offsets, longest = frames.offsets(q.device), max(frames)
        return cast(Tensor, varlen_attn(q, k, v, offsets, offsets, longest, longest))  # no tuple unless asked for one
    mask = pad(q.new_ones(len(q), 1), frames)[:, None, None, :, 0] > 0  # (B, 1, 1, T); no frame attends to padding
    if bias is not None:
        mask = gated(pad(bias[0], frames), bias[1]).masked_fill(~mask, -torch.inf)
    q, k, v = (pad(x, frames).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D/H)
    return unpad(F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2), frames)


def has_flash(device: torch.device) -> bool:
    """Whether FlashAttention is built (it is not for Windows) and the GPU can run it: compute capability 8.0."""
    built = torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


def mean(x: Tensor, frames: Frames) -> Tensor:
    """As `fast.mean`."""
    return pad(x.float(), frames).sum(1) / frames.offsets(x.device).diff()[:, None]


def weighted_mean(x: Tensor, scores: Tensor, frames: Frames) -> Tensor:
    """As `fast.weighted_mean`."""
    valid = pad(torch.ones_like(scores), frames) > 0  # (B, T, 1)
    weights = pad(scores, frames).masked_fill(~valid, -torch.inf).softmax(1)
    return (pad(x.float(), frames) * weights).sum(1)


def repeated(device: Any = torch.mps) -> tuple[AbstractContextManager, AbstractContextManager]:
    """For PyTorch's `checkpoint`, which up to 2.13 does not restore the random state of MPS for the second time."""
    state = device.get_rng_state()

    @contextmanager
    def again() -> Iterator[None]:
        now = device.get_rng_state()
        device.set_rng_state(state)
        yield
        device.set_rng_state(now)

    return nullcontext(), again()


# ---------------------------------------------------------------- a cache in the GPU's memory


class OnGPU:
    """Reads like an `ActivationCache`, and keeps every activation on the device once it was read. One thread reads."""

    def __init__(self, cache: ActivationCache, device: torch.device):
        """Raises ValueError if the cache does not fit into the device's memory."""
        self.cache, counts = cache, cache.entries["frames"] + cache.scale_rows
        self.borders = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
        self.there = np.zeros(len(counts), bool)
        try:
            self.held = torch.empty(int(self.borders[-1]), cache.width, dtype=cache.dtype, device=device)
        except RuntimeError:
            size = cache.stored_bytes() / 1e9
            raise ValueError(f"cache_tier: gpu has no room for {size:.1f} GB; set cache_tier: disk") from None

    def read(self, numbers: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, list[int]]:
        """Packed activations `(N, width)` and lengths, as `ActivationCache.read` gives them; always on its device."""
        parts, lengths = [], []
        for number, place in zip(numbers, self.cache.place_of[np.asarray(numbers, int)], strict=True):
            rows = self.held[self.borders[place] : self.borders[place + 1]]
            if not self.there[place]:
                rows.copy_(self.cache.read_stored([number])[0])
                self.there[place] = True
            parts.append(rows)
            lengths.append(len(rows) - self.cache.scale_rows)
        return self.cache.decode(torch.cat(parts), lengths), lengths


def pick(tier: str, cache: ActivationCache, device: torch.device) -> ActivationCache | OnGPU:
    """What to read from: for "gpu" the GPU; for "auto" the GPU if the cache fits into half of its free memory."""
    fits = tier == "gpu" or cache.stored_bytes() <= torch.cuda.mem_get_info(device)[0] / 2
    return OnGPU(cache, device) if fits else cache


# ---------------------------------------------------------------- whether it works here


def pick_precision(name: str, device: torch.device) -> str:
    """`hardware.pick_precision` for CUDA."""
    emulated = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    if name == "bf16" and emulated and parallel.rank() == 0:
        said = f"{torch.cuda.get_device_name(device)} only emulates bf16, several times slower than fp16"
        print(f"warning: precision: {said}; set precision: fp16 or auto", file=sys.stderr)
    return name if name != "auto" else "fp16" if emulated else "bf16"


def require_code(device: torch.device) -> None:
    """Raise ValueError if this build of PyTorch has no machine code for a GPU, and none to translate for it.

    Code for capability x.y runs on x.z with z >= y; what a build calls compute_xy is translated for all later ones.
    """
    built = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))  # AMD's names do not match
    codes = [((int(major), int(minor)), kind == "compute") for kind, major, minor in built]
    own = torch.cuda.get_device_capability(device)
    if not codes or any(code <= own and (translated or code[0] == own[0]) for code, translated in codes):
        return
    known = ", ".join(f"{major}.{minor}" for major, minor in sorted({code for code, _ in codes}))
    age = "an older CUDA, such as cu126" if own < min(codes)[0] else "a newer CUDA"
    name = f"{torch.cuda.get_device_name(device)}) has compute capability {own[0]}.{own[1]}"
    built_for = f"PyTorch {torch.__version__} has code for {known}"
    advice = f"install a build for {age} (pytorch.org/get-started), or set device: cpu"
    raise ValueError(f"device: {device} ({name}, but {built_for}; {advice}")


def require_compiler(device: torch.device) -> None:
    """Raise ValueError if what torch.compile needs is missing: a C++ compiler for the CPU, Triton for CUDA."""
    if device.type == "cuda":
        tool, found = "Triton", importlib.util.find_spec("triton") is not None
        advice = "`pip install triton` (triton-windows on Windows)"
    else:
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        tool = f"C++ compiler ({compiler})"
        found = any(map(shutil.which, (compiler, compiler.split()[0])))
        advice = "install one or name it in CXX"
    if not found:
        what = f"found no {tool}, which torch.compile needs on a {device.type} device"
        raise ValueError(f"compile: {what}; {advice}, or set compile: false")


def memory_advice(config: Mapping[str, Any], processes: int) -> str:
    """What to set after a GPU ran out of memory: what saves some, is not set yet and leaves the loss as it is."""
    at_once = min(config["micro_batch_size"] or config["batch_size"], -(-config["batch_size"] // processes))
    settings = [f"micro_batch_size={at_once // 2} (or half of that again)"] if at_once > 1 else []
    if not config["gradient_checkpointing"] and (config["trainable_layers"] not in (0, []) or config["lora_rank"]):
        settings.append("gradient_checkpointing=true")
    if config["cache"] and config["cache_tier"] != "disk":
        settings.append("cache_tier=disk")
    if not settings:
        return "one utterance at a time does not fit; take a smaller backbone, shorter recordings or train fewer layers"
    return f"set {', or '.join(settings)}: the loss stays the same, and the same command continues"
