"""The machine below: which device, in what precision, how much memory, one process or several, and atomic writes."""

import ctypes
import gc
import importlib.util
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from config import extra
from freeze import cast_frozen
from model import EmotionModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


SHORT = ("out of memory", "ALLOC_FAILED")  # of CUDA and MPS; of cuBLAS, which allocates its workspace itself


@contextmanager
def out_of_memory() -> Iterator[list[str]]:
    """End the work within where a GPU has no memory left, free what it held, and leave the reason in the list."""
    reasons: list[str] = []
    try:
        yield reasons
    except RuntimeError as error:
        if not any(words in str(error) for words in SHORT):
            raise
        reasons.append(str(error).splitlines()[0])
        traceback.clear_frames(error.__traceback__)  # they hold the tensors
    if reasons:
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of this name; for "auto" CUDA, then MPS, then the CPU. A GPU always has an index.

    Of several processes each takes the GPU with its number on this machine, `local_rank`. Raises ValueError for a
    device that is not there or that this build of PyTorch has no kernels for.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": local_rank is None and torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in found.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: {name!r} is not a device; expected auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":  # `set_device` and comparisons of devices need the index
        device = torch.device("cuda", local_rank if local_rank is not None else device.index or 0)
    if not found.get(device.type) or (device.type == "cuda" and device.index >= torch.cuda.device_count()):
        there = ", ".join(kind for kind, is_there in found.items() if is_there)
        count = f" ({torch.cuda.device_count()} of it)" if found["cuda"] else ""
        raise ValueError(f"device: {device} is not there for PyTorch {torch.__version__}; found {there}{count}")
    if device.type == "cuda":
        require_kernels(device)
    return device


