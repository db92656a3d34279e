"""The same mathematics, faster: each form here equals a clear one, to which a test holds it.

This is the only file that calls operators which PyTorch does not document.
"""

import platform
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from config import extra

# ---------------------------------------------------------------- matrix products on a CPU

MAKERS = {"amd": "amd ", "intel": "intel"}  # by a word of the processor's name; Windows says AuthenticAMD
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # as in all builds for x86
CPUINFO = Path("/proc/cpuinfo")  # on Linux
PRODUCTS = ("forward", "input gradient", "weight gradient")
# Which of them oneDNN computes. GFLOP/s of PyTorch's choice (MKL) / oneDNN for 2,016 rows and 768 x 3072, two cores:
# AMD Zen 5 (AVX-512) 180 / 400 throughout; Zen 4 (AVX-512) 182 / 210, 196 / 215, 197 / 197; Zen 3 (AVX2) 117 / 79,
# 121 / 80, 142 / 67; Intel Sapphire Rapids 130 / 142, 147 / 68, 132 / 50, and limited to AVX2 85 / 92, 95 / 15,
# 93 / 16. Where nothing was measured: none.
BY_ONEDNN = {("amd", "AVX512"): PRODUCTS, ("intel", "AVX512"): ("forward",), ("intel", "AVX2"): ("forward",)}


def cpu_name() -> str:
    """What this machine calls its processor."""
    names = re.findall(r"model name\s*: (.+)", CPUINFO.read_text()) if CPUINFO.is_file() else []
    if hasattr(torch.cpu, "get_capabilities"):  # not in every build
        names.append(torch.cpu.get_capabilities().get("cpu_name"))
    return next(filter(None, [*names, platform.processor()]), platform.machine())


@lru_cache
def processor() -> tuple[str, str]:
    """Maker ("amd", "intel" or "") and the vector instructions that PyTorch uses, e.g. "AVX2"."""
    told = f"{cpu_name()} {CPUINFO.read_text() if CPUINFO.is_file() else ''}".lower()  # its vendor too
    maker = next((maker for maker, word in MAKERS.items() if word in told), "")
    return maker, torch.backends.cpu.get_cpu_capability()


class Kernels:
    """Which products oneDNN computes in fp32 on this CPU; the same on the same machine. Tests and `bench.py` set it."""

    onednn: tuple[str, ...] = BY_ONEDNN.get(processor(), ()) if ONEDNN else ()

    @classmethod
    def describe(cls, device: torch.device) -> str:
        """For the log: which library multiplies matrices."""
        if device.type != "cpu":
            return "PyTorch's own products"
        if cls.onednn in ((), PRODUCTS):
            return "products by oneDNN" if cls.onednn else "PyTorch's own products"
        return f"PyTorch's own products, {' and '.join(cls.onednn)} by oneDNN"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """`x W^T + b` for rows `(N, in)`, or for their GELU: `F.linear(F.gelu(x) if gelu else x, weight, bias)`."""
    fp32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if fp32_on_cpu and not torch.compiler.is_compiling():
        return Product.apply(x, weight, bias, gelu)
    return F.linear(F.gelu(x) if gelu else x, weight, bias)


class Product(torch.autograd.Function):
    """`linear` in fp32 on a CPU. It keeps only what a gradient needs: of `GELU(x)` that is x, as GELU needs it too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        ctx.gelu = gelu
        ctx.save_for_backward(x if gelu or ctx.needs_input_grad[1] else None, weight)
        return rows_times(F.gelu(x) if gelu else x, weight.T, bias, "forward" in Kernels.onednn)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias, as far as they are needed."""
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if for_weight:
            rows = F.gelu(x) if ctx.gelu else x
            if "weight gradient" in Kernels.onednn:
                blocked = (y.contiguous().to_mkldnn() for y in (grad, rows))
                grad_weight, _ = torch.ops.aten.mkldnn_linear_backward_weights(*blocked, weight, False)
            else:
                grad_weight = grad.T @ rows
        if for_x:
            grad_x = rows_times(grad, weight, None, "input gradient" in Kernels.onednn)
            if ctx.gelu:
                torch.ops.aten.gelu_backward.grad_input(grad_x, x, grad_input=grad_x)  # in place
        return grad_x, grad_weight, grad.sum(0) if for_bias else None, None


