"""The machine below: which device, in what precision, how much memory, one process or several, and atomic writes."""

import ctypes
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout

from config import extra
from machine.fast import cpu_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU ran out of memory: CUDA or MPS says so, or cuBLAS, which allocates its workspace itself."""
    return any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))


def pick_device(name: str, local_rank: int | None = None, compiled: bool = False) -> torch.device:
    """The device of this name; for "auto" CUDA, then MPS, then the CPU. A CUDA device always has its index.

    Of several processes each takes the GPU with its `local_rank`. Raises ValueError if the device, or torch.compile on
    it if `compiled`, cannot be used.
    """
    mps = local_rank is None and torch.backends.mps.is_available()
    there = [kind for kind, found in (("cuda", torch.cuda.is_available()), ("mps", mps), ("cpu", True)) if found]
    try:
        device = torch.device(there[0] if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"device: {name!r} is not a device; expected auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":  # set_device refuses one without an index
        index = torch.cuda.current_device() if device.index is None and "cuda" in there else device.index or 0
        device = torch.device("cuda", index if local_rank is None else local_rank)
    if device.type not in there or (device.type == "cuda" and device.index >= torch.cuda.device_count()):
        found = f"PyTorch {torch.__version__}; this machine has {', '.join(there)}"
        raise ValueError(f"device: {device} is not there for {found}")
    if device.type == "cuda":
        extra("machine.gpu", f"device: {device}").require_code(device)
    if compiled:
        extra("machine.gpu", "compile: true").require_compiler(device)
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """For "auto" bf16 on a GPU that computes in it, fp16 on one that does not, else fp32. Warns of a slow choice."""
    if device.type == "cuda":
        return extra("machine.gpu", f"device: {device}").pick_precision(name, device)
    if name == "fp16" and device.type == "cpu" and parallel.rank() == 0:
        said = "fp16 is slow on most CPUs, often slower than fp32; set precision: fp32 or auto"
        print(f"warning: precision: {said}", file=sys.stderr)
    return "fp32" if name == "auto" else name


def set_up(device: torch.device, tf32: bool = False) -> None:
    """Let PyTorch work on this device as it works best there."""
    if device.type == "cpu":  # let glibc keep what PyTorch frees: fresh pages take several times as long to write
        with suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing given back
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32  # PyTorch's default is half and half


def device_name(device: torch.device) -> str:
    """A GPU's name; of a CPU the processor, the vector instructions that PyTorch uses, and the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()} ({device.type}, {vectors}, {torch.get_num_threads()} threads)"


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
    any_of = share = staticmethod(lambda value: value)
    even = gather = staticmethod(lambda whole, _: whole)  # a batch in its order; the rows of all of it
    first_alone = staticmethod(nullcontext)


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
    beside = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
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


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """A text in UTF-8."""
    replace(path, lambda file: file.write_text(text, encoding="utf-8", errors=errors))


def write_yaml(path: Path, value: dict) -> None:
    """A mapping as YAML, in its order."""
    write_text(path, yaml.safe_dump(value, sort_keys=False))


def require_space(needed: dict[Path, int]) -> None:
    """Raise OSError if a disk has less room than its caches, by directory, need together."""
    for disk in {os.stat(directory).st_dev for directory in needed}:
        directories = [directory for directory in needed if os.stat(directory).st_dev == disk]
        total, free = sum(needed[directory] for directory in directories), shutil.disk_usage(directories[0]).free
        if total > free:
            names = ", ".join(map(str, directories))
            sizes = f"needs {total / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB"
            raise OSError(f"cache {names}: {sizes}; free space, or set cache_dir or cache: false")


# ---------------------------------------------------------------- stopping, and one command at a time


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]  # Ctrl-C, and what a cluster sends
if sys.platform == "win32":
    STOP_SIGNALS += [signal.SIGBREAK]  # Windows lets no other process send those two


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

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in STOP_SIGNALS if in_main_thread}
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a run's directory; of several processes the first does. Raises ValueError if another command holds it.

    The operating system releases the lock of a killed process, on a shared disk too (on NFS the server does).
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
        told = f"cannot be locked ({first_line(error)}); run one command at a time there"
        print(f"warning: {directory}: {told}", file=sys.stderr)
    with suppress(OSError):
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder.write_text(f"process {os.getpid()} on {platform.node()}, since {since},", encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()
