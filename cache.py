"""The frozen prefix and the cache of its output: what it makes of each utterance, computed once and kept on disk.

A directory holds activations of one kind (weights, depth, preprocessing, type: `cache.json`, of which its name is the
hash). Every process that writes has two files: `<writer>.bin` with activations, and `<writer>.index` with a line for
each, written after it. One that dies loses only what it had in hand; several may write, and find what others wrote.

An entry belongs to one state of an audio file: path, size and time of change. Clocks are coarse, so the entry of a file
that changed less than two seconds before the cache was opened also holds the CRC-32 that its content had then. A line
of an index holds its own CRC-32, with the directory's name in it, and that of its activation, checked when first read.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
from config import extra
from freeze import drop_prefix, prefix_depth
from machine.audio import split_source
from machine.fast import send
from machine.hardware import replace
from model import EmotionModel

SCALE_ROWS = 8  # of int8, before the frames: scale and middle of each channel in fp32 fill as many rows
FORMAT = 3  # raise it when the same identity would mean other numbers, or the same numbers other files
SHARD_BYTES = 1 << 31
LINE_BYTES = 100  # of an index, beside the path
RECENT = 2_000_000_000  # ns; clocks and time stamps advance in steps of up to 2 s (FAT), 24 ms in virtual machines
ENTRY = np.dtype([("crc32", "u4"), ("shard", "i4"), ("offset", "i8"), ("frames", "i4"), ("checked", "?")])


class Missing(NamedTuple):
    """What a cache lacks of a file, and the file as it was before it was read."""

    state: tuple[int, int]  # size and time of change
    content: tuple[int, ...]  # CRC-32, if it had just changed: by time alone, another change might not be noticed
    numbers: list[int]  # of its utterances


class ActivationCache:
    """Activations `(T, width)` of numbered utterances. One thread writes; one more may read beside it.

    So may other processes: `has`, where it would say no, and `write` look for what they have added. float16
    and float32 are stored as they are. int8 counts from the middle of each channel's range in each utterance in 254ths
    of that range, so neither a channel of large values nor a large constant in one costs precision.
    """

    def __init__(self, root: str | Path, identity: dict, paths: Sequence[str], width: int, dtype: torch.dtype):
        """Open or create the cache for `identity`, a description that JSON can hold; `paths` are the audio files."""
        identity = {"format": FORMAT, **identity, "width": width, "dtype": str(dtype).removeprefix("torch.")}
        self.directory = Path(root) / directory_name(identity)
        self.paths, self.width, self.dtype = paths, width, dtype
        self.row_bytes = width * dtype.itemsize
        self.scale_rows = SCALE_ROWS if dtype == torch.int8 else 0
        assert width % 4 == 0 or not self.scale_rows, "scales in fp32 lie at multiples of 4 bytes"
        self.entries = np.zeros(len(paths), ENTRY)  # frames 0: not there
        self.missing: dict[str, Missing] = {}  # by path
        for number, path in enumerate(map(os.path.abspath, paths)):
            if path not in self.missing:
                recent = time.time_ns() - (state := file_state(path))[1] < RECENT
                self.missing[path] = Missing(state, (file_crc(path),) if recent else (), [])
            self.missing[path].numbers.append(number)  # a file may be in the corpus twice
        self.lock = threading.RLock()
        self.seen: dict[str, int] = {}  # bytes of each index that have been read
        self.shards: list[str] = []
        self.readers: dict[int, Any] = {}
        self.writer: tuple | None = None
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            read_description(self.directory)
        except (FileNotFoundError, ValueError):
            replace(self.directory / "cache.json", lambda file: file.write_bytes(to_json(identity)))
        self.load_index()

    def load_index(self) -> None:
        """Find what is missing among the lines not yet read; one past the end of its shard is passed over."""
        with self.lock:
            sizes: dict[str, int] = {}
            for index in sorted(self.directory.glob("*.index")):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    if file_size(index) > self.seen.get(index.name, 0):
                        self.load_lines(index, sizes)
            self.missing = self.missing or {}  # a new one: an emptied one keeps its memory

    def load_lines(self, index: Path, sizes: dict[str, int]) -> None:
        """The same for one index; `sizes` of shards are those found so far."""
        with open(index, "rb") as file:
            file.seek(self.seen.get(index.name, 0))
            for line in file:
                if not line.endswith(b"\n"):  # torn, or not yet whole
                    break
                self.seen[index.name] = self.seen.get(index.name, 0) + len(line)
                if (entry := read_line(line, self.directory.name)) is None:
                    continue
                crc, name, offset, frames, size, mtime_ns, path, *content = entry
                missing = self.missing.get(path)
                if missing is None or missing.state != (size, mtime_ns) or (content and content != [file_crc(path)]):
                    continue
                if name not in sizes:
                    sizes[name] = file_size(self.directory / name)
                if offset + (frames + self.scale_rows) * self.row_bytes <= sizes[name]:
                    if name not in self.shards:
                        self.shards.append(name)
                    found = crc, self.shards.index(name), offset, frames, False
                    self.entries[missing.numbers] = np.array(found, ENTRY)
                    del self.missing[path]

    def note_user(self, path: str | Path, backbone: str) -> None:
        """Leave the path of a run or config that uses this cache, and its backbone's name, for `tools.caches list`."""
        note = {"path": os.path.abspath(path), "backbone": backbone}
        with suppress(OSError):  # a cache that others may only read
            name = hashlib.sha256(note["path"].encode("utf-8", "surrogateescape")).hexdigest()[:12]
            (self.directory / f"{name}.user").write_text(json.dumps(note), encoding="utf-8")

    def has(self, numbers: Sequence[int]) -> bool:
        """Whether all of these utterances are there, by now."""
        chosen = np.asarray(numbers, int)
        if not self.entries["frames"][chosen].all():
            self.load_index()
        return bool(self.entries["frames"][chosen].all())

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Packed activations `(N, width)` and lengths, fp32 from int8. Raises ValueError for a damaged entry."""
        lengths = self.lengths(numbers)
        return self.decode(self.read_stored(numbers), lengths), lengths

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        """Frames of each of these utterances, all of which must be there."""
        frames = self.entries["frames"][np.asarray(numbers, int)]
        assert (frames > 0).all(), "ask `has` first"
        return frames.tolist()

    def read_stored(self, numbers: Sequence[int]) -> Tensor:
        """The rows that the files hold, `(rows, width)` in the cache's type on the CPU."""
        counts = [length + self.scale_rows for length in self.lengths(numbers)]
        stored = torch.empty(sum(counts), self.width, dtype=self.dtype)
        for number, rows in zip(numbers, stored.split(counts), strict=True):
            entry, part = self.entries[number], rows.view(torch.uint8).numpy()
            try:
                whole = self.read_bytes(int(entry["shard"]), int(entry["offset"]), part)
                problem = "is damaged"
            except OSError as error:
                whole, problem = False, f"cannot be read ({error.strerror or error})"
            if not whole or not (entry["checked"] or zlib.crc32(part) == entry["crc32"]):
                raise ValueError(
                    f"{self.directory / self.shards[entry['shard']]}: the activation of {self.paths[number]} "
                    f"{problem}; python -m tools.caches verify --repair {self.directory} forgets what is damaged, and "
                    "the next run computes that alone anew"
                )
            self.entries["checked"][number] = True
        return stored

    def decode(self, stored: Tensor, lengths: Sequence[int]) -> Tensor:
        """Packed activations `(N, width)` of stored rows, on any device: as they are, or fp32 from int8."""
        if self.dtype != torch.int8:
            return stored
        return torch.cat([from_int8(rows) for rows in stored.split([length + SCALE_ROWS for length in lengths])])

    def write(self, numbers: Sequence[int], packed: Tensor, lengths: Sequence[int]) -> Tensor:
        """Store packed activations `(N, width)` of those not yet there; returns them as `read` would.

        So the epoch that fills the cache trains on what the next ones will read: rounded, and where an earlier run or
        another process has written them, what it computed.
        """
        self.load_index()
        rounded = packed.to("cpu", torch.float32 if self.dtype == torch.int8 else self.dtype)
        start, stored = 0, []
        for number, part in zip(numbers, rounded.split(list(lengths)), strict=True):
            with self.lock:
                if self.entries["frames"][number]:
                    stored.append(self.read_stored([number]))
                else:
                    if not part.isfinite().all():
                        largest = packed[start : start + len(part)].abs().max().item()
                        what = f"{self.paths[number]} does not fit {self.dtype} (largest {largest:.3g})"
                        known = math.isfinite(largest)
                        advice = "set cache_dtype: float32" if known else "the model yields no numbers for it"
                        raise ValueError(f"the activation of {what}; {advice}")
                    stored.append((to_int8(part) if self.dtype == torch.int8 else part).contiguous())
                    self.append(number, stored[-1], len(part))
            start += len(part)
        return self.decode(torch.cat(stored), lengths)

    def append(self, number: int, stored: Tensor, frames: int) -> None:
        """Add the rows of one activation. Raises OSError if they cannot be written; what was written before stays."""
        data, path = stored.view(torch.uint8).numpy().tobytes(), os.path.abspath(self.paths[number])
        crc, (state, content, numbers) = zlib.crc32(data), self.missing[path]
        try:
            name, shard, index = self.writer or self.open_writer()
            offset = shard.tell()
            shard.write(data)
            shard.flush()
            index.write(make_line((crc, name, offset, frames, *state, path, *content), self.directory.name))
            index.flush()
        except OSError as error:
            self.close_writer()  # half of what failed is in its files: nothing may follow it
            reason, full = error.strerror or error, error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            remedy = f"{'free space, or ' if full else ''}set cache_dir or cache: false"
            raise OSError(f"cache {self.directory}: {reason}; {remedy}") from None
        self.entries[numbers] = np.array((crc, self.shards.index(name), offset, frames, True), ENTRY)
        del self.missing[path]
        if offset + len(data) > SHARD_BYTES:
            self.close_writer()

    def open_writer(self) -> tuple:
        """Two new files, which stay open until `close_writer`."""
        name = uuid.uuid4().hex[:12]
        shard, index = self.directory / f"{name}.bin", self.directory / f"{name}.index"
        self.writer = shard.name, shard.open("xb"), index.open("xb")
        self.shards.append(shard.name)
        return self.writer

    def close_writer(self) -> None:
        for file in (self.writer or ())[1:]:
            with suppress(OSError):  # a full disk again, of which the user has been told
                file.close()
        self.writer = None

    def read_bytes(self, shard: int, offset: int, out: np.ndarray) -> bool:
        """Fill `out` from a shard; whether it has so much."""
        with self.lock:  # a file has one position
            if shard not in self.readers:
                self.readers[shard] = (self.directory / self.shards[shard]).open("rb", buffering=0)
            file = self.readers[shard]
            file.seek(offset)
            return file.readinto(out.data.cast("B")) == out.nbytes

    def space(self, seconds: float, rows_each: int | None = None) -> int:
        """Bytes on the disk of what is missing of `seconds` of audio, or of so many rows each, with its index."""
        missing = int((self.entries["frames"] == 0).sum())
        rows = missing * rows_each if rows_each else seconds * 50 * missing / max(len(self.entries), 1)
        lines = sum(LINE_BYTES + len(path) for path in self.missing)
        return int((rows + missing * self.scale_rows) * self.row_bytes) + lines

    def require_space(self, seconds: float, rows_each: int | None = None) -> None:
        """Raise OSError if the disk has less room than `space`."""
        needed, free = self.space(seconds, rows_each), shutil.disk_usage(self.directory).free
        if needed > free:
            found = f"needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB"
            raise OSError(f"cache {self.directory}: {found}; free space, or set cache_dir or cache: false")

    def stored_bytes(self) -> int:
        """Of a complete cache, a file that the corpus names twice counted twice."""
        frames = self.entries["frames"]
        return (int(frames.sum(dtype=np.int64)) + len(frames) * self.scale_rows) * self.row_bytes

    def close(self) -> None:
        self.close_writer()
        for shard in list(self.readers):
            self.readers.pop(shard).close()


