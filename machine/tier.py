"""A complete cache kept on the GPU: each activation is copied there once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ActivationCache = Any  # of `cache`, which loads this file when it needs it


class OnGPU:
    """Reads like an `ActivationCache`, and keeps every activation on the device once it was read. One thread reads."""

    def __init__(self, cache: ActivationCache, device: torch.device):
        """Raises ValueError if the cache does not fit into the device's memory."""
        self.cache, counts = cache, cache.entries["frames"] + cache.scale_rows
        self.borders = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
        self.there = np.zeros(len(counts), bool)
        try:
            self.held = torch.empty(int(self.borders[-1]), cache.width, dtype=cache.dtype, device=device)
        except RuntimeError:
            size = cache.stored_bytes() / 1e9
            raise ValueError(f"cache_tier: gpu has no room for {size:.1f} GB; set cache_tier: disk") from None

    def read(self, numbers: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, list[int]]:
        """Packed activations `(N, width)` and lengths, as `ActivationCache.read` gives them; always on its device."""
        parts, lengths = [], []
        for number, place in zip(numbers, self.cache.place_of[np.asarray(numbers, int)], strict=True):
            rows = self.held[self.borders[place] : self.borders[place + 1]]
            if not self.there[place]:
                rows.copy_(self.cache.read_stored([number])[0])
                self.there[place] = True
            parts.append(rows)
            lengths.append(len(rows) - self.cache.scale_rows)
        return self.cache.decode(torch.cat(parts), lengths), lengths


def pick(tier: str, cache: ActivationCache, device: torch.device) -> ActivationCache | OnGPU:
    """What to read from: for "gpu" the GPU; for "auto" the GPU if the cache fits into half of its free memory."""
    fits = tier == "gpu" or cache.stored_bytes() <= torch.cuda.mem_get_info(device)[0] / 2
    return OnGPU(cache, device) if fits else cache
