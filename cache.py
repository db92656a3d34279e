"""The activation cache: what the frozen prefix makes of each utterance, on disk.

A directory holds activations of one kind: of the same weights, depth, preprocessing and type, which `cache.json` tells.
Every process that writes has two files of its own, `<writer>.bin` with activations one after the other and
`<writer>.csv` with a line for each, written after its activation: whatever moment a process dies at, only what it had
in hand is lost, and several may write at once. An entry is for one state of one audio file (path, size, time of
change) and is checked against its CRC-32 the first time it is read: a wrong activation is never used.

    python cache.py build configs/partial3_cached.yaml     fill the cache that a config uses
    python cache.py verify cache/1f0c3a...                 read everything, name what is damaged
"""

import argparse
import csv
import hashlib
import json
import math
import os
import shutil
import sys
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FORMAT = 1  # raise it when the same identity would mean other numbers
SHARD_BYTES = 1 << 31
COLUMNS = ("crc32", "shard", "offset", "frames", "size", "mtime_ns", "path")
ENCODING = {"encoding": "utf-8", "errors": "surrogateescape"}  # a path need not be UTF-8
ENTRY = np.dtype([("crc32", "u4"), ("shard", "i4"), ("offset", "i8"), ("frames", "i4"), ("checked", "?")])


class ActivationCache:
    """Activations `(T, width)` of numbered utterances. One thread writes; one more may read beside it."""

    def __init__(self, root: str | Path, identity: dict, paths: Sequence[str], width: int, dtype: torch.dtype):
        """Open or create the cache for `identity`, a description that JSON can hold; `paths` are the audio files."""
        identity = {"format": FORMAT, **identity, "width": width, "dtype": str(dtype).removeprefix("torch.")}
        self.directory = Path(root) / directory_name(identity)
        self.paths, self.width, self.dtype = paths, width, dtype
        self.row_bytes = width * dtype.itemsize
        self.entries = np.zeros(len(paths), ENTRY)  # frames 0: not there
        self.shards: list[str] = []
        self.readers: dict[int, object] = {}
        self.writer: tuple | None = None
        self.directory.mkdir(parents=True, exist_ok=True)
        description = self.directory / "cache.json"
        if not description.is_file():
            beside = description.with_suffix(f".{uuid.uuid4().hex}.tmp")
            beside.write_text(json.dumps(identity, indent=2), encoding="utf-8")
            os.replace(beside, description)
        self.load_index()

    def load_index(self) -> None:
        """Find the entries of our paths; one for another state of a file, or past the end of its shard, is none."""
        number_of: dict[str, int] = {}  # a file may be in the corpus twice
        first = [number_of.setdefault(os.path.abspath(path), number) for number, path in enumerate(self.paths)]
        shards: dict[str, tuple[int, int]] = {}  # number and size
        for crc, name, offset, frames, size, mtime_ns, path in read_index(self.directory):
            if (number := number_of.get(path)) is None or file_state(path) != (size, mtime_ns):
                continue
            if name not in shards:
                shards[name] = len(self.shards), file_size(self.directory / name)
                self.shards.append(name)
            shard, shard_size = shards[name]
            if offset + frames * self.row_bytes <= shard_size:
                self.entries[number] = (crc, shard, offset, frames, False)
        self.entries = self.entries[first]

    def has(self, numbers: Sequence[int]) -> bool:
        """Whether all of these utterances are there."""
        return bool((self.entries["frames"][np.asarray(numbers, int)] > 0).all())

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Packed activations `(N, width)` in the cache's type, and lengths. Raises ValueError for a damaged entry."""
        entries = self.entries[np.asarray(numbers, int)]
        assert (entries["frames"] > 0).all(), "ask `has` first"
        packed = torch.empty(int(entries["frames"].sum()), self.width, dtype=self.dtype)
        start = 0
        for number, entry in zip(numbers, entries, strict=True):
            part = packed[start : start + int(entry["frames"])].view(torch.uint8).numpy()
            file = self.reader(int(entry["shard"]))
            file.seek(int(entry["offset"]))
            whole = file.readinto(memoryview(part).cast("B")) == part.nbytes
            if not whole or not (entry["checked"] or zlib.crc32(part) == entry["crc32"]):
                raise ValueError(
                    f"{self.directory / self.shards[entry['shard']]}: the activation of {self.paths[number]} is "
                    f"damaged; delete {self.directory} and run again to compute it anew"
                )
            self.entries["checked"][number] = True
            start += int(entry["frames"])
        return packed, entries["frames"].tolist()

    def write(self, numbers: Sequence[int], packed: Tensor, lengths: Sequence[int]) -> Tensor:
        """Store packed activations `(N, width)` of those not yet there; returns them as `read` would.

        The rounded values are returned so that the epoch that fills the cache trains on what the next ones will read.
        """
        stored = packed.to("cpu", self.dtype)
        start = 0
        for number, part in zip(numbers, stored.split(list(lengths)), strict=True):
            if not part.isfinite().all():
                largest = packed[start : start + len(part)].abs().max().item()
                what = f"the activation of {self.paths[number]} does not fit {self.dtype} (largest {largest:.3g}); "
                advice = "set cache_dtype: float32" if math.isfinite(largest) else "the model yields no numbers for it"
                raise ValueError(what + advice)
            if not self.has([number]):
                self.append(number, part.contiguous())
            start += len(part)
        return stored

    def append(self, number: int, part: Tensor) -> None:
        """Add one activation `(T, width)`. Raises OSError if it cannot be written; what was written before stays."""
        data = part.view(torch.uint8).numpy().tobytes()
        crc, path = zlib.crc32(data), os.path.abspath(self.paths[number])
        size, mtime_ns = file_state(path) or (-1, -1)
        try:
            name, shard, index = self.writer or self.open_writer()
            offset = shard.tell()
            shard.write(data)
            shard.flush()
            csv.writer(index).writerow((crc, name, offset, len(part), size, mtime_ns, path))
            index.flush()
        except OSError as error:
            self.close_writer()  # half of what failed is in its files: nothing may follow it
            reason = error.strerror or error
            raise OSError(f"cache {self.directory}: {reason}; free space, or set cache_dir or cache: false") from None
        self.entries[number] = (crc, self.shards.index(name), offset, len(part), True)
        if offset + len(data) > SHARD_BYTES:
            self.close_writer()

    def open_writer(self) -> tuple:
        """Two new files, which stay open until `close_writer`."""
        name = uuid.uuid4().hex[:12]
        shard, index = self.directory / f"{name}.bin", self.directory / f"{name}.csv"
        self.writer = shard.name, shard.open("xb"), index.open("x", newline="", **ENCODING)
        csv.writer(self.writer[2]).writerow(COLUMNS)
        self.shards.append(shard.name)
        return self.writer

    def close_writer(self) -> None:
        for file in (self.writer or ())[1:]:
            with suppress(OSError):  # a full disk again, of which the user has been told
                file.close()
        self.writer = None

    def reader(self, shard: int) -> object:
        if shard not in self.readers:
            self.readers[shard] = (self.directory / self.shards[shard]).open("rb", buffering=0)
        return self.readers[shard]

    def check_space(self, seconds: float, pooled: bool = False) -> None:
        """Raise OSError if what is missing of `seconds` of audio, or of pooled rows, will not fit on the disk."""
        missing = int((self.entries["frames"] == 0).sum())
        rows = missing if pooled else seconds * 50 * missing / max(len(self.entries), 1)
        needed, free = int(rows * self.row_bytes), shutil.disk_usage(self.directory).free
        if needed > free:
            raise OSError(
                f"cache {self.directory}: needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB; "
                "free space, or set cache_dir or cache: false"
            )

    def close(self) -> None:
        self.close_writer()
        for file in self.readers.values():
            file.close()
        self.readers = {}


