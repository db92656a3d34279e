"""A cache in int8: half the size of float16, for what can do with less precision."""

import torch
from torch import Tensor

SCALE_ROWS = 8  # before the frames: scale and middle of each channel in fp32 fill as many rows


def to_int8(activation: Tensor) -> Tensor:
    """Rows to store for a finite activation `(T, width)`: scale and middle of each channel, then steps of the scale.

    A step is a 254th of the channel's range in this utterance, so no value is off by more than half of one: neither a
    channel of large values nor a large constant in a channel, as pre-norm models have, costs precision.
    """
    low, high = activation.aminmax(dim=0)
    middle = low / 2 + high / 2
    scale = (high / 254 - low / 254).clamp(min=torch.finfo(activation.dtype).tiny)  # a constant channel has one too
    steps = ((activation - middle) / scale).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([torch.stack([scale, middle]).view(torch.int8).view(SCALE_ROWS, -1), steps])


def from_int8(rows: Tensor) -> Tensor:
    """The activation `(T, width)` in fp32 of the rows that `to_int8` gave."""
    scale, middle = rows[:SCALE_ROWS].view(-1).view(torch.float32).view(2, -1)
    return rows[SCALE_ROWS:] * scale + middle
