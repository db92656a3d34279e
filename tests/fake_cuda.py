"""The CUDA paths on fake tensors: type, device and hidden waits are checked, nothing is computed.

`python tests/fake_cuda.py LIBRARY FOLDER N` runs every case on the devices that LIBRARY (made of fakecuda.cpp)
pretends, in N processes, which write JSON lines to FOLDER/I.jsonl: a case's name, and what is wrong. It is a process
of its own, as PyTorch cannot unlearn the devices, and imports it, as they must be there before.
"""

import ctypes
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)  # before anything asks PyTorch for CUDA

import numpy as np
import soundfile
import torch
import torch.nn.attention.varlen as varlen
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import bench
import freeze
import model as model_module
import predict
import run
from cache import ActivationCache, Prefix
from config import Config
from machine import hardware
from machine.gpu import OnGPU, pick

machine = SimpleNamespace(capabilities=[(8, 0)], flash=True, packed=0, built=["sm_70", "sm_75", "sm_80", "sm_90"])
ARCHITECTURE = {"conv_channels": (32,) * 7, "width": 64, "heads": 4, "ffn": 128, "layers": 2}
ARCHITECTURE |= {"position_kernel": 16, "position_groups": 4}


def capability(device: object = None) -> tuple[int, int]:
    index = torch.device(device).index if device is not None and not isinstance(device, int) else device
    return machine.capabilities[torch.cuda.current_device() if index is None else index]


def pretend() -> None:
    """Answer what Python asks of CUDA as `machine` says. `set_device` is PyTorch's own and refuses as ever."""
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: len(machine.capabilities)
    cuda.get_device_capability = capability
    cuda.get_device_name = lambda device=None: "a pretended GPU"
    cuda.get_arch_list = lambda: machine.built
    cuda.is_bf16_supported = lambda including_emulation=True: including_emulation or capability()[0] >= 8
    cuda.mem_get_info = lambda device=None: (8 << 30, 16 << 30)
    cuda.max_memory_allocated = lambda device=None: 0
    cuda.synchronize = lambda device=None: None
    places = {"now": 0}
    cuda.current_device = lambda: places["now"]
    torch._C._cuda_setDevice = lambda index: places.update(now=index)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        major=capability(device)[0], minor=capability(device)[1], multi_processor_count=100, total_memory=16 << 30
    )
    torch.backends.cuda.is_flash_attention_available = lambda: machine.flash
    torch.Tensor.__getitem__ = getitem
    set_data = torch.Tensor.data.__set__

    def set_fake(tensor: torch.Tensor, value: torch.Tensor) -> None:
        set_data(tensor, value)
        if isinstance(tensor, FakeTensor):
            tensor.fake_device = value.fake_device

    FakeTensor.data = property(torch.Tensor.data.__get__, set_fake)
    real = varlen.varlen_attn

    def checked(q, k, v, starts, ends, *rest, **options):
        assert machine.flash and capability(q.device)[0] >= 8, "varlen_attn needs FlashAttention and capability 8.0"
        assert q.dtype == k.dtype == v.dtype in (torch.bfloat16, torch.float16), (q.dtype, k.dtype, v.dtype)
        assert starts.dtype == ends.dtype == torch.int32 and starts.device == q.device, (starts.dtype, starts.device)
        machine.packed += 1
        return real(q, k, v, starts, ends, *rest, **options)

    varlen.varlen_attn = checked


def getitem(x: torch.Tensor, key: object) -> torch.Tensor:
    """Indexing of a tensor; PyTorch's own wants a CUDA build for a tensor on CUDA."""
    dim = 0
    for part in key if isinstance(key, tuple) else (key,):
        if part is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif part is Ellipsis:
            dim = x.ndim - sum(other is not None for other in key[key.index(part) + 1 :])
        elif isinstance(part, slice):
            x, dim = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1), dim + 1
        elif isinstance(part, int):
            x = x.select(dim, part)
        else:
            part = torch.as_tensor(part)
            x, dim = torch.ops.aten.index.Tensor(x, [None] * dim + [part]), dim + 1
    return x


