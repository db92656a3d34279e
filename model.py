"""Wav2Vec 2.0, and the emotion model on top of it, without padding; HuBERT and WavLM are of the same architecture.

A batch is its utterances' frames one after the other, `(N, D)`, and their `lengths`. Whatever mixes frames
(convolutions, normalisation over time, attention, pooling) stays inside an utterance, so an utterance's output does not
depend on its batch; everything else, 94% of the work, is a matrix product over one dense block of frames.

Shape legend: B utterances, S samples, T frames of one utterance, N frames of the whole batch, C channels of the feature
encoder, D width of the transformer, H heads, K targets.

Hidden states have the numbers that `output_hidden_states=True` gives them in transformers: 0 is the input of layer 0, i
the output of layer i-1, L the final output. In addition -1 is the output of the feature encoder and L+1 the pooled
utterance. Such a number is called a *depth*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import extra
from machine import fast
from machine.audio import resample
from machine.fast import Frames, Linear, dropout

HOP = 320  # samples from one frame to the next: the product of the strides
FIELD = 400  # samples that one frame sees


@dataclass(frozen=True)
class Wav2Vec2Config:
    """Architecture (the defaults are wav2vec2-base) and, below it, the regularisation of what trains."""

    conv_channels: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_norm: str = "group"  # "group": over time, after the first convolution only. "layer": after each
    conv_bias: bool = False
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    pre_norm: bool = False
    position_kernel: int = 128
    position_groups: int = 16
    norm_eps: float = 1e-5
    relative_buckets: int = 0  # of distances between frames, each with a bias for attention: WavLM. 0: no bias
    relative_distance: int = 800  # frames, from which on all distances share a bucket
    projection_norm: bool = True  # a LayerNorm before the projection; DistilHuBERT has none
    normalize_waveform: bool = True  # what the checkpoint was trained on: zero mean, unit variance

    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    projection_dropout: float = 0.0
    layer_drop: float = 0.0
    mask_time_prob: float = 0.0  # SpecAugment: share of frames replaced by the mask embedding
    mask_time_length: int = 10
    mask_feature_prob: float = 0.0  # share of channels set to zero
    mask_feature_length: int = 64


class FeatureEncoder(nn.Module):
    """Waveforms to 50 frames a second: seven convolutions, never with a gradient.

    A frame depends on 400 samples, so an utterance is worked through in pieces that stay in the processor's cache. The
    one thing that looks further is the group kind's normalisation over time; its statistics are computed beforehand.
    """

    def __init__(self, config: Wav2Vec2Config):
        super().__init__()
        channels, self.group_norm = config.conv_channels, config.conv_norm == "group"
        self.kernels, self.strides = config.conv_kernels, config.conv_strides
        sizes = zip((1, *channels), channels, self.kernels, self.strides, strict=False)  # in, out, kernel, stride
        convs = nn.ModuleList(nn.Conv1d(*each, bias=config.conv_bias) for each in sizes)
        norms = nn.ModuleList(map(nn.LayerNorm, channels[:1] if self.group_norm else channels))  # eps: always 1e-5
        self.convs, self.norms = cast(Sequence[nn.Conv1d], convs), cast(Sequence[nn.LayerNorm], norms)

    @torch.no_grad()
    def forward(self, waveforms: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Waveforms `(S,)` each -> packed features `(N, C)` and the number of frames of each."""
        rows = [conv.weight.mT.flatten(1) for conv in self.convs]  # (C, kernel in): a convolution is linear in windows
        frames = [self.encode(waveform, rows) for waveform in waveforms]
        return torch.cat(frames), [len(x) for x in frames]

    def encode(self, waveform: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """One waveform `(S,)` -> `(T, C)`, `T = (S - 400) // 320 + 1`."""
        if len(waveform) < FIELD:
            raise ValueError(f"waveform of {len(waveform)} samples: one frame needs {FIELD}")
        count = (len(waveform) - FIELD) // HOP + 1
        piece = 50 if waveform.device.type == "cpu" else 10_000  # frames
        first, bias = self.first_convolution(waveform)
        out = []
        rounded = -(-count // 10) * 10  # few sizes, as in `fast.fill`
        waveform = F.pad(waveform, (0, max((rounded - 1) * HOP + FIELD - len(waveform), 0)))
        for start in range(0, count, piece):
            x = waveform[start * HOP : (min(start + piece, rounded) - 1) * HOP + FIELD]
            for i, conv in enumerate(self.convs):
                x = fast.linear(self.windows(x, i), rows[i] if i else first, conv.bias if i else bias)
                x = fast.gelu_(x if self.group_norm else self.norms[i](x))
            out.append(x)
        return torch.cat(out)[:count]

    def windows(self, x: Tensor, i: int) -> Tensor:
        """What each output of convolution i sees of rows `(T, in)`: `(T', kernel in)`."""
        inputs = self.convs[i].in_channels
        return x.flatten().unfold(0, self.kernels[i] * inputs, self.strides[i] * inputs)

    def first_convolution(self, waveform: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight `(C, kernel)` and bias `(C,)`, in the group kind with the normalisation folded in.

        A channel is `w.s` over windows s of the waveform, so its mean over time is `w.mean(s)` and its
        variance `w^T cov(s) w`. A bias of the convolution would cancel.
        """
        conv, norm = self.convs[0], self.norms[0]
        if not self.group_norm:
            return conv.weight[:, 0], conv.bias
        exact = torch.float32 if waveform.device.type == "mps" else torch.float64  # MPS has no other
        with torch.autocast(waveform.device.type, enabled=False):  # sums over 20 s would overflow in fp16
            s, w = self.windows(waveform, 0).to(exact), conv.weight[:, 0].to(exact)  # (T, kernel), (C, kernel)
            mean = s.mean(0)
            s = s - mean
            variance = (w @ (s.T @ s / len(s)) * w).sum(1)
            scale = norm.weight / torch.sqrt(variance + norm.eps)
            return (w * scale[:, None]).float(), (norm.bias - w @ mean * scale).float()


class FeatureProjection(nn.Module):
    """Features `(N, C)` to the width of the transformer `(N, D)`, with masking in training."""

    def __init__(self, config: Wav2Vec2Config):
        super().__init__()
        self.config = config
        channels = config.conv_channels[-1]
        self.norm = nn.LayerNorm(channels, eps=config.norm_eps) if config.projection_norm else nn.Identity()
        self.linear = Linear(channels, config.width)
        self.mask_embedding = nn.Parameter(torch.zeros(config.width))

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        c = self.config
        x = dropout(self.linear(self.norm(x)), c.projection_dropout, self.training)
        if self.training and c.mask_time_prob > 0:
            masked = torch.cat([fast.span_mask(n, c.mask_time_prob, c.mask_time_length) for n in lengths])
            x = torch.where(masked.to(x.device)[:, None], self.mask_embedding.to(x.dtype), x)
        if self.training and c.mask_feature_prob > 0:
            rows = [fast.span_mask(c.width, c.mask_feature_prob, c.mask_feature_length).expand(n, -1) for n in lengths]
            x = x.masked_fill(torch.cat(rows).to(x.device), 0)
        return x


class PositionalConvolution(nn.Module):
    """Adds to each frame a grouped convolution over the 128 frames around it, zeros outside the utterance."""

    def __init__(self, config: Wav2Vec2Config):
        super().__init__()
        c, padding = config, config.position_kernel // 2
        self.conv = nn.Conv1d(c.width, c.width, c.position_kernel, padding=padding, groups=c.position_groups)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """`(N, D)` -> `(N, D)`."""
        return x + F.gelu(fast.convolve(self.conv, x, frames))


class Attention(nn.Module):
    """Multi-head self-attention within each utterance."""

    def __init__(self, config: Wav2Vec2Config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.q, self.k, self.v, self.o = (Linear(config.width, config.width) for _ in range(4))

    def forward(self, x: Tensor, frames: Frames, bias: fast.Bias | None = None) -> Tensor:
        """`(N, D)` -> `(N, D)`; only WavLM has a bias."""
        q, k, v = (project(x).unflatten(1, (self.heads, -1)) for project in (self.q, self.k, self.v))  # (N, H, D/H)
        return self.o(fast.attend(q, k, v, frames, self.dropout if self.training else 0.0, bias).flatten(1))


def wavlm() -> Any:
    """What WavLM has beyond Wav2Vec 2.0."""
    return extra("formats.wavlm", "backbone: a WavLM")


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: Wav2Vec2Config):
        super().__init__()
        self.dropout = config.activation_dropout
        self.fc1 = Linear(config.width, config.ffn)
        self.fc2 = Linear(config.ffn, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.training and self.dropout > 0:
            return self.fc2(dropout(F.gelu(x), self.dropout, True))
        return self.fc2(x, gelu=True)


class Layer(nn.Module):
    """Transformer layer, normalised before each half (the large models since lv60) or after (base)."""

    def __init__(self, config: Wav2Vec2Config):
        super().__init__()
        self.pre_norm, self.dropout = config.pre_norm, config.hidden_dropout
        self.attention = (wavlm().GatedAttention if config.relative_buckets else Attention)(config)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x: Tensor, frames: Frames, bias: Tensor | None = None) -> Tensor:
        """`(N, D)` -> `(N, D)`; `bias` is for attention."""
        return self.finish(x, self.attention(self.attention_norm(x) if self.pre_norm else x, frames, bias))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """All after attention, where no frame sees another: what `compile` compiles, once for every length."""
        x = x + dropout(attended, self.dropout, self.training)
        if self.pre_norm:
            return x + dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)
        x = self.attention_norm(x)
        return self.feed_forward_norm(x + dropout(self.feed_forward(x), self.dropout, self.training))


class Wav2Vec2(nn.Module):
    """The backbone: feature encoder, projection, positional convolution, transformer layers."""

    def __init__(self, config: Wav2Vec2Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.feature_encoder = FeatureEncoder(config)
        self.projection = FeatureProjection(config)
        self.position = PositionalConvolution(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)  # before the layers, or after them if pre-norm
        if config.relative_buckets:  # one for all layers, so it belongs to none
            self.relative_bias = wavlm().RelativeBias(config)

    def forward(self, x: Tensor, lengths: Sequence[int], first: int = -1, last: int | None = None) -> Tensor:
        """From packed hidden state `first` to hidden state `last` (the final output if None).

        `x` is `(N, C)` for `first = -1`, else `(N, D)`; so is the result for `last`.
        """
        c, count = self.config, len(x)
        last = c.layers if last is None else last
        x, frames = fast.fill(x, lengths)
        if first < 0 <= last:
            x = self.position(self.projection(x, frames), frames)
            x = dropout(x if c.pre_norm else self.norm(x), c.hidden_dropout, self.projection.training)
        layers = self.layers[max(first, 0) : max(last, 0)]
        bias = self.relative_bias(max(frames)) if c.relative_buckets and len(layers) else None
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in layers:
            if layer.training and c.layer_drop > 0 and torch.rand(()) < c.layer_drop:
                continue
            x = fast.checkpoint(layer, x, frames, bias) if recompute else layer(x, frames, bias)
        return (self.norm(x) if c.pre_norm and first < last == c.layers else x)[:count]

    def before(self, depth: int) -> list[nn.Module]:
        """The modules that only lead up to hidden state `depth`."""
        c = self.config
        embedding = [self.projection, self.position, *([] if c.pre_norm else [self.norm])] if depth >= 0 else []
        final: list[nn.Module] = [self.norm] if c.pre_norm and depth >= c.layers else []
        final += [self.relative_bias] if c.relative_buckets and depth >= c.layers else []
        return [self.feature_encoder, *embedding, *self.layers[: max(depth, 0)], *final]

    @torch.no_grad()
    def hidden_states(self, waveforms: Sequence[Tensor]) -> list[list[Tensor]]:
        """Every hidden state of every utterance: `L + 1` lists of B tensors `(T, D)`.

        Waveforms are `(S,)`, 16 kHz, used as they are.
        """
        x, lengths = self.feature_encoder(waveforms)
        states = []
        for depth in range(self.config.layers + 1):
            x = self(x, lengths, depth - 1, depth)
            states.append(list(x.split(lengths)))
        return states


class EmotionModel(nn.Module):
    """Backbone, pooling over the frames, and a head that predicts all targets.

    Pooling "mean" takes the mean over the frames, "mean_std" their standard deviation as well, "attentive" a mean with
    weights that a learnt linear map of each frame decides, "layers" the mean of a sum of all hidden states with learnt
    weights, for a backbone in which nothing trains. The head has one hidden layer, or none for `head_width` 0. It works
    on labels scaled to 0..1; `label_range` is their range in the corpus.
    """

    def __init__(
        self,
        backbone: Wav2Vec2,
        targets: Sequence[str],
        label_range: tuple[float, float],
        head_width: int = 256,
        head_dropout: float = 0.0,
        pooling: str = "mean",
    ):
        super().__init__()
        self.backbone, self.targets, self.label_range = backbone, tuple(targets), tuple(label_range)
        self.pooling, width, layers = pooling, backbone.config.width, backbone.config.layers
        self.deepest = layers if pooling == "attentive" else layers + 1  # depth that can come out of a frozen backbone
        if pooling == "attentive":
            self.score = nn.Linear(width, 1, bias=False)  # a softmax knows no offset
            nn.init.zeros_(self.score.weight)  # training starts at the mean
        if pooling == "layers":
            self.layer_weights = nn.Parameter(torch.zeros(layers + 1))  # before a softmax
        inputs = 2 * width if pooling == "mean_std" else width
        hidden = [nn.Linear(inputs, head_width), nn.GELU(), nn.Dropout(head_dropout)] if head_width else []
        last = nn.Linear(head_width or inputs, len(targets))
        nn.init.constant_(last.bias, 0.5)  # the middle of the range
        self.head = nn.Sequential(*hidden, last)

    @torch.no_grad()
    def encode(self, waveforms: Sequence[Tensor], depth: int) -> tuple[Tensor, list[int]]:
        """Waveforms `(S,)` each, 16 kHz -> packed hidden state `depth` and its lengths.

        At depth L+1 the result is the pooled utterances, packed too: a row `(D,)` each, two with "mean_std", one for
        each hidden state with "layers".
        """
        layers = self.backbone.config.layers
        if self.backbone.config.normalize_waveform:
            waveforms = [normalize(waveform) for waveform in waveforms]
        x, lengths = self.backbone.feature_encoder(waveforms)
        if depth <= layers:
            return self.backbone(x, lengths, -1, depth), lengths
        rows = []
        for first, last in pairwise([-1, *(range(layers + 1) if self.pooling == "layers" else [layers])]):
            x = self.backbone(x, lengths, first, last)
            rows.append(self.statistics(x, lengths))
        pooled = torch.cat(rows, 1)  # (B, R, D)
        return pooled.flatten(0, 1), [pooled.shape[1]] * len(pooled)

    def statistics(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Packed frames `(N, D)` -> `(B, R, D)` in fp32, R rows for each utterance."""
        frames = Frames(lengths)
        if self.pooling == "attentive":
            return fast.weighted_mean(x, self.score(x.float()), frames)[:, None]
        mean = fast.mean(x, frames)
        if self.pooling != "mean_std":
            return mean[:, None]
        of_frame = mean.repeat_interleave(frames.offsets(x.device).diff(), 0, output_size=len(x))
        variance = fast.mean((x.float() - of_frame) ** 2, frames)
        return torch.stack([mean, variance.clamp_min(1e-10).sqrt()], 1)  # a root has no gradient at 0

    def forward(self, x: Tensor, lengths: Sequence[int], depth: int = -1) -> Tensor:
        """Packed hidden state `depth` -> predictions `(B, K)`, 0..1 for labels at the ends of their range."""
        pooled = depth > self.backbone.config.layers
        assert pooled or self.pooling != "layers", "the hidden states below have been left behind"
        x = x if pooled else self.backbone(x, lengths, depth)
        with torch.autocast(x.device.type, enabled=False):  # 16 bits would round what the head says
            x = x.unflatten(0, (len(lengths), -1)) if pooled else self.statistics(x, lengths)  # (B, R, D)
            if self.pooling == "layers":
                x = (x * self.layer_weights.softmax(0)[:, None]).sum(1)
            return self.head(x.flatten(1))

    @torch.no_grad()
    def infer(self, waveforms: Sequence[Tensor]) -> Tensor:
        """Predictions `(B, K)`, scaled as in `forward`, of waveforms `(S,)` at 16 kHz on the model's device."""
        return self(*self.encode(waveforms, self.deepest), self.deepest)

    @torch.no_grad()
    def predict(self, waveform: Tensor, sample_rate: int) -> dict[str, float]:
        """Targets by name, in the corpus scale, of one mono waveform `(S,)` at any sample rate."""
        self.eval()
        predictions = self.infer([resample(waveform, sample_rate).to(next(self.head.parameters()).device)])[0]
        low, high = self.label_range
        return {name: low + (high - low) * y for name, y in zip(self.targets, predictions.tolist(), strict=True)}


def normalize(waveform: Tensor) -> Tensor:
    """`(x - mean) / sqrt(variance + 1e-7)` over one waveform `(S,)`: zero mean, unit variance."""
    variance, mean = torch.var_mean(waveform, correction=0)
    return (waveform - mean) / torch.sqrt(variance + 1e-7)
