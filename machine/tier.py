"""Where a complete activation cache is read from: the disk, memory, or the GPU, and how a batch gets to the GPU."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cache import ActivationCache


class Tier:
    """Reads batches of a cache onto a device.

    "disk" reads every batch from the files, "ram" and "gpu" each activation once: they keep the whole of a complete
    cache in one tensor, in memory or on the device. One thread reads.
    """

    def __init__(self, cache: ActivationCache, device: torch.device, name: str = "disk"):
        """Raises ValueError if the memory that "ram" or "gpu" need is not there."""
        self.cache, self.device = cache, device
        self.staging = Staging(device) if device.type == "cuda" else None
        self.held: Tensor | None = None
        if name != "disk":
            counts = cache.entries["frames"] + cache.scale_rows
            self.borders = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
            self.there = np.zeros(len(counts), bool)
            place = device if name == "gpu" else "cpu"
            try:
                self.held = torch.empty(int(self.borders[-1]), cache.width, dtype=cache.dtype, device=place)
            except RuntimeError:
                size = cache.stored_bytes() / 1e9
                raise ValueError(f"cache_tier: {name} has no room for {size:.1f} GB; set cache_tier: disk") from None

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Packed activations `(N, width)` and lengths as `ActivationCache.read` gives them, on the device."""
        lengths = self.cache.lengths(numbers)
        rows = sum(lengths) + len(lengths) * self.cache.scale_rows
        if self.held is None:
            stored = self.send(rows, lambda out: self.cache.read_stored(numbers, out))
        else:
            if missing := [number for number in dict.fromkeys(numbers) if not self.there[number]]:
                self.hold(missing)
            parts = [self.held_rows(number) for number in numbers]
            if self.held.device.type == self.device.type:
                stored = torch.cat(parts)
            else:
                stored = self.send(rows, lambda out: torch.cat(parts, out=out))
        return self.cache.decode(stored, lengths), lengths

    def hold(self, numbers: Sequence[int]) -> None:
        """Read from the disk what is not yet in memory."""
        stored, start = self.cache.read_stored(numbers).to(self.held.device), 0
        for place in map(self.held_rows, numbers):
            place.copy_(stored[start : start + len(place)])
            start += len(place)
        self.there[numbers] = True

    def held_rows(self, number: int) -> Tensor:
        return self.held[self.borders[number] : self.borders[number + 1]]

    def send(self, rows: int, fill: Callable[[Tensor], object]) -> Tensor:
        """What `fill` writes into a tensor `(rows, width)` on the CPU, on the device."""
        if self.staging is not None:
            size = rows * self.cache.row_bytes
            sent = self.staging.send(size, lambda buffer: fill(buffer.view(self.cache.dtype).view(rows, -1)))
            return sent.view(self.cache.dtype).view(rows, -1)
        stored = torch.empty(rows, self.cache.width, dtype=self.cache.dtype)
        fill(stored)
        return stored.to(self.device)


class Staging:
    """Two pinned buffers used in turn: while the GPU copies a batch out of the one, the next is put into the other."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self.copied = [torch.cuda.Event(), torch.cuda.Event()]  # one that was never recorded is not waited for
        self.turn = 0

    def send(self, size: int, fill: Callable[[Tensor], object]) -> Tensor:
        """`size` bytes, which `fill` writes into a buffer, on their way to the GPU: work queued after this has them."""
        self.turn = 1 - self.turn
        self.copied[self.turn].synchronize()
        if len(self.buffers[self.turn]) < size:
            self.buffers[self.turn] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        buffer = self.buffers[self.turn][:size]
        fill(buffer)
        sent = buffer.to(self.device, non_blocking=True)
        self.copied[self.turn].record(torch.cuda.current_stream(self.device))
        return sent


def pick_tier(name: str, cache: ActivationCache, device: torch.device) -> str:
    """ "auto": gpu where a complete cache fits into half of a GPU's free memory, else disk.

    Never ram: the operating system keeps in memory what was read from the disk, and gives it up when others need it.
    """
    if name != "auto":
        return name
    fits = device.type == "cuda" and cache.stored_bytes() <= torch.cuda.mem_get_info(device)[0] / 2
    return "gpu" if fits else "disk"