def directory_name(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def name_of(directory: Path) -> str:
    """Also of `.`."""
    return Path(os.path.abspath(directory)).name


def file_state(path: str) -> tuple[int, int]:
    """Size and time of change in ns, by which a replaced file is noticed; -1 and -1 for one that is not there."""
    try:
        status = os.stat(split_source(path)[0])
        return status.st_size, status.st_mtime_ns
    except OSError:
        return -1, -1


def file_crc(path: str) -> int:
    """CRC-32 of a file's content; -1 if it cannot be read."""
    try:
        return zlib.crc32(Path(split_source(path)[0]).read_bytes())
    except OSError:
        return -1


def file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def to_json(identity: dict) -> bytes:
    """The content of `cache.json`."""
    return json.dumps(identity, indent=2).encode()


def make_line(entry: tuple, name: str) -> bytes:
    """A line of an index of the cache of this name: a CRC-32 and what it is of."""
    text = json.dumps(entry).encode()
    return b"%08x %s\n" % (zlib.crc32(text, zlib.crc32(name.encode())), text)


def read_line(line: bytes, name: str) -> list | None:
    """CRC-32, shard, offset, frames, size, time of change, path and perhaps the CRC-32 of the file, all of a line.

    None if it is not as it was written.
    """
    text = line[9:-1]
    if line[:9] != b"%08x " % zlib.crc32(text, zlib.crc32(name.encode())):
        return None
    with suppress(ValueError, RecursionError):  # not by us
        match json.loads(text):
            case [int(crc), str(shard), int(offset), int(frames), int(), int(), str(), *rest] as entry:
                sane = 0 <= crc < 2**32 and 0 <= offset < 2**62 and 0 < frames < 2**31 and Path(shard).name == shard
                return entry if sane and all(type(crc) is int for crc in rest[:1]) and len(rest) < 2 else None
    return None


def read_description(directory: Path) -> dict:
    """What `cache.json` says: the identity, with "width" and "dtype". Raises FileNotFoundError, or ValueError."""
    path = directory / "cache.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: is no cache, it has no cache.json")
    try:
        identity = json.loads(content := path.read_bytes())
        known = type(width := identity["width"]) is int and width > 0 and getattr(torch, identity["dtype"]).itemsize
        known = known and to_json(identity) == content and directory_name(identity) == name_of(directory)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"{path}: does not describe a cache of this name; a run that uses it writes it anew")
    return identity