def rows_times(x: Tensor, matrix: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """Rows `(N, in)` times a matrix `(in, out)`, plus a bias `(out,)`."""
    if not onednn:
        return x @ matrix if bias is None else torch.addmm(bias, x, matrix)
    if len(x) == 1:  # alone, oneDNN adds up in another order, and an utterance would depend on its batch
        return rows_times(x.expand(2, -1), matrix, bias, onednn)[:1]
    return torch.ops.mkldnn._linear_pointwise(x, matrix.T, bias, "none", [], "")


def gelu_(x: Tensor) -> Tensor:
    """`F.gelu` in place."""
    return torch.ops.aten.gelu_(x)


class Linear(nn.Linear):
    """`nn.Linear` over rows `(N, in)`, through `linear`."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """`(N, in)` -> `(N, out)`, of x or of its GELU."""
        return linear(x, self.weight, self.bias, gelu)


# ---------------------------------------------------------------- random numbers


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zero elements at random and scale up the rest, as `F.dropout`; on a CPU from 16 random bits for each element.

    There `F.dropout` draws a number for each on one core and keeps its mask in fp32: a tenth of a full step.
    """
    if not training or not 0 < probability < 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, probability, training)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    dropped = min(round(probability * 2**16), 2**16 - 1)  # of the 2^16 values
    keep = (bits.view(torch.int16)[: x.numel()] >= dropped - 2**15).view_as(x)
    return (x * keep).mul_(2**16 / (2**16 - dropped))


def span_mask(size: int, probability: float, length: int) -> Tensor:
    """Boolean `(size,)`, true in random spans of `length` that would cover `probability` of it without overlap."""
    length = min(length, size)
    count = int(probability * size / length + torch.rand(()).item())  # rounded up or down at random
    starts = torch.randint(size - length + 1, (count,))
    mask = torch.zeros(size, dtype=torch.bool)
    mask[(starts[:, None] + torch.arange(length)).flatten()] = True
    return mask


def checkpoint(function: Callable, x: Tensor, *arguments: object) -> Tensor:
    """`function(x, ...)`, computed again in the backward pass with the same random numbers, on every device."""
    how = {"context_fn": for_gpu().repeated} if x.device.type == "mps" else {}
    return torch.utils.checkpoint.checkpoint(function, x, *arguments, use_reentrant=False, **how)


# ---------------------------------------------------------------- packed frames


