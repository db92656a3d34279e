"""What only a GPU or torch.compile needs: is it usable here, and a complete cache kept in a GPU's memory."""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ActivationCache = Any  # of `cache`, which loads this file when it needs it


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


def require_usable(device: torch.device, compiled: bool) -> None:
    """Raise ValueError if PyTorch has no code for a CUDA device, or if what torch.compile needs is missing."""
    if device.type == "cuda":
        require_code(device)
    if compiled:
        require_compiler(device)


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
