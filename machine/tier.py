"""A complete cache kept on the GPU: read from the disk once, then never copied again."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cache import ActivationCache


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

    def read_stored(self, numbers: Sequence[int]) -> Tensor:
        """The rows that the files hold of these utterances, `(rows, width)` on the device."""
        for number in (number for number in dict.fromkeys(numbers) if not self.there[number]):
            self.rows(number).copy_(self.cache.read_stored([number]))
            self.there[number] = True
        return torch.cat([self.rows(number) for number in numbers])

    def rows(self, number: int) -> Tensor:
        """Where an utterance lies."""
        return self.held[self.borders[number] : self.borders[number + 1]]


def pick(tier: str, cache: ActivationCache, device: torch.device) -> ActivationCache | OnGPU:
    """What to read from: "gpu" the device; "auto" the device if the cache fits into half of its free memory."""
    if tier == "gpu":
        return OnGPU(cache, device)
    fits = device.type == "cuda" and cache.stored_bytes() <= torch.cuda.mem_get_info(device)[0] / 2
    return OnGPU(cache, device) if fits else cache