class Frames(tuple[int, ...]):
    """The lengths of a batch's utterances. Where their frames lie is computed once for the batch, on its device."""

    def offsets(self, device: torch.device) -> Tensor:
        """Where utterances begin and end among the packed frames: int32 `(B + 1,)`."""
        return self.once("_offsets", lambda: torch.tensor([0, *self]).cumsum(0).int(), device)

    def once(self, name: str, compute: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What `compute` gives, on the device, kept under this name."""
        if name not in self.__dict__ or self.__dict__[name].device != device:
            self.__dict__[name] = send(compute(), device)
        return self.__dict__[name]


def for_gpu() -> ModuleType:
    """The forms for a GPU, which only a GPU needs."""
    return extra("machine.gpu", "device: a GPU")


def send(x: Tensor, device: torch.device) -> Tensor:
    """To the device; without waiting on CUDA alone, as MPS would read memory that is freed by then (pytorch#139550)."""
    return x.to(device, non_blocking=device.type == "cuda")


def round_up(frames: int) -> int:
    """The next number of four binary digits and zeros: at most 6% more."""
    unit = 1 << max(frames.bit_length() - 5, 0)
    return -(-frames // unit) * unit


def fill(x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Frames]:
    """A batch filled up to `round_up` of its frames with utterances of zeros that nobody sees, none the longest.

    oneDNN prepares its kernels, and memory is cut into blocks, for each size anew: where sizes come back, a CPU trains
    a sixth faster and in less memory.
    """
    filler, longest = round_up(len(x)) - len(x), max(lengths)
    if not filler:
        return x, Frames(lengths)
    pieces = [longest] * (filler // longest) + ([filler % longest] if filler % longest else [])
    return torch.cat([x, x.new_zeros(filler, x.shape[1])]), Frames([*lengths, *pieces])


# ---------------------------------------------------------------- what stays inside an utterance


def convolve(conv: nn.Conv1d, x: Tensor, frames: Frames) -> Tensor:
    """The positional convolution of each utterance alone, zeros around it, `(N, D)` -> `(N, D)`.

    For an utterance that is `conv(part.T).T[: len(part)]`: an even kernel yields one frame too many. On a CPU always by
    Fourier: in half the time, and oneDNN's grouped convolution in bf16 is wrong where there is AMX (2.13).
    """
    if x.device.type != "cpu":
        return for_gpu().convolve(conv, x, frames)
    with torch.autocast("cpu", enabled=False):
        return by_fourier(conv, x.float(), frames)


def by_fourier(conv: nn.Conv1d, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The convolution as products of spectra in fp32, block by block (overlap-save).

    Of a block of S frames `S - kernel + 1` results are untouched by its cyclic ends; blocks overlap by the rest.
    """
    assert conv.bias is not None
    kernel, groups = conv.kernel_size[0], conv.groups
    size = 2 * kernel
    hop = size - kernel + 1
    counts = [-(-n // hop) for n in lengths]
    padded = [
        F.pad(part, (0, 0, kernel // 2, count * hop - len(part) + kernel - 1 - kernel // 2))
        for part, count in zip(x.split(list(lengths)), counts, strict=True)
    ]
    blocks = torch.cat([part.unfold(0, size, hop) for part in padded])  # (M, D, S)
    spectra = torch.fft.rfft(blocks).unflatten(1, (groups, -1)).permute(3, 1, 0, 2)  # (S/2+1, groups, M, in)
    weight = torch.fft.rfft(conv.weight.float(), size).conj().unflatten(0, (groups, -1)).permute(3, 0, 2, 1)
    y = torch.fft.irfft((spectra @ weight).permute(2, 1, 3, 0), size)[..., :hop]  # (M, groups, out, hop)
    y = y.flatten(1, 2).mT.split(counts)  # (M, hop, D)
    return torch.cat([part.flatten(0, 1)[:n] for part, n in zip(y, lengths, strict=True)]) + conv.bias.float()


Bias = tuple[Tensor, Tensor]  # gates `(N, H)`, and what they multiply `(H, T, T)`, T frames of the longest or more


def attend(q: Tensor, k: Tensor, v: Tensor, frames: Frames, dropout: float = 0.0, bias: Bias | None = None) -> Tensor:
    """Softmax attention of packed `(N, H, D/H)` within each utterance; the bias is added to the scores."""
    return (attend_each if q.device.type == "cpu" else for_gpu().attend)(q, k, v, frames, dropout, bias)


def attend_each(q: Tensor, k: Tensor, v: Tensor, frames: Frames, dropout: float, bias: Bias | None) -> Tensor:
    """`attend`, utterance by utterance: the clear form, and on a CPU the fast one."""
    lengths, out = list(frames), []
    masks: Iterable[Tensor | None] = [None] * len(lengths)
    if bias is not None:
        masks = (gated(gate[None], bias[1]) for gate in bias[0].split(lengths))
    for *parts, mask in zip(*(x.split(lengths) for x in (q, k, v)), masks, strict=True):
        one_q, one_k, one_v = (part.transpose(0, 1)[None] for part in parts)  # (T, H, D/H) -> (1, H, T, D/H)
        out.append(F.scaled_dot_product_attention(one_q, one_k, one_v, mask, dropout)[0].transpose(0, 1))
    return torch.cat(out)


def gated(gates: Tensor, bias: Tensor) -> Tensor:
    """What is added to the scores `(B, H, T, T)`: gates `(B, T, H)` of each query times the bias, cut to T frames."""
    frames = gates.shape[1]
    return gates.mT[..., None] * bias[:, :frames, :frames]


def mean(x: Tensor, frames: Frames) -> Tensor:
    """Mean over each utterance's frames in fp32, `(N, D)` -> `(B, D)`."""
    if x.device.type != "cpu":
        return for_gpu().mean(x, frames)
    return torch.stack([part.float().mean(0) for part in x.split(list(frames))])


def weighted_mean(x: Tensor, scores: Tensor, frames: Frames) -> Tensor:
    """The same, weighted by the softmax of scores `(N, 1)` over an utterance."""
    if x.device.type != "cpu":
        return for_gpu().weighted_mean(x, scores, frames)
    parts = zip(x.split(list(frames)), scores.split(list(frames)), strict=True)
    return torch.stack([(part.float() * score.softmax(0)).sum(0) for part, score in parts])
