"""What `machine.fast` promises: every faster form is the clear one, whatever processor is underneath."""

import functools
import math
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from conftest import perturb
from test_model import SMALL, build, packed
from torch import Tensor

import model
from machine import fast, gpu
from machine.fast import Frames

ROOT = Path(__file__).parents[1]


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], gates: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`softmax(q k^T / sqrt(d) + g b) v` in fp64, an utterance at a time."""
    out = []
    gates, bias = (q.new_zeros(len(q), 1), q.new_zeros(1, len(q), len(q))) if bias is None else (gates, bias)
    for *parts, gate in zip(*(x.double().split(lengths) for x in (q, k, v, gates)), strict=True):
        q1, k1, v1 = (part.transpose(0, 1) for part in parts)  # (H, T, d)
        scores = q1 @ k1.transpose(1, 2) / math.sqrt(q1.shape[-1])
        scores = scores + torch.stack([g[:, None] * b[: len(g), : len(g)] for g, b in zip(gate.T, bias, strict=True)])
        out.append((scores.softmax(-1) @ v1).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("attention", [fast.attend, gpu.attend])
def test_attention_is_softmax_attention_of_each_utterance(attention, biased):
    """Values and gradients against the formula, for lengths from one frame up; padded is the one call of a GPU in fp32.

    The bias may be of more frames than the longest utterance has, where others fill up the batch.
    """
    lengths, generator = Frames([1, 7, 1, 64, 2]), torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), 4, 16)] * 3 + ([(sum(lengths), 4), (4, 66, 66)] if biased else [])
    ours = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    out = attention(*ours[:3], lengths, 0.0, tuple(ours[3:]) or None)
    expected = explicit_attention(*theirs[:3], lengths, *theirs[3:])
    assert torch.allclose(out.double(), expected, rtol=0, atol=1e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one.grad.double(), other.grad, rtol=0, atol=1e-5)


def test_unpad_takes_back_what_pad_did():
    lengths = Frames([3, 1, 5])
    x = torch.randn(9, 2, 4)
    padded = gpu.pad(x, lengths)
    assert padded.shape == (3, 5, 2, 4)
    assert padded[0, 3:].count_nonzero() == padded[1, 1:].count_nonzero() == 0
    assert torch.equal(gpu.unpad(padded, lengths), x)


def test_batches_come_in_few_sizes():
    """Never smaller, at most 6% larger; 16 sizes from one power of two to the next; nothing of it in the result."""
    for frames in range(1, 3000):
        assert frames <= fast.round_up(frames) <= frames + frames // 16
    assert len({fast.round_up(frames) for frames in range(2049, 4097)}) == 16
    backbone = build(SMALL)
    seen = []
    backbone.layers[0].register_forward_hook(lambda _, inputs, __: seen.append((len(inputs[0]), inputs[1])))
    x = packed(SMALL, [100, 33])
    assert backbone(x, [100, 33], 0, 1).shape == x.shape
    assert seen == [(136, (100, 33, 3))]


@pytest.mark.parametrize("kernel", [128, 19])
def test_the_positional_convolution_by_spectra_is_the_convolution(kernel):
    """Values and every gradient, for lengths around those of the blocks."""
    config = replace(SMALL, position_kernel=kernel, width=48)
    module = perturb(model.PositionalConvolution(config), 0)
    lengths = Frames([1, 2, 19, 128, 129, 130, 300, 517])
    x = packed(config, lengths).requires_grad_()
    upstream = packed(config, lengths, seed=1)
    tensors = [x, *module.parameters()]
    ours = fast.by_fourier(module.conv, x, lengths)
    found = torch.autograd.grad(ours, tensors, upstream)
    exact = module.double()
    theirs = torch.cat([exact.conv(part.double().T)[:, : len(part)].T for part in x.split(lengths)])
    expected = torch.autograd.grad(theirs, [x, *exact.parameters()], upstream.double())
    assert torch.allclose(ours.double(), theirs, rtol=0, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=0, atol=1e-5 * other.abs().max().item())


def test_the_positional_convolution_of_a_padded_batch_is_that_of_each_utterance():
    """The way it goes on a GPU and in 16 bit."""
    config = replace(SMALL, width=48)
    module = perturb(model.PositionalConvolution(config), 0).double()
    lengths = Frames([1, 130, 40])
    x = packed(config, lengths).double()
    expected = torch.cat([module.conv(part.T)[:, : len(part)].T for part in x.split(lengths)])
    assert torch.allclose(gpu.convolve(module.conv, x, lengths), expected, rtol=0, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_attention_on_a_gpu_is_the_same(dtype):
    """The kernel for packed sequences, forward and backward, to the rounding of 16 bit; dropout goes another way."""
    lengths = Frames([1, 7, 300, 64, 2])
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(sum(lengths), 4, 64, generator=generator).to(dtype) for _ in range(3)]
    reference = [x.double().requires_grad_() for x in qkv]
    expected = explicit_attention(*reference, lengths)
    expected.square().sum().backward()
    inputs = [x.cuda().requires_grad_() for x in qkv]
    out = fast.attend(*inputs, lengths)
    out.float().square().sum().backward()
    assert torch.allclose(out.cpu().double(), expected, rtol=0, atol=2e-2)
    for x, y in zip(inputs, reference, strict=True):
        assert torch.allclose(x.grad.cpu().double(), y.grad, rtol=0, atol=2e-2 * y.grad.abs().max().item())
    dropped = fast.attend(*inputs, lengths, dropout=0.5)
    assert not torch.equal(dropped, fast.attend(*inputs, lengths, dropout=0.5))


KERNELS = [(), fast.PRODUCTS, ("forward",)] if fast.ONEDNN else [()]


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: "+".join(kernels) or "pytorch")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 63, 64, 65, 200, 333])
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True), (True, True, True), (True, False, True)])
def test_a_linear_layer_is_x_w_t_plus_b(rows, needs, gelu, kernels, monkeypatch):
    """Values, and gradients of whatever asks for one, against `F.linear` in fp64, for rows that are not contiguous."""
    monkeypatch.setattr(fast.Kernels, "onednn", kernels)
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias, upstream = (
        torch.randn(*shape, generator=generator) for shape in ((48, rows), (32, 48), (32,), (rows, 32))
    )
    layer = fast.Linear(48, 32)
    layer.weight, layer.bias = (
        torch.nn.Parameter(tensor, requires_grad=need) for tensor, need in ((weight, needs[1]), (bias, needs[2]))
    )
    ours = [x.requires_grad_(needs[0]), layer.weight, layer.bias]
    theirs = [tensor.detach().double().requires_grad_(need) for tensor, need in zip(ours, needs, strict=True)]
    expected = F.linear(F.gelu(theirs[0].T) if gelu else theirs[0].T, *theirs[1:])
    out = layer(x.T, gelu)
    assert torch.allclose(out.double(), expected, rtol=0, atol=1e-5)
    (out * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    for tensor, reference, need in zip(ours, theirs, needs, strict=True):
        assert (tensor.grad is not None) == need
        if need:
            assert torch.allclose(tensor.grad.double(), reference.grad, rtol=1e-5, atol=1e-4)


def test_attention_over_padded_frames_is_that_of_each_utterance():
    """The path for a GPU, which pads and masks, against the one utterance by utterance."""
    x, scores, lengths = torch.randn(9, 8), torch.randn(9, 1), Frames([3, 1, 5])
    expected = fast.weighted_mean(x, scores, lengths)
    padded = gpu.weighted_mean(x, scores, lengths)
    assert torch.allclose(padded, expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- whatever the processor


def test_both_libraries_give_the_same_hidden_states(monkeypatch):
    """To 1e-5, so a figure or a checkpoint of one machine holds on another."""
    backbone, found = build(SMALL), []
    waveforms = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (400, 7331, 16_000)]
    for kernels in KERNELS:
        monkeypatch.setattr(fast.Kernels, "onednn", kernels)
        found.append([x for states in backbone.hidden_states(waveforms) for x in states])
    for other in found[1:]:
        assert all(torch.allclose(one, x, rtol=0, atol=1e-5) for one, x in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: "+".join(kernels) or "pytorch")
def test_an_utterance_alone_is_the_utterance_in_a_batch_with_either_library(kernels, monkeypatch):
    monkeypatch.setattr(fast.Kernels, "onednn", kernels)
    backbone = build(SMALL)
    waveforms = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (400, 7331, 719)]
    together = backbone.hidden_states(waveforms)
    for i, waveform in enumerate(waveforms):
        for alone, batch in zip(backbone.hidden_states([waveform]), together, strict=True):
            assert torch.allclose(alone[0], batch[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("maker", "vectors", "expected"),
    [
        ("amd", "AVX512", fast.PRODUCTS),  # Zen 5: oneDNN is twice as fast
        ("amd", "AVX2", ()),  # Zen 3: MKL is 1.3 times as fast
        ("intel", "AVX512", ("forward",)),  # its gradients are up to three times as fast by MKL
        ("intel", "AVX2", ("forward",)),
        ("", "NEON", ()),  # never measured: what PyTorch chooses
        ("", "DEFAULT", ()),
    ],
)
def test_the_library_follows_from_the_processor(maker, vectors, expected):
    """Nothing is timed, so the same machine gives the same bits."""
    assert fast.BY_ONEDNN.get((maker, vectors), ()) == expected


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("AMD EPYC 9B45", "amd"),
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", "amd"),  # as Windows says it
        ("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", "intel"),
        ("Intel(R) Xeon(R)", "intel"),
        ("QEMU Virtual CPU version 2.5+\nvendor_id : GenuineIntel", "intel"),
        ("Neoverse-N1", ""),
        ("Apple M2", ""),
    ],
)
def test_the_maker_is_read_from_the_processors_name(name, maker, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"model name : {name}")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": ""}, raising=False)
    monkeypatch.setattr(fast, "CPUINFO", tmp_path / "cpuinfo")
    assert fast.processor.__wrapped__()[0] == maker


def test_a_processor_limited_to_avx2_gives_the_same_numbers():
    """In a process that believes in one: the choice follows, and hidden states agree to 1e-5."""
    limit = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    code = "import test_fast; print(*test_fast.choice_and_sizes())"
    variables = {**os.environ, "PYTHONPATH": places, **limit}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert ended.returncode == 0, ended.stderr
    (choice, *sizes), (limited, *others) = choice_and_sizes(), ended.stdout.split()
    assert limited in ("AVX2", choice)
    assert sizes == pytest.approx([float(size) for size in others], abs=1e-5)


def choice_and_sizes() -> list:
    """What the processor is taken for, and the root mean square of each hidden state."""
    wave = torch.sin(torch.arange(9000) / 7) * torch.linspace(0, 1, 9000)
    states = build(SMALL).hidden_states([wave])
    return [fast.processor()[1], *(x[0].double().pow(2).mean().sqrt().item() for x in states)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_positional_convolution_in_16_bit_is_near_that_in_fp32(dtype):
    """With AMX, oneDNN's own grouped convolution in bf16 is wrong by as much as the result is large."""
    module = perturb(model.PositionalConvolution(replace(SMALL, width=64)), 0)
    lengths = Frames([100, 31])
    x = packed(SMALL, list(lengths))
    exact = module(x, lengths)
    with torch.autocast("cpu", dtype), torch.no_grad():
        rounded = module(x.to(dtype), lengths)
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()


