"""Activation caches as files: what each takes, who uses it, how to be rid of it. `cache.py` has the command line."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from cache import read_description, read_index

PARTS = (".bin", ".csv", ".user", ".tmp")  # what a cache is made of, beside cache.json


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
        with suppress(ValueError):  # torn, by a process that was killed
            notes.append(json.loads(path.read_text(encoding="utf-8")))
    users = sorted(note["path"] for note in notes if os.path.exists(note["path"]))
    sources = sorted({note["backbone"] for note in notes}) or [f"SHA-256 {str(identity.get('backbone'))[:12]}..."]
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(path.stat().st_mtime for path in files(directory))))
    lines = [
        f"{directory}: {size(directory) / 1e6:,.1f} MB, {utterances:,} utterances, last used {used}",
        f"  {', '.join(sources)}, hidden state {identity.get('depth')}, {identity['width']} of {identity['dtype']}",
    ]
    return "\n".join([*lines, *(f"  used by {user}" for user in users or ["nothing that is still there"])])


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
            path.unlink()
        if not any(directory.iterdir()):
            directory.rmdir()
        lines.append(f"{directory}: freed {freed / 1e6:,.1f} MB")
        total += freed
    return "\n".join([*lines, f"freed {total / 1e6:,.1f} MB in all"])


def files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name == "cache.json" or path.suffix in PARTS]


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in files(directory))
