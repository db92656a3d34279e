"""The frozen prefix and the cache of its output: each utterance's activation, computed once and kept on disk.

A directory holds activations of one kind: of the same weights, depth, preprocessing and type. `cache.json` names them,
and the directory's name is their hash. Several processes may write at once, each into two files of its own: one
activation after the other in `<writer>.bin`, and then a line for each in `<writer>.index`. So a process that dies at
any moment loses only the activation in hand.

An entry belongs to one state of an audio file: its real path, size and time of change. A line of an index begins with
its own CRC-32, which covers the directory's name, and holds that of its activation, which is checked when it is first
read: a damaged activation is never used. `python -m tools.caches` builds, verifies, lists and clears caches.
"""

import errno
import hashlib
import json
import os
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
from config import extra
from freeze import drop_prefix, prefix_depth
from machine.audio import path_finder, settled_states
from machine.fast import send
from machine.hardware import parallel, replace
from model import EmotionModel

FORMAT = 3  # raise it when the same identity would mean other numbers, or the same numbers other files
SHARD_BYTES = 1 << 31
LINE_BYTES = 100  # of an index, beside the path
FULL_DISK = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error
ENTRY = np.dtype([("crc32", "u4"), ("shard", "i4"), ("offset", "i8"), ("frames", "i4"), ("checked", "?")])
CPU = torch.device("cpu")


class Line(NamedTuple):
    """A line of an index: where the stored rows are, and the state of the audio file."""

    crc32: int
    shard: str
    offset: int
    frames: int
    size: int
    mtime_ns: int
    source: str  # path, and `#t=START,END` for a part


