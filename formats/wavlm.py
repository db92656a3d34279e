"""What WavLM has beyond Wav2Vec 2.0: a bias in attention for the distance of two frames, times a gate.

Chen et al. 2021, arXiv 2110.13900. The shape legend is that of `model`.
"""

import math

import torch
from torch import Tensor, nn

from machine import fast
from machine.fast import Frames, Linear
from model import Attention, Wav2Vec2Config


class RelativeBias(nn.Embedding):
    """A bias for each bucket of distances and each head, shared by all layers."""

    def __init__(self, config: Wav2Vec2Config):
        super().__init__(config.relative_buckets, config.heads)
        self.longest = config.relative_distance

    def forward(self, frames: int) -> Tensor:
        """For every pair of query and key: `(H, T, T)`."""
        biases = super().forward(distance_buckets(frames, self.num_embeddings, self.longest, self.weight.device))
        return biases.T.unfold(1, frames, 1).flip(1)  # (2T - 1, H) -> (H, T, T): query i sees distances -i to T - 1 - i


class GatedAttention(Attention):
    """Attention whose bias is weighted by a gate for each frame and head."""

    def __init__(self, config: Wav2Vec2Config):
        super().__init__(config)
        self.gate = Linear(config.width // config.heads, 8)
        self.gate_scale = nn.Parameter(torch.ones(config.heads))

    def forward(self, x: Tensor, frames: Frames, bias: Tensor) -> Tensor:
        """`(N, D)` -> `(N, D)`, with the bias `(H, T, T)` of `RelativeBias`."""
        return super().forward(x, frames, (self.gates(x), bias))

    def gates(self, x: Tensor) -> Tensor:
        """`a (b s - 1) + 2` from two sigmoids a and b and the scale s of each head: `(N, D)` -> `(N, H)`."""
        logits = self.gate(x.reshape(len(x) * self.heads, -1)).float().view(len(x), self.heads, 2, 4).sum(-1)
        a, b = logits.sigmoid().unbind(-1)
        return a * (b * self.gate_scale - 1) + 2


def distance_buckets(frames: int, buckets: int, longest: int, device: torch.device) -> Tensor:
    """The bucket of each distance between two frames, from `1 - T` to `T - 1`: int64 `(2T - 1,)`.

    Half of the buckets are for either direction; of these half are for one distance each, and the rest for ranges up
    to `longest` that grow with the logarithm.
    """
    distances = torch.arange(1 - frames, frames)
    size, half, exact = distances.abs(), buckets // 2, buckets // 4
    wide = torch.log(size.clamp_min(exact) / exact) / math.log(longest / exact) * (half - exact)
    found = torch.where(size < exact, size, (exact + wide.long()).clamp_max(half - 1))
    return fast.send(found + half * (distances > 0), device)
