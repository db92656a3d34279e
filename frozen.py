"""The frozen prefix at work: its output for batch after batch, computed or from a cache, in one process or several."""

import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

import data
from cache import ActivationCache, check_space
from freeze import drop_prefix, prefix_depth
from machine import parallel
from machine.hardware import DTYPES, synchronize
from machine.tier import Tier, pick_tier
from model import EmotionModel

Item = TypeVar("Item")
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]  # Ctrl-C, and what a cluster sends
STOP_SIGNALS += [signal.SIGBREAK] if sys.platform == "win32" else []  # Windows lets no other process send those two


class Stopped(KeyboardInterrupt):
    """The run is to end here, between two batches."""


@contextmanager
def stop_between_batches(stop: threading.Event, save: Callable[[], object]) -> Iterator[None]:
    """Within, a signal of STOP_SIGNALS sets `stop`, at which a `Prefix` raises `Stopped`; then `save` is called.

    A second signal does not wait, unless it comes within a second: torchrun repeats a Ctrl-C to its processes. Where
    signals cannot be caught, outside the main thread, they are left as they are.
    """
    first = 0.0

    def note_signal(*_: object) -> None:
        nonlocal first
        if stop.is_set() and time.monotonic() - first > 1:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        stop.set()

    caught = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.signal(number, note_signal) for number in caught}
    try:
        yield
    except Stopped:
        save()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Prefix:
    """The frozen prefix's output for numbered utterances: computed, or read from a cache that it fills as it goes."""

    def __init__(
        self,
        model: EmotionModel,
        paths: Sequence[str],
        device: torch.device,
        precision: str,
        at_once: int | None = None,
    ):
        """`at_once` bounds how many utterances the prefix computes together."""
        self.model, self.paths, self.device, self.at_once = model, paths, device, at_once
        self.depth, self.dtype = prefix_depth(model), DTYPES[precision]
        self.precision = precision
        self.cache: ActivationCache | None = None
        self.tier: Tier | None = None
        self.complete = False
        self.space = 0  # bytes that the cache still needs
        self.build_seconds = 0.0
        self.stop = threading.Event()

    def open_cache(
        self, root: str, dtype: str, identity: dict, seconds: float = 0.0, tier: str = "auto"
    ) -> ActivationCache:
        """From here on keep what is computed below `root`, and read what is there; `seconds` of audio must fit."""
        if tier == "gpu" and self.device.type == "cpu":
            raise ValueError("cache_tier: found gpu, but the device is the CPU; expected auto, disk or ram")
        config = self.model.backbone.config
        width = config.conv_channels[-1] if self.depth < 0 else config.width
        kind = {"backbone": identity["sha256"], "depth": self.depth, "precision": self.precision}
        kind["normalize_waveform"] = config.normalize_waveform
        pooled = self.depth > config.layers
        kind |= {"pooling": self.model.pooling} if pooled else {}
        self.cache = ActivationCache(root, kind, self.paths, width, getattr(torch, dtype))
        rows = len(self.model.sources(self.depth)) * (2 if self.model.pooling == "mean_std" else 1)
        self.space = self.cache.space(seconds, rows if pooled else None)
        check_space({self.cache.directory: self.space})
        self.tier, self.tier_when_complete = Tier(self.cache, self.device), tier
        return self.cache

    def drop_if_cached(self) -> None:
        """If the cache holds all that the prefix could compute, give up its weights, and read from the tier wanted."""
        if self.cache is not None and parallel.size() > 1:
            parallel.wait()  # until the others have written theirs
        if self.cache is not None and not self.complete and self.cache.has(range(len(self.paths))):
            drop_prefix(self.model, self.depth)
            self.tier = Tier(self.cache, self.device, pick_tier(self.tier_when_complete, self.cache, self.device))
            self.complete = True

    def __call__(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], Tensor, list[int]]]:
        """Each batch's numbers, and of this process's share packed activations on the device in fp32 and lengths.

        Reads one batch ahead. Raises `Stopped` instead of the next batch once `stop` is set, in any process.
        """
        shares = [parallel.share(batch) for batch in batches]
        for batch, numbers, loaded in zip(batches, shares, data.prefetch(self.load, shares), strict=True):
            if parallel.any_of(self.stop.is_set()):
                raise Stopped
            x, lengths = loaded if isinstance(loaded, tuple) else self.encode(numbers, loaded)
            yield batch, x.to(self.device, non_blocking=True).float(), lengths

    def load(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]] | list[Tensor]:
        """A batch from the cache, or its waveforms: all of them even if one is missing, so that results repeat."""
        if self.cache is not None and self.cache.has(numbers):
            return self.tier.read(numbers)
        return [data.read_audio(self.paths[number]) for number in numbers]

    def encode(self, numbers: Sequence[int], waveforms: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        start, packed, lengths = time.perf_counter(), [], []
        for part in in_order(waveforms, self.at_once or len(waveforms)):
            with self.autocast():
                x, frames = self.model.encode(self.send(part), self.depth)
            packed.append(x)
            lengths += frames
        x = torch.cat(packed) if len(packed) > 1 else packed[0]
        if self.cache is not None:
            x = self.cache.write(numbers, x, lengths)
            self.build_seconds += time.perf_counter() - start
        return x, lengths

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def send(self, waveforms: Sequence[Tensor]) -> Sequence[Tensor]:
        """Waveforms on the device, in one copy."""
        return torch.cat(list(waveforms)).to(self.device).split([len(waveform) for waveform in waveforms])


def in_order(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Groups of `size` in the given order; the last has the remainder."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def deepest(prefixes: Iterable[Prefix]) -> Prefix:
    return max(prefixes, key=lambda prefix: prefix.depth)


def fill(prefixes: Sequence[Prefix]) -> list[dict]:
    """Complete the caches of prefixes that share backbone and audio: no hidden state is computed twice for a batch.

    Several commands may do so at once, each in an order of its own and without what another has done by then. The
    processes of one command share the work.
    """
    last = deepest(prefixes)
    size = min(prefix.at_once for prefix in prefixes)
    missing = [
        batch
        for batch in parallel.share(in_order(range(len(last.paths)), size))
        if not all(prefix.cache.has(batch) for prefix in prefixes)
    ]
    random.shuffle(missing)
    seconds: dict[Prefix, float] = {}
    start = time.perf_counter()

    def load(batch: Sequence[int]) -> list[Tensor]:
        there = all(prefix.cache.has(batch) for prefix in prefixes)
        return [] if there else [data.read_audio(last.paths[number]) for number in batch]

    audio = data.prefetch(load, missing)
    bar = tqdm(missing, desc="cache", unit="batch", disable=parallel.rank() > 0 or None)
    for numbers, waveforms in zip(bar, audio, strict=True):
        sources = {p: p.model.sources(p.depth) for p in prefixes if waveforms and not p.cache.has(numbers)}
        if not sources:
            continue
        depths = sorted(set().union(*sources.values()))
        parts: dict[Prefix, list[Tensor]] = {prefix: [] for prefix in sources}
        own = dict.fromkeys(sources, 0.0)  # of each prefix, beside what all share
        with last.autocast():
            states = last.model.states(last.send(waveforms), depths)
            for depth, (x, lengths) in zip(depths, states, strict=True):
                synchronize(last.device)
                common = time.perf_counter() - start - sum(own.values())
                for prefix in (p for p in sources if depth in sources[p]):
                    begin = time.perf_counter()
                    parts[prefix].append(prefix.model.part(x, lengths, prefix.depth))
                    if depth == sources[prefix][-1]:
                        prefix.cache.write(numbers, *prefix.model.join(parts.pop(prefix), lengths))
                        seconds[prefix] = seconds.get(prefix, 0.0) + common
                    own[prefix] += time.perf_counter() - begin
        for prefix in own:
            seconds[prefix] += own[prefix]
        start = time.perf_counter()
    parallel.wait()
    for prefix in prefixes:
        prefix.cache.close()
        prefix.cache.load_index()  # with what other processes have written
    return [
        {"directory": str(p.cache.directory), "seconds": seconds.get(p), "bytes": p.cache.stored_bytes()}
        for p in prefixes
    ]