class ActivationCache:
    """Activations `(T, width)` of numbered utterances. One thread writes; one more may read beside it.

    Other processes may do both: `has`, before it says no, and `write` look for what they have added.
    """

    def __init__(
        self, root: str | Path, identity: dict, paths: Sequence[str], width: int, dtype: torch.dtype, rows: int = 0
    ):
        """Open or create the cache for `identity`, a description that JSON can hold; `paths` are the audio files.

        `rows` is the number that each has, 0 for one a frame. Where a file has just changed this waits for up to 2 s,
        until a further change would get another time.
        """
        identity = {"format": FORMAT, **identity, "width": width, "dtype": str(dtype).removeprefix("torch.")}
        self.directory = Path(root) / directory_name(identity)
        self.paths, self.width, self.dtype, self.rows = paths, width, dtype, rows
        self.row_bytes = width * dtype.itemsize
        self.int8 = extra("machine.int8", "cache_dtype: int8") if dtype == torch.int8 else None
        self.scale_rows = self.int8.SCALE_ROWS if self.int8 else 0  # stored before the frames
        assert width % 4 == 0 or not self.scale_rows, "scales in fp32 lie at multiples of 4 bytes"
        self.real_path = path_finder()
        # Real paths without an activation; a file may be in the corpus twice. Numbered, as entries and states are.
        self.missing: dict[str, int] = {}
        places = (self.missing.setdefault(path, len(self.missing)) for path in map(self.real_path, paths))
        self.place_of = np.fromiter(places, "i4", len(paths))  # of each utterance
        self.entries = np.zeros(len(self.missing), ENTRY)  # frames 0: not there
        self.states = settled_states(list(self.missing))  # sizes and times of change before the files were read
        self.lock = threading.RLock()
        self.seen: dict[str, int] = {}  # bytes of each index that have been read
        self.shards: dict[str, int] = {}  # numbers by name
        self.readers: dict[int, Any] = {}
        self.writer: tuple[BinaryIO, ...] = ()  # shard and index of this process, once it has written
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            read_description(self.directory)
        except (FileNotFoundError, ValueError):
            replace(self.directory / "cache.json", lambda file: file.write_bytes(to_json(identity)))
        self.writable = os.access(self.directory, os.W_OK)
        self.load_index()

    def load_index(self) -> None:
        """Find what is missing among the lines not yet read; one past the end of its shard is passed over."""
        with self.lock:
            shard_size = lru_cache(lambda shard: file_size(self.directory / shard))
            for line in read_index(self.directory, self.seen) if self.missing else ():
                path = line.source if line.source in self.missing else self.real_path(line.source)
                if path not in self.missing or self.states[self.missing[path]] != (line.size, line.mtime_ns):
                    continue
                if line.offset + (line.frames + self.scale_rows) * self.row_bytes <= shard_size(line.shard):
                    self.note(path, line, checked=False)

    def note(self, path: str, line: Line, checked: bool) -> None:
        """From here on the activation of this file is there."""
        shard = self.shards.setdefault(line.shard, len(self.shards))
        self.entries[self.missing.pop(path)] = line.crc32, shard, line.offset, line.frames, checked
        if not self.missing:
            self.missing, self.states = {}, []  # an emptied dictionary keeps its memory

    def note_user(self, path: str | Path, backbone: str) -> None:
        """Leave the path of a run or config that uses this cache, and its backbone's name, for `tools.caches list`."""
        path = os.path.abspath(path)
        note = self.directory / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}.user"
        with suppress(OSError):  # a cache that others may only read
            note.write_text(json.dumps({"path": path, "backbone": backbone}), encoding="utf-8")

    def has(self, numbers: Sequence[int]) -> bool:
        """Whether all of these utterances are there by now."""
        places = self.place_of[np.asarray(numbers, int)]
        if not self.entries["frames"][places].all():
            self.load_index()
        return bool(self.entries["frames"][places].all())

    def read(self, numbers: Sequence[int], device: torch.device = CPU) -> tuple[Tensor, list[int]]:
        """Packed activations `(N, width)` on the device and lengths; fp32 from int8. Raises ValueError for damage."""
        stored, lengths = self.read_stored(numbers)
        return self.decode(send(stored, device), lengths), lengths

    def read_stored(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
        """The rows that the files hold, `(rows, width)` in the cache's type on the CPU, and lengths in frames."""
        places = self.place_of[np.asarray(numbers, int)]
        lengths = self.entries["frames"][places].tolist()
        assert all(lengths), "ask `has` first"
        rows = [length + self.scale_rows for length in lengths]
        stored = torch.empty(sum(rows), self.width, dtype=self.dtype)
        for number, place, part in zip(numbers, places, stored.split(rows), strict=True):
            self.read_entry(number, self.entries[place], part.view(torch.uint8).numpy())
        return stored, lengths

    def read_entry(self, number: int, entry: np.void, out: np.ndarray) -> None:
        """Fill `out` with the rows of one utterance. Raises ValueError if they are not what was written."""
        shard, problem = int(entry["shard"]), "is damaged"
        try:
            with self.lock:  # a file has one position
                if shard not in self.readers:
                    self.readers[shard] = (self.directory / list(self.shards)[shard]).open("rb", buffering=0)
                self.readers[shard].seek(entry["offset"])
                whole = self.readers[shard].readinto(out.data.cast("B")) == out.nbytes
        except OSError as error:
            whole, problem = False, f"cannot be read ({error.strerror or error})"
        if not whole or not (entry["checked"] or zlib.crc32(out.data) == entry["crc32"]):
            raise ValueError(
                f"{self.directory / list(self.shards)[shard]}: the activation of {self.paths[number]} {problem}; "
                f"python -m tools.caches verify --repair {self.directory} forgets it, and the next run computes only "
                "that again"
            )
        entry["checked"] = True

    def decode(self, stored: Tensor, lengths: Sequence[int]) -> Tensor:
        """Packed activations `(N, width)` of stored rows, on any device: as they are, or fp32 from int8."""
        if self.int8 is None:
            return stored
        parts = stored.split([length + self.scale_rows for length in lengths])
        return torch.cat([self.int8.from_int8(rows) for rows in parts])

    def write(self, numbers: Sequence[int], packed: Tensor, lengths: Sequence[int]) -> Tensor:
        """Store packed activations `(N, width)` of those not yet there; returns them as `read` would.

        So the epoch that fills the cache trains on what the next ones will read. A read-only directory stays as it is.
        """
        self.load_index()
        rounded, stored = packed.to("cpu", torch.float32 if self.scale_rows else self.dtype), []
        for number, part, computed in zip(numbers, rounded.split(lengths), packed.split(lengths), strict=True):
            with self.lock:
                if self.entries["frames"][self.place_of[number]]:
                    stored.append(self.read_stored([number])[0])
                    continue
                if not part.isfinite().all():
                    largest, what = computed.abs().max().item(), f"the activation of {self.paths[number]} does not fit"
                    why = "set cache_dtype: float32" if largest < torch.inf else "the model yields no numbers for it"
                    raise ValueError(f"{what} {self.dtype} (largest {largest:.3g}); {why}")
                stored.append(self.int8.to_int8(part) if self.int8 else part.contiguous())
                if self.writable:
                    self.append(number, stored[-1], len(part))
        return self.decode(torch.cat(stored), lengths)

    def append(self, number: int, stored: Tensor, frames: int) -> None:
        """Add the rows of one activation. Raises OSError if they cannot be written; what was written before stays."""
        path, content = self.real_path(self.paths[number]), stored.view(torch.uint8).numpy().tobytes()
        if path not in self.missing:  # a link has changed under this run
            return
        try:
            if not self.writer:  # two new files, which stay open until `close_writer`
                stem = self.directory / uuid.uuid4().hex[:12]
                self.writer = stem.with_suffix(".bin").open("xb"), stem.with_suffix(".index").open("xb")
            shard, index = self.writer
            where = zlib.crc32(content), Path(shard.name).name, shard.tell(), frames
            line = Line(*where, *self.states[self.missing[path]], path)
            shard.write(content)
            shard.flush()
            index.write(make_line(line, self.directory.name))
            index.flush()
        except OSError as error:
            self.close_writer()  # half of what failed is in its files: nothing may follow it
            remedy = f"{'free space, or ' if error.errno in FULL_DISK else ''}set cache_dir or cache: false"
            raise OSError(f"cache {self.directory}: {error.strerror or error}; {remedy}") from None
        self.note(path, line, checked=True)
        if shard.tell() > SHARD_BYTES:
            self.close_writer()

    def close_writer(self) -> None:
        """Close the files that this process writes; the next activation begins new ones."""
        for file in self.writer:
            with suppress(OSError):  # a full disk again, of which the user has been told
                file.close()
        self.writer = ()

    def close(self) -> None:
        """Close all files."""
        self.close_writer()
        for file in self.readers.values():
            file.close()
        self.readers = {}

    def space(self, seconds: float) -> int:
        """Bytes on the disk, with the index, of what is missing of `seconds` of audio; 0 where nothing is stored."""
        rows = (self.rows or 50 * seconds / max(len(self.entries), 1)) + self.scale_rows  # of each file
        lines = sum(LINE_BYTES + len(path) for path in self.missing)
        return int(len(self.missing) * rows * self.row_bytes) + lines if self.writable else 0

    def stored_bytes(self) -> int:
        """Bytes of the activations that are there."""
        frames = self.entries["frames"]
        return (int(frames.sum(dtype=np.int64)) + int(np.count_nonzero(frames)) * self.scale_rows) * self.row_bytes


def directory_name(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def to_json(identity: dict) -> bytes:
    return json.dumps(identity, indent=2).encode()


def file_size(path: Path) -> int:
    """Bytes; 0 of a file that is not there."""
    return path.stat().st_size if path.is_file() else 0


def make_line(line: tuple, name: str) -> bytes:
    """The text of a line in the index of the cache of this name: its CRC-32, then its values."""
    text = json.dumps(line).encode()
    return b"%08x %s\n" % (zlib.crc32(text, zlib.crc32(name.encode())), text)


def read_line(text: bytes, name: str) -> Line | None:
    """The line that `make_line` wrote; None if it is damaged."""
    values = text[9:-1]
    if text[:9] != b"%08x " % zlib.crc32(values, zlib.crc32(name.encode())):
        return None
    with suppress(ValueError, RecursionError):  # not by us
        match json.loads(values):
            case [int(crc), str(shard), int(offset), int(frames), int(), int(), str()] as line:
                sane = 0 <= crc < 2**32 and 0 <= offset < 2**62 and 0 < frames < 2**31 and Path(shard).name == shard
                return Line(*line) if sane else None
    return None


def read_index(directory: Path, seen: dict[str, int] | None = None) -> Iterator[Line]:
    """Every whole line of every index of a cache, beyond the bytes of each that were `seen` before; adds to these."""
    seen = {} if seen is None else seen
    for index in sorted(directory.glob("*.index")):
        if file_size(index) == seen.get(index.name):
            continue
        with suppress(FileNotFoundError), open(index, "rb") as file:  # deleted meanwhile
            file.seek(seen.get(index.name, 0))
            for text in file:
                if not text.endswith(b"\n"):  # torn, or not yet whole
                    break
                seen[index.name] = seen.get(index.name, 0) + len(text)
                if line := read_line(text, directory.name):
                    yield line


def read_description(directory: Path) -> dict:
    """What `cache.json` says: the identity, with "width" and "dtype". Raises FileNotFoundError, or ValueError."""
    path = directory / "cache.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: is no cache, it has no cache.json")
    with suppress(ValueError, RecursionError):
        identity = json.loads(content := path.read_bytes())
        if to_json(identity) == content and directory_name(identity) == directory.name:
            return identity
    raise ValueError(f"{path}: does not describe a cache of this name; a run that uses it writes it anew")


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
    """The cache for a model's frozen prefix over these files; `backbone` is a SHA-256. Says what stops its use."""
    config, depth, rows = model.backbone.config, prefix_depth(model), 0
    identity: dict[str, Any] = {"backbone": backbone, "depth": depth, "precision": precision}
    identity["normalize_waveform"] = config.normalize_waveform
    if depth > config.layers:
        identity["pooling"] = model.pooling
        rows = {"mean_std": 2, "layers": config.layers + 1}.get(model.pooling, 1)
    if tf32:  # products with 10 bits of mantissa are other numbers
        identity["tf32"] = True
    width = config.conv_channels[-1] if depth < 0 else config.width
    cache = ActivationCache(root, identity, paths, width, getattr(torch, dtype), rows)
    if cache.missing and parallel.rank() == 0:
        say_what_is_missing(cache)
    return cache


def say_what_is_missing(cache: ActivationCache) -> None:
    """A note where it will not be stored, and where the cache has it under another path: same name, size and time."""
    lacks = f"note: cache {cache.directory} lacks {len(cache.missing):,} files"
    if not cache.writable:
        data.say_once(f"{lacks} and is read-only: they are computed in every epoch; set cache_dir to keep them")
    missing = {(os.path.basename(path), *cache.states[place]): path for path, place in cache.missing.items()}
    lines = read_index(cache.directory)
    known = ((line.source, missing.get((os.path.basename(line.source), line.size, line.mtime_ns))) for line in lines)
    if moved := [(old, new) for old, new in known if new and new != old]:
        count, (old, new) = f"{lacks} and has {len(moved):,} of them under another path", moved[0]
        data.say_once(f"{count}, {old} for {new}; to use that, stop and put a link from each old folder to the new one")


@dataclass
class Prefix:
    """The frozen prefix's output for numbered utterances: computed, or read from a cache that it fills as it goes."""

    model: EmotionModel
    paths: Sequence[str]
    device: torch.device
    dtype: torch.dtype  # of autocast, or fp32
    cache: ActivationCache | None = None
    at_once: int | None = None  # utterances that are computed together at most
    complete: bool = False  # then the cache has everything, and the prefix's weights are gone
    seconds: float = 0.0  # spent on computing and writing what the cache lacked

    def __post_init__(self) -> None:
        self.depth = prefix_depth(self.model)
        self.reader: Any = self.cache  # or `machine.gpu.OnGPU`

    def __call__(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, list[int]]]:
        """Packed activations `(N, width)` in fp32 on the device, and lengths, of each batch; one is read ahead."""
        for numbers, loaded in zip(batches, data.prefetch(self.load, batches), strict=True):
            x, lengths = loaded if isinstance(loaded, tuple) else self.compute(numbers, loaded)
            yield send(x, self.device).float(), lengths

    def load(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]] | list[Tensor]:
        """A batch from the cache, or all of its waveforms even if only one is missing, so that results repeat."""
        if self.cache is not None and self.cache.has(numbers):
            return self.reader.read(numbers, self.device)
        return [data.read_audio(self.paths[number]) for number in numbers]

    @torch.no_grad()
    def compute(self, numbers: Sequence[int], waveforms: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Packed activations and lengths of waveforms, as the cache will give them back."""
        start, size = time.perf_counter(), self.at_once or len(waveforms)
        packed, lengths = [], []
        for part in (list(waveforms[i : i + size]) for i in range(0, len(waveforms), size)):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                sent = send(torch.cat(part), self.device).split([len(waveform) for waveform in part])  # one copy
                x, frames = self.model.encode(sent, self.depth)
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
        if tier == "gpu" or (tier == "auto" and self.device.type == "cuda"):
            self.reader = extra("machine.gpu", f"cache_tier: {tier}").pick(tier, self.cache, self.device)