# ---------------------------------------------------------------- int8


def to_int8(activation: Tensor) -> Tensor:
    """Rows to store for a finite activation `(T, width)`: scale and middle of each channel, then steps of the scale."""
    low, high = activation.aminmax(dim=0)
    middle = low / 2 + high / 2
    scale = (high / 254 - low / 254).clamp(min=torch.finfo(activation.dtype).tiny)  # a constant channel has one too
    steps = ((activation - middle) / scale).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([torch.stack([scale, middle]).view(torch.int8).view(SCALE_ROWS, -1), steps])


def from_int8(rows: Tensor) -> Tensor:
    """The activation `(T, width)` in fp32 of the rows that `to_int8` gave."""
    scale, middle = rows[:SCALE_ROWS].view(-1).view(torch.float32).view(2, -1)
    return rows[SCALE_ROWS:] * scale + middle


# ---------------------------------------------------------------- the frozen prefix


def open_cache(
    root: str | Path,
    model: EmotionModel,
    paths: Sequence[str],
    *,
    backbone: str,
    precision: str,
    dtype: str,
    tf32: bool = False,
) -> ActivationCache:
    """The cache for the frozen prefix of a model over these files; `backbone` is the SHA-256 of its weights."""
    config, depth = model.backbone.config, prefix_depth(model)
    identity = {"backbone": backbone, "depth": depth, "precision": precision}
    identity["normalize_waveform"] = config.normalize_waveform
    identity |= {"pooling": model.pooling} if depth > config.layers else {}
    identity |= {"tf32": True} if tf32 else {}  # products with 10 bits of mantissa are other numbers
    width = config.conv_channels[-1] if depth < 0 else config.width
    return ActivationCache(root, identity, paths, width, getattr(torch, dtype))


