"""Log-mel frames in the place of Wav2Vec 2.0: the baseline that shows what the pretrained features buy.

`LogMel` looks to the rest like a backbone without layers, in which nothing trains. What is pooled of its frames goes to
the same head, in the same loop.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model import FIELD, HOP, Wav2Vec2Config

BANDS = 40
SPECTRUM = 512  # samples, of which FIELD are the frame's and the rest zeros
FLOOR = 1e-3  # of a band's power, for a waveform of unit variance: silence has no logarithm


class LogMel(nn.Module):
    """Waveforms to log10 of the power in 40 mel bands, every 20 ms from 25 ms: the very frames of Wav2Vec 2.0."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Wav2Vec2Config(conv_channels=(BANDS,), width=BANDS, layers=0)
        self.layers = nn.ModuleList()
        self.register_buffer("window", torch.hann_window(FIELD))
        self.register_buffer("filters", mel_filters(BANDS, SPECTRUM // 2 + 1, 50, 8000))

    @torch.no_grad()
    def feature_encoder(self, waveforms: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Waveforms `(S,)` each, 16 kHz -> packed frames `(N, 40)` and the number of frames of each."""
        frames = [waveform.unfold(0, FIELD, HOP) for waveform in waveforms]
        power = torch.fft.rfft(torch.cat(frames).float() * self.window, SPECTRUM).abs() ** 2  # (N, 257)
        with torch.autocast(power.device.type, enabled=False):
            return (power @ self.filters + FLOOR).log10(), [len(x) for x in frames]

    def forward(self, x: Tensor, lengths: Sequence[int], first: int = -1, last: int | None = None) -> Tensor:
        return x

    def before(self, depth: int) -> list[nn.Module]:
        return []


def mel_filters(bands: int, bins: int, low: float, high: float) -> Tensor:
    """Triangles `(bins, bands)` of height 1, equally wide in mel, over a spectrum from 0 to 8000 Hz.

    mel(f) = 2595 log10(1 + f / 700) (O'Shaughnessy 1987).
    """
    low, high = (2595 * math.log10(1 + f / 700) for f in (low, high))
    edges = 700 * (10 ** (torch.linspace(low, high, bands + 2, dtype=torch.float64) / 2595) - 1)  # Hz
    frequencies = torch.linspace(0, 8000, bins, dtype=torch.float64)[:, None]
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (frequencies - left) / (center - left), (right - frequencies) / (right - center)
    return torch.minimum(rising, falling).clamp_min(0).float()