def directory_name(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def file_state(path: str) -> tuple[int, int] | None:
    """Size and time of change, by which a replaced audio file is noticed."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def read_index(directory: Path) -> Iterator[tuple[int, str, int, int, int, int, str]]:
    """`COLUMNS` of every complete line of every index; the line a killed process was writing is passed over."""
    for index in sorted(directory.glob("*.csv")):
        with open(index, newline="", **ENCODING) as file:
            whole = (line for line in file if line.endswith("\n") and "\0" not in line)  # Python 3.10 takes no \\0
            for row in csv.reader(whole):
                try:
                    crc, shard, offset, frames, size, mtime_ns, path = row
                    yield int(crc), shard, int(offset), int(frames), int(size), int(mtime_ns), path
                except ValueError:  # the header
                    continue


def verify(directory: str | Path) -> list[str]:
    """Read every activation of a cache; the audio paths of those whose bytes are not what was written.

    What lies past the end of its shard counts only where no whole one took its place: reading passes it over too.
    """
    directory = Path(directory)
    if not (directory / "cache.json").is_file():
        raise FileNotFoundError(f"{directory}: is no cache, it has no cache.json")
    try:
        identity = json.loads((directory / "cache.json").read_text(encoding="utf-8"))
        row_bytes = identity["width"] * getattr(torch, identity["dtype"]).itemsize
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{directory / 'cache.json'}: does not describe a cache") from None
    whole, cut, damaged = set(), [], []
    for crc, shard, offset, frames, _, _, path in read_index(directory):
        size, data = frames * row_bytes, b""
        with suppress(OSError), open(directory / shard, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            cut.append(path)
        elif zlib.crc32(data) != crc:
            damaged.append(path)
        else:
            whole.add(path)
    return damaged + [path for path in cut if path not in whole]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill or check activation caches.")
    commands = parser.add_subparsers(dest="command", required=True)
    build_parser = commands.add_parser("build", help="fill the cache that a config uses")
    build_parser.add_argument("config")
    build_parser.add_argument("overrides", nargs="*", metavar="key=value")
    commands.add_parser("verify", help="name damaged activations").add_argument("directory")
    arguments = parser.parse_args()
    if arguments.command == "verify":
        damaged = verify(arguments.directory)
        print("\n".join(damaged) or "every activation is as it was written")
        sys.exit(bool(damaged))
    from run import build_cache

    build_cache(arguments.config, arguments.overrides)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