def require_kernels(device: torch.device) -> None:
    """Raise ValueError if this build of PyTorch has no kernels for a GPU of this age."""
    major, minor = torch.cuda.get_device_capability(device)
    built = [
        int(arch.removeprefix("sm_").rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")
    ]
    if built and 10 * major + minor < min(built):
        raise ValueError(
            f"device: {device} ({torch.cuda.get_device_name(device)}) has compute capability {major}.{minor}, and "
            f"PyTorch {torch.__version__} is built for {min(built) / 10:.1f} and later; install a PyTorch built for "
            f"an older CUDA (pytorch.org/get-started), or set device: cpu"
        )


def pick_precision(name: str, device: torch.device) -> str:
    """For "auto" bf16 on a GPU that computes in it, fp16 on one that does not, else fp32. Warns of what is slow."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # bf16 without emulation
    if name == "auto":
        return ("bf16" if native else "fp16") if device.type == "cuda" else "fp32"
    if name == "bf16" and device.type == "cuda" and not native:
        warn(f"precision: bf16 is emulated on {torch.cuda.get_device_name(device)}, slower than fp32; fp16 is fast")
    if name == "fp16" and device.type == "cpu":
        warn("precision: fp16 is slow on a CPU; fp32 is exact and mostly faster")
    return name


@lru_cache
def warn(message: str) -> None:
    """Print a line to stderr once, however often called."""
    print(f"warning: {message}", file=sys.stderr)


def prepare(
    model: EmotionModel, device: torch.device, precision: str, tf32: bool = False, compiled: bool = False
) -> None:
    """Move what is in memory to its device, frozen matrices in the type in which they are used."""
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32  # PyTorch's default is half and half
    if compiled:
        require_compiler(device)
    if precision != "fp32":
        cast_frozen(model, DTYPES[precision])
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    for layer in model.backbone.layers if compiled else ():
        layer.finish = torch.compile(layer.finish, dynamic=True)


def require_compiler(device: torch.device) -> None:
    """Raise ValueError if `torch.compile` lacks what it calls: Triton for a GPU, a C++ compiler for a CPU."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("compile: true needs Triton on a GPU, which is not installed; pip install triton, or leave it")
    compilers = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise ValueError("compile: true needs a C++ compiler on a CPU, and none was found; install g++, or leave it")


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
    """The GPU's name, or the processor with its vector instructions and the threads in use: every figure names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") if hasattr(torch.cpu, "get_capabilities") else None
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{name or platform.machine()} ({device.type}, {kind}, {torch.get_num_threads()} threads)"


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


# ---------------------------------------------------------------- processes


class Alone:
    """One process: in place of `machine.parallel`, which is there for the several that torchrun starts."""

    start = finish = wait = add_gradients = require_same = staticmethod(lambda *_, **__: None)
    size = staticmethod(lambda: 1)
    rank = staticmethod(lambda: 0)
    name = staticmethod(lambda: "")
    local_rank = staticmethod(lambda: None)
    any_of = largest = staticmethod(lambda value: value)

    @staticmethod
    def share(items: Sequence) -> Sequence:
        """All of a batch."""
        return items

    @staticmethod
    def even(batch: Sequence[int], cost: Sequence[float]) -> Sequence[int]:
        """The batch in its order."""
        return batch

    @staticmethod
    def gather(rows: Tensor, count: int) -> Tensor:
        """The rows `(count, K)` of a whole batch."""
        return rows

    @staticmethod
    def first_alone() -> AbstractContextManager:
        """Nobody to wait for."""
        return nullcontext()


parallel = extra("machine.parallel", "torchrun") if "TORCHELASTIC_RUN_ID" in os.environ else Alone


# ---------------------------------------------------------------- atomic writes: the old file or the new, never half


def first_line(error: Exception) -> str:
    """What an error says in one line, or its type if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a file beside `path`, then move it there: a reader finds the old file or the new one, never half.

    Of several processes only the first writes. Raises OSError; the old file is unharmed then.
    """
    if parallel.rank() > 0:
        return
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises errors of its own for a full disk
        advice = "" if isinstance(error, OSError) else "; is the disk full?"  # its words do not tell
        raise OSError(f"{path}: cannot be written ({first_line(error)}); what was there is unharmed{advice}") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def save(path: Path, value: dict) -> None:
    """A checkpoint."""
    replace(path, lambda file: torch.save(value, file))


def write_text(path: Path, text: str) -> None:
    """A text in UTF-8."""
    replace(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_yaml(path: Path, value: dict) -> None:
    """A mapping as YAML, in its order."""
    write_text(path, yaml.safe_dump(value, sort_keys=False))


def require_space(needed: dict[Path, int]) -> None:
    """Raise OSError if a disk has less room than its caches, by directory, need together."""
    disks: dict[int, list[Path]] = {}
    for directory in needed:
        disks.setdefault(os.stat(directory).st_dev, []).append(directory)
    for directories in disks.values():
        total, free = sum(needed[directory] for directory in directories), shutil.disk_usage(directories[0]).free
        if total > free:
            raise OSError(
                f"cache {', '.join(map(str, directories))}: needs {total / 1e9:.1f} GB, the disk has {free / 1e9:.1f} "
                "GB; free space, or set cache_dir or cache: false"
            )


# ---------------------------------------------------------------- stopping, and one command at a time


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]  # Ctrl-C, and what a cluster sends
STOP_SIGNALS += [signal.SIGBREAK] if sys.platform == "win32" else []  # Windows lets no other process send those two


class Stopped(KeyboardInterrupt):
    """The run ends here, between two batches."""


Watch = Callable[[Iterable], Iterator]  # passes items on, and raises `Stopped` instead of the next


@contextmanager
def watched_signals() -> Iterator[Watch]:
    """Within, the first of STOP_SIGNALS, in any process, lets a `Watch` raise `Stopped`; the second interrupts at once.

    One that comes within a second does not count as the second: torchrun repeats a Ctrl-C to its processes. Outside
    the main thread signals cannot be caught and stay as they are.
    """
    first: list[float] = []

    def note(*_: object) -> None:
        if first and time.monotonic() - first[0] > 1:
            raise KeyboardInterrupt
        first.append(time.monotonic())

    def watch(items: Iterable) -> Iterator:
        for item in items:
            if parallel.any_of(bool(first)):
                raise Stopped
            yield item

    caught = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.signal(number, note) for number in caught}
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a run's directory; of several processes the first does. Raises ValueError if another command holds it.

    The operating system gives up the lock of a process that is killed, on a shared disk as well (NFS by its server).
    """
    if parallel.rank() > 0:
        yield
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = directory.parent / f".{directory.name}"
    lock, holder = FileLock(f"{beside}.lock"), Path(f"{beside}.holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        told = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise ValueError(f"{directory}: {told} is at work there; wait for it, or choose another name=") from None
    except (NotImplementedError, OSError) as error:  # a disk without locks, or one that is read-only
        warn(f"{directory}: cannot be locked ({first_line(error)}); run one command at a time there")
    try:
        with suppress(OSError):
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(f"process {os.getpid()} on {platform.node()}, since {started},", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def memory_advice(at_once: int, tier: str) -> str:
    """What to set after a GPU ran out of memory with this many utterances at once."""
    smaller = f"set micro_batch_size={at_once // 2}, or half of that again" if at_once > 1 else "train fewer layers"
    more = ", or cache_tier=disk" if tier != "disk" else ""
    return f"{smaller}, or gradient_checkpointing=true{more}: the loss stays the same, and the same command continues"