def pooled_rows(model: EmotionModel) -> int | None:
    """Rows that a cache holds of each utterance where the whole backbone is frozen; else None: one a frame."""
    if prefix_depth(model) <= model.backbone.config.layers:
        return None
    return len(model.sources(prefix_depth(model))) * (2 if model.pooling == "mean_std" else 1)


class Prefix:
    """The frozen prefix's output for numbered utterances: computed, or read from a cache that it fills as it goes."""

    def __init__(
        self,
        model: EmotionModel,
        paths: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
        cache: ActivationCache | None = None,
        at_once: int | None = None,
    ):
        """`at_once` bounds how many utterances are computed together; `dtype` is that of autocast, or fp32."""
        self.model, self.paths, self.device, self.dtype = model, paths, device, dtype
        self.cache, self.at_once = cache, at_once
        self.source: Any = cache  # what is read: the cache, or `machine.tier.OnGPU` before it
        self.depth = prefix_depth(model)
        self.complete = False  # then the prefix's weights are gone
        self.seconds = 0.0  # that the cache has cost

    def __call__(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, list[int]]]:
        """Packed activations `(N, width)` in fp32 on the device, and lengths, of each batch; one is read ahead."""
        for numbers, loaded in zip(batches, data.prefetch(self.load, batches), strict=True):
            if isinstance(loaded, Tensor):
                assert self.cache is not None, "without one, `load` gives waveforms"
                lengths = self.cache.lengths(numbers)
                x = self.cache.decode(send(loaded, self.device), lengths)
            else:
                x, lengths = self.compute(numbers, loaded)
            yield send(x, self.device).float(), lengths

    def load(self, numbers: Sequence[int]) -> Tensor | list[Tensor]:
        """A batch as the cache stores it, or all of its waveforms even if one is missing, so that results repeat."""
        if self.cache is not None and self.cache.has(numbers):
            return self.source.read_stored(numbers)
        return [data.read_audio(self.paths[number]) for number in numbers]

    @torch.no_grad()
    def compute(self, numbers: Sequence[int], waveforms: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Packed activations and lengths of waveforms, as the cache will give them back."""
        start, packed, lengths = time.perf_counter(), [], []
        for i in range(0, len(waveforms), self.at_once or len(waveforms)):
            group = list(waveforms[i : i + (self.at_once or len(waveforms))])
            part = send(torch.cat(group), self.device).split([len(waveform) for waveform in group])  # in one copy
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                x, frames = self.model.encode(part, self.depth)
            packed.append(x)
            lengths += frames
        x = torch.cat(packed) if len(packed) > 1 else packed[0]
        if self.cache is not None:
            x = self.cache.write(numbers, x, lengths)
            self.seconds += time.perf_counter() - start
        return x, lengths

    def release_if_cached(self, tier: str = "disk") -> None:
        """If the cache holds everything, give up the prefix's weights; `tier` gpu or auto may keep it on the GPU."""
        if self.cache is None or self.complete or not self.cache.has(range(len(self.paths))):
            return
        drop_prefix(self.model, self.depth)
        self.complete = True
        if tier in ("auto", "gpu") and self.device.type != "cpu":
            self.source = extra("machine.tier", f"cache_tier: {tier}").pick(tier, self.cache, self.device)
