"""Activation caches as files: what is damaged, what each takes, who uses it, how to be rid of it.

`cache.py` has the command line.
"""

import json
import os
import time
import zlib
from contextlib import suppress
from pathlib import Path

import torch

from cache import (
    FORMAT,
    SCALE_ROWS,
    directory_name,
    file_size,
    file_state,
    read_description,
    read_index,
    read_line,
)
from machine.hardware import replace

PARTS = (".bin", ".index", ".user", ".tmp")  # what a cache is made of, beside cache.json
PARTS += (".csv",)  # the index until format 2


def list_caches(root: str | Path) -> str:
    """A few lines on each cache below `root`, the largest first. Raises FileNotFoundError if there is no folder."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected one of caches, as cache_dir names it")
    caches = sorted((path.parent for path in root.glob("*/cache.json")), key=size, reverse=True)
    total = f"{root}: {len(caches)} caches, {sum(map(size, caches)) / 1e6:,.1f} MB"
    return "\n".join([*map(describe, caches), total])


def describe(directory: Path) -> str:
    """Size, content, age and users of a cache; users are those runs and configs that are still there."""
    try:
        identity = read_description(directory)
    except ValueError as error:
        return f"{directory}: {size(directory) / 1e6:,.1f} MB, cannot be told: {error}"
    utterances = len({path for *_, path in read_index(directory)})
    notes = []
    for path in directory.glob("*.user"):
        with suppress(OSError, ValueError):  # torn, by a process that was killed
            match json.loads(path.read_text(encoding="utf-8")):
                case {"path": str(user), "backbone": str(source)}:
                    notes.append((user, source))
    users = sorted(user for user, _ in notes if os.path.exists(user))
    sources = sorted({source for _, source in notes}) or [f"SHA-256 {str(identity.get('backbone'))[:12]}..."]
    changed = max((file_state(path) or (0, 0))[1] for path in files(directory)) / 1e9
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(changed))
    lines = [
        f"{directory}: {size(directory) / 1e6:,.1f} MB, {utterances:,} utterances, last used {used}",
        f"  {', '.join(sources)}, hidden state {identity.get('depth')}, {identity['width']} of {identity['dtype']}",
    ]
    lines += [f"  used by {user}" for user in users or ["nothing that is still there"]]
    lines += ["  of another version: read no more"] if identity.get("format") != FORMAT else []
    return "\n".join(lines)


def clear(names: list[str], root: str | Path = "cache") -> str:
    """Delete caches, each a directory or the name of one below `root`; a line on each, and what was freed.

    Raises ValueError or FileNotFoundError, before anything is deleted, for what is no cache. Files of others stay.
    """
    chosen = {name: Path(name) if Path(name).is_dir() else Path(root) / name for name in names}
    for directory in chosen.values():
        read_description(directory)
    lines, total = [], 0
    for directory in dict.fromkeys(chosen.values()):
        freed, here = size(directory), files(directory)
        for path in sorted(here, key=lambda path: path.name == "cache.json"):  # that last: what remains is a cache
            path.unlink(missing_ok=True)
        if not any(directory.iterdir()):
            directory.rmdir()
        lines.append(f"{directory}: freed {freed / 1e6:,.1f} MB")
        total += freed
    return "\n".join([*lines, f"freed {total / 1e6:,.1f} MB in all"])


def verify(directory: str | Path, repair: bool = False) -> list[str]:
    """Read every activation of a cache; the audio paths of those whose bytes are not what was written.

    What lies past the end of its shard counts only where no whole one took its place: reading passes it over too. A
    damaged line of an index is told as it stands there. `repair` takes the lines of all that is damaged out of the
    index, so that the next run computes it anew; no run may use the cache meanwhile.
    """
    directory = Path(directory)
    identity = read_description(directory)
    row_bytes = identity["width"] * getattr(torch, identity["dtype"]).itemsize
    scale_rows = SCALE_ROWS if identity["dtype"] == "int8" else 0
    whole, cut, damaged = set(), [], []
    for index in sorted(directory.glob("*.index")):
        with open(index, "rb") as file:
            lines, kept = file.readlines(), []
        for number, line in enumerate(lines, 1):
            entry, ended = read_line(line, directory_name(identity)), line.endswith(b"\n")
            if entry is None or not ended:
                if entry or ended:  # else torn, by a full disk or a process that was killed
                    damaged.append(f"{index}, line {number}: {line.rstrip().decode('ascii', 'backslashreplace')}")
                continue
            crc, shard, offset, frames, _, _, path = entry
            data = read_part(directory / shard, offset, (frames + scale_rows) * row_bytes)
            if data is None:
                cut.append(path)
            elif zlib.crc32(data) != crc:
                damaged.append(path)
            else:
                whole.add(path)
                kept.append(line)
        if repair and len(kept) < len(lines):
            content = b"".join(kept)
            replace(index, lambda file, content=content: file.write_bytes(content))
    return damaged + [path for path in cut if path not in whole]


def read_part(path: Path, offset: int, size: int) -> bytes | None:
    """Bytes of a file, None if it has not so many."""
    if offset + size > file_size(path):
        return None
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)
    except OSError:  # a disk that is broken there
        return None


def files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name == "cache.json" or path.suffix in PARTS]


def size(directory: Path) -> int:
    return sum(file_size(path) for path in files(directory))