class Watch(TorchDispatchMode):
    """Notes what makes the host wait for the GPU: values read, and copies that are not asynchronous."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.strict = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        if name.startswith("aten._local_scalar_dense"):
            if args[0].device.type == "cuda":
                self.note("a value is read from the GPU")
            return 0.0 if args[0].is_floating_point() else 1
        out = func(*args, **kwargs)
        if name.startswith(("aten._to_copy", "aten.copy_")):
            source = args[1] if name.startswith("aten.copy_") else args[0]
            flags = kwargs.get("non_blocking", args[2] if name.startswith("aten.copy_") and len(args) > 2 else False)
            kinds = source.device.type, out.device.type
            if kinds == ("cuda", "cpu"):
                self.note("a copy to the CPU")
            elif kinds == ("cpu", "cuda") and not flags and source.ndim:
                self.note("a copy from the CPU that waits")
        elif name.startswith(("aten.nonzero", "aten.masked_select", "aten.unique")):
            self.note(f"{name} waits for its size")
        return out

    def note(self, what: str) -> None:
        if self.strict:
            lines = [
                f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}"
                for f in traceback.extract_stack()
                if "torch" not in f.filename
            ]
            self.waits.append(f"{what} at {' < '.join(reversed(lines[-6:-2]))}")

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        self.strict = True
        try:
            yield
        finally:
            self.strict = False
        assert not self.waits, self.waits


METHODS = {
    "full": {"trainable_layers": "all"},
    "full_microbatches": {"trainable_layers": "all", "micro_batch_size": 2},
    "full_checkpointing": {"trainable_layers": "all", "gradient_checkpointing": True},
    "partial": {"trainable_layers": 2},
    "heads": {"trainable_layers": 0, "pooling": "mean_std"},
    "layers": {"trainable_layers": 0, "pooling": "layers"},
    "attentive": {"trainable_layers": 2, "pooling": "attentive"},
    "lora": {"trainable_layers": 0, "lora_rank": 4, "lora_targets": ("q", "v", "fc1")},
    "attention_dropout": {"trainable_layers": 2, "attention_dropout": 0.1},
    "wavlm": {"trainable_layers": 2, "backbone_kind": {"relative_buckets": 16}},
    "pre_norm": {"trainable_layers": 2, "backbone_kind": {"pre_norm": True, "conv_norm": "layer", "conv_bias": True}},
}


def build(config: Config, kind: dict) -> model_module.EmotionModel:
    dropouts = {key: getattr(config, key) for key in run.REGULARISATION}
    backbone = model_module.Wav2Vec2(model_module.Wav2Vec2Config(**{**ARCHITECTURE, **dropouts, **kind}))
    return run.assemble(config, backbone, (1.0, 7.0))


def path_of_training(paths: list[str], device: str, precision: str, method: str) -> None:
    """pick_device, pick_precision, prepare, prefix, step, evaluate and predict, as the commands call them."""
    keys = dict(METHODS[method])
    kind = keys.pop("backbone_kind", {})
    config = Config(device=device, precision=precision, mask_time_prob=0.0, **keys)
    watch = Watch()
    device = hardware.pick_device(config.device)
    precision = hardware.pick_precision(config.precision, device)
    dtype = hardware.DTYPES[precision]
    machine.packed = 0
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        model = build(config, kind)
        prefix = Prefix(model, paths, device, dtype, at_once=config.micro_batch_size)
        run.prepare(model, device, precision)
        assert {p.device for p in model.parameters()} == {device}, {p.device for p in model.parameters()}
        optimizer = run.make_optimizer(model, 1e-4, 1e-3, 0.01)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        freeze.train_mode(model, prefix.depth)
        labels = torch.rand(len(paths), 2, device=device)
        how = {"depth": prefix.depth, "optimizer": optimizer, "scaler": scaler, "dtype": dtype}
        how |= {"micro_batch_size": config.micro_batch_size}
        for x, lengths in prefix([range(len(paths))]):
            assert x.device == device and x.dtype == torch.float32, (x.device, x.dtype)
            for number in range(2):  # the second has optimizer state and all that is computed once
                watch.strict = number == 1
                loss, predictions = run.step(model, x, lengths, labels, **how)
            watch.strict = False
            assert not watch.waits, watch.waits
            assert loss.device == predictions.device == device, (loss.device, predictions.device)
            assert loss.dtype == predictions.dtype == torch.float32, (loss.dtype, predictions.dtype)
        with torch.no_grad():
            assert run.evaluate(model, prefix, range(len(paths)), 2).device.type == "cpu"
        waveform = torch.zeros(16_000)
        windows = iter([predict.Window(0, Path("a.wav"), waveform, 0, 16_000)])
        assert len(list(predict.predict(model, windows, 8, precision))) == 1
    able = machine.flash and machine.capabilities[device.index][0] >= 8 and precision != "fp32"
    expected = able and method not in ("attention_dropout", "wavlm")
    assert bool(machine.packed) == expected or method == "attention_dropout", (machine.packed, expected)


def path_of_tier(paths: list[str], folder: Path, kind: str, tier: str) -> None:
    """A cache that is whole, kept on the GPU: its second reading copies nothing."""
    device = hardware.pick_device("auto")
    cache = ActivationCache(folder, {"of": f"{kind} {tier}"}, paths, 64, getattr(torch, kind))
    lengths = [49, 28, 71]
    cache.write(range(3), torch.randn(sum(lengths), 64), lengths)
    watch, read = Watch(), cache.read_stored

    def read_really(numbers):  # from the files, which the mode would fake too
        with _disable_current_modes():
            return read(numbers)

    cache.read_stored = read_really
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        reader = pick(tier, cache, device)
        assert isinstance(reader, OnGPU), "it fits into 8 GiB"
        for number in range(2):
            watch.strict = number == 1
            x, found = reader.read([2, 0], device)
            watch.strict = False
            expected = torch.float32 if kind == "int8" else getattr(torch, kind)
            assert (x.device, x.dtype, tuple(x.shape), found) == (device, expected, (71 + 49, 64), [71, 49])
        assert not watch.waits, watch.waits
    cache.close()


def path_of_bench(paths: list[str], folder: Path, precision: str, method: str) -> None:
    """What a worker of bench.py answers to, in both phases."""
    config = Config(device="auto", precision=precision, **METHODS[method])
    bench.run.build_model = lambda config, label_range: (build(config, {}), {"sha256": "0"})
    with FakeTensorMode(allow_non_fake_inputs=True), Watch():
        for phase, names in {"infer": ["infer"], "step": ["step", "read"]}.items():
            actions, parameters = bench.ours(config, phase, folder, paths)
            assert {parameter.device.type for parameter in parameters} == {"cuda"}
            for name in names * 2:
                actions[name]()


def cases(paths: list[str], folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    def case(capabilities, flash, device, precision, method):
        machine.capabilities, machine.flash = capabilities, flash
        torch.cuda.set_device(0)
        path_of_training(paths, device, precision, method)

    for precision in ("fp32", "bf16", "fp16"):
        for method in METHODS if precision != "fp16" else ("full", "lora"):
            yield f"9.0 {precision} {method}", lambda p=precision, m=method: case([(9, 0)], True, "auto", p, m)
        for device in ("cuda:0", "cuda:1"):
            yield (
                f"two {device} {precision}",
                lambda d=device, p=precision: case([(7, 0), (8, 0)], True, d, p, "partial"),
            )
    for kind in ("float16", "float32", "int8"):
        for tier in ("gpu", "auto"):
            yield f"tier {tier} of {kind}", lambda k=kind, t=tier: path_of_tier(paths, folder, k, t)
    for precision in ("fp32", "bf16", "fp16"):
        for method in ("full", "lora"):
            yield f"bench {precision} {method}", lambda p=precision, m=method: path_of_bench(paths, folder, p, m)
    for capability in ((7, 0), (7, 5), (8, 0), (9, 0)):
        for flash in (True, False):
            for precision in ("auto", "bf16", "fp16"):
                name = f"{capability} {'flash' if flash else 'no flash'} {precision} lora"
                yield name, lambda c=capability, f=flash, p=precision: case([c], f, "cuda", p, "lora")


def main() -> None:
    folder, paths = Path(sys.argv[2]), []
    for number, samples in enumerate((16_000, 9_000, 23_000)):
        paths.append(str(folder / f"{number}.wav"))
        soundfile.write(paths[-1], 0.1 * np.random.default_rng(number).standard_normal(samples), 16_000)
    pretend()
    count = int(sys.argv[3])
    children = [child for number in range(count) if (child := fork_to(work, number, count, paths, folder))]
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))


def fork_to(function: Callable[..., None], *given: object) -> int:
    """The id of a process that does this and ends; nothing is imported twice."""
    if child := os.fork():
        return child
    status = 1
    try:
        function(*given)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def work(number: int, count: int, paths: list[str], folder: Path) -> None:
    """Every `count`-th case from this one on."""
    with open(folder / f"{number}.jsonl", "w", encoding="utf-8") as file:
        for name, case in itertools.islice(cases(paths, folder), number, None, count):
            error = None
            try:
                case()
            except Exception as problem:
                error = f"{type(problem).__name__}: {str(problem)[:600]}"
            print(json.dumps({"case": name, "error": error}), file=file, flush=True)


if __name__ == "__main__":
    main()