# ---------------------------------------------------------------- GPUs of any age


@pytest.mark.parametrize(
    ("flash", "capability", "expected"),
    [(True, (7, 0), False), (True, (7, 5), False), (True, (8, 0), True), (True, (9, 0), True), (False, (9, 0), False)],
)
def test_packed_attention_is_asked_for_only_where_there_is_flash_attention(flash, capability, expected, monkeypatch):
    """Not on V100, T4 and RTX 20, and not on Windows, where the build has none."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gpu.has_flash(torch.device("cuda", 0)) == expected


@pytest.mark.parametrize("lengths", [[100] * 256, [30, 2], [1], [5000], [49] * 511 + [60], [3, 4, 5] * 100])
def test_what_fills_up_a_batch_is_never_longer_than_an_utterance(lengths):
    """Else the padded batch of a GPU would grow with it: rows x10, scores x103 for 256 utterances of 100 frames."""
    x = torch.randn(sum(lengths), 4)
    filled, frames = fast.fill(x, lengths)
    assert len(filled) == sum(frames) == fast.round_up(len(x))
    assert list(frames[: len(lengths)]) == lengths
    assert max(frames) == max(lengths)
    assert torch.equal(filled[: len(x)], x) and not filled[len(x) :].any()


def test_sums_of_the_first_convolutions_statistics_do_not_overflow_in_fp16():
    """Under fp16 autocast the sums of a turn over 20 s would, where the statistics are fp32, as on MPS."""
    encoder = build(SMALL).feature_encoder
    waveform = model.normalize(torch.randn(16_000 * 60, generator=torch.Generator().manual_seed(0)))
    exact = encoder.first_convolution(waveform)
    with torch.autocast("cpu", torch.float16):
        found = encoder.first_convolution(waveform)
    assert all(torch.equal(one, other) for one, other in zip(exact, found, strict=True))


def test_recomputation_repeats_the_random_numbers_where_pytorch_forgets_them(monkeypatch):
    """On MPS `checkpoint` restores no random state: simulated on the CPU by one that is told not to."""
    x = torch.randn(50, 8)

    def gradient(checkpoint) -> torch.Tensor:
        torch.manual_seed(3)
        y = x.clone().requires_grad_()
        checkpoint(lambda z: F.dropout(z.exp(), 0.5, True), y).square().sum().backward()
        return y.grad

    expected = gradient(lambda function, y: function(y))
    lost = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)
    assert not torch.allclose(gradient(lost), expected)
    repeating = functools.partial(lost, context_fn=lambda: gpu.repeated(torch))
    assert torch.allclose(gradient(repeating), expected)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *_, **how: how)
    for kind, repeats in (("mps", True), ("cuda", False), ("cpu", False)):
        how = fast.checkpoint(abs, types.SimpleNamespace(device=torch.device(kind)))
        assert how.get("context_fn") == (gpu.repeated if repeats else None)


@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda"])
def test_only_cuda_copies_without_waiting(kind):
    """MPS would read memory that is freed by then; the copy is then wrong without an error."""

    class Recorder:
        def to(self, device, non_blocking):
            return non_blocking

    assert fast.send(Recorder(), torch.device(kind)) == (kind == "cuda")
