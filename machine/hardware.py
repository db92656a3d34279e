"""Devices: which one, in what precision, how much memory, and what to do where it runs out."""

import ctypes
import gc
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from freeze import cast_frozen
from machine import parallel
from model import EmotionModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def out_of_memory() -> Iterator[list[str]]:
    """End the work within where a GPU has no memory left, free what it held, and leave the reason in the list."""
    reasons: list[str] = []
    try:
        yield reasons
    except RuntimeError as error:
        if "out of memory" not in str(error):  # CUDA's error has a type of its own, that of MPS has not
            raise
        reasons.append(str(error).splitlines()[0])
        traceback.clear_frames(error.__traceback__)  # which hold the tensors
    if reasons:
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def pick_device(name: str) -> torch.device:
    """The device of this name; for "auto" CUDA, then MPS, then the CPU. Raises ValueError if it is not there.

    Of several processes each takes the GPU with its own number.
    """
    alone = parallel.size() == 1
    found = {"cuda": torch.cuda.is_available(), "mps": alone and torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in found.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: {name!r} is not a device; expected auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not alone:
        device = torch.device("cuda", parallel.local_rank())
    if not found.get(device.type) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        there = ", ".join(kind for kind, is_there in found.items() if is_there)
        raise ValueError(f"device: {device} is not there for PyTorch {torch.__version__}; this machine has {there}")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """ "auto": bf16 on a GPU that computes in it, fp16 on one that does not, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def prepare(
    model: EmotionModel, device: torch.device, precision: str, tf32: bool = False, compiled: bool = False
) -> None:
    """Move what is in memory to its device, frozen matrices in the type that they are used in."""
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32  # PyTorch's default is half and half
    if precision != "fp32":
        cast_frozen(model, DTYPES[precision])
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    for layer in model.backbone.layers if compiled else ():
        layer.finish = torch.compile(layer.finish, dynamic=True)


def keep_freed_memory() -> None:
    """Have glibc keep what PyTorch frees: a large tensor in fresh pages takes several times as long to write."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing given back


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") if hasattr(torch.cpu, "get_capabilities") else None
    return f"{name or platform.machine()} ({device.type}, {torch.get_num_threads()} threads)"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where one is used, else the most that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # ru_maxrss would count the parent process from before our program began
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
