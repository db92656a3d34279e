"""The care of activation caches: fill them, find damage, list what they take and who uses them, delete them.

python -m tools.caches build configs/partial3_cached.yaml      fill the caches that configs use, in one pass
torchrun --nproc_per_node=2 -m tools.caches build ...          the same, each of two processes computing half of it
python -m tools.caches verify cache/1f0c3a... [--repair]       read everything, name what is damaged, and forget it
python -m tools.caches list cache                              size, content, last use and users of each cache
python -m tools.caches clear cache/1f0c3a...                   delete these caches, and say how much that frees
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import run
from cache import (
    FORMAT,
    SCALE_ROWS,
    ActivationCache,
    directory_name,
    file_size,
    name_of,
    open_cache,
    pooled_rows,
    read_description,
    read_line,
)
from config import Config, load_config, split_words
from freeze import prefix_depth
from machine import hardware
from machine.fast import send
from machine.hardware import parallel, replace
from model import EmotionModel

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
    recorded = {entry[6] for entry in read_index(directory)}
    gone = sum(not os.path.exists(path) for path in recorded)
    notes = []
    for path in directory.glob("*.user"):
        with suppress(OSError, ValueError):  # torn, by a process that was killed
            match json.loads(path.read_text(encoding="utf-8")):
                case {"path": str(user), "backbone": str(source)}:
                    notes.append((user, source))
    users = sorted(user for user, _ in notes if os.path.exists(user))
    sources = sorted({source for _, source in notes}) or [f"SHA-256 {str(identity.get('backbone'))[:12]}..."]
    changed = max(path.stat().st_mtime_ns for path in files(directory)) / 1e9
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(changed))
    lines = [
        f"{directory}: {size(directory) / 1e6:,.1f} MB, {len(recorded):,} utterances"
        f"{f' ({gone:,} of files that are gone)' if gone else ''}, last used {used}",
        f"  {', '.join(sources)}, hidden state {identity.get('depth')}, {identity['width']} of {identity['dtype']}",
    ]
    lines += [f"  used by {user}" for user in users or ["nothing that still exists"]]
    lines += ["  written by another version; no longer used"] if identity.get("format") != FORMAT else []
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
            crc, shard, offset, frames, _, _, path, *_ = entry
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


def read_index(directory: Path) -> Iterator[list]:
    """What `read_line` gives of every whole line of every index."""
    name = name_of(directory)
    for index in sorted(directory.glob("*.index")):
        with open(index, "rb") as file:
            yield from filter(None, (read_line(line, name) for line in file if line.endswith(b"\n")))


# ---------------------------------------------------------------- build


@dataclass
class Job:
    """A cache to fill, for the configs of these paths."""

    config: Config
    model: EmotionModel  # its prefix computes; on the meta device where another job of its group computes for it
    cache: ActivationCache
    depth: int
    paths: list[str] = field(default_factory=list)
    seconds: float | None = None  # that filling it alone would have taken; None: it was complete


def build(words: Sequence[str]) -> dict[str, dict]:
    """Compute what the caches of configs lack; those alike in corpus and backbone share one pass over the audio.

    `words` are paths of configs, and `key=value` for all of them. For each path the cache's "directory", its "bytes",
    and the "seconds" that building it alone would have taken, None if it was complete.
    """
    paths, overrides = split_words(words)
    if not paths:
        raise ValueError("build: expected at least one config")
    groups: dict[tuple, list[Job]] = {}  # by all that must be alike
    seconds: dict[tuple, float] = {}  # of audio, by files
    for path in paths:
        config = load_config(path, overrides)
        device = hardware.pick_device(config.device, parallel.local_rank())
        precision = hardware.pick_precision(config.precision, device)
        with parallel.first_alone():  # it writes the demo corpus
            utterances, label_range = run.load_utterances(config)
        audio = tuple(utterance.source for utterance in utterances)
        seconds[audio] = seconds.get(audio) or sum(data.check_audio(utterances))
        with parallel.first_alone():  # it downloads
            model, backbone = run.build_model(config, label_range)
        tf32 = config.tf32 and device.type == "cuda"
        how = {"backbone": backbone["sha256"], "precision": precision, "dtype": config.cache_dtype, "tf32": tf32}
        cache = open_cache(config.cache_dir, model, audio, **how)
        cache.note_user(path, backbone["source"])
        kind = audio, backbone["sha256"], model.backbone.config.normalize_waveform, device, precision, tf32
        group = groups.setdefault(kind, [])
        same = [job for job in group if job.cache.directory == cache.directory]
        job = same[0] if same else Job(config, model, cache, prefix_depth(model))
        job.paths.append(path)
        group += [] if same else [job]
    require_space(
        {
            job.cache.directory: job.cache.space(seconds[kind[0]], pooled_rows(job.model))
            for kind, group in groups.items()
            for job in group
        }
    )
    for (*_, device, precision, tf32), group in groups.items():
        fill(group, device, precision, tf32)
    job_of = {path: job for group in groups.values() for job in group for path in job.paths}
    return {
        path: {"directory": str(job.cache.directory), "seconds": job.seconds, "bytes": job.cache.stored_bytes()}
        for path, job in ((path, job_of[path]) for path in paths)
    }


def require_space(needed: dict[Path, int]) -> None:
    """Raise OSError if a disk has less room than its caches, by directory, need together."""
    disks: dict[int, list[Path]] = {}
    for directory in needed:
        disks.setdefault(os.stat(directory).st_dev, []).append(directory)
    for directories in disks.values():
        total, free = sum(needed[directory] for directory in directories), shutil.disk_usage(directories[0]).free
        if total > free:
            raise OSError(
                f"cache {', '.join(map(str, directories))}: needs {total / 1e9:.1f} GB, the disk has {free / 1e9:.1f} "
                "GB; free space, or set cache_dir or cache: false"
            )


@torch.no_grad()
def fill(jobs: Sequence[Job], device: torch.device, precision: str, tf32: bool) -> None:
    """Complete caches that share backbone and audio: no hidden state is computed twice for a batch.

    Several commands may do so at once, each in an order of its own and without what another has done by then. The
    processes of one command share the work.
    """
    deepest = max(jobs, key=lambda job: job.depth)
    hardware.prepare(deepest.model, device, precision, tf32)
    dtype = hardware.DTYPES[precision]
    size = min(job.config.micro_batch_size or job.config.batch_size for job in jobs)
    everything = range(len(deepest.cache.paths))
    batches = parallel.share([list(everything[i : i + size]) for i in range(0, len(everything), size)])
    missing = [batch for batch in batches if not all(job.cache.has(batch) for job in jobs)]
    random.shuffle(missing)

    def load(batch: Sequence[int]) -> list[Tensor]:
        there = all(job.cache.has(batch) for job in jobs)  # by now
        return [] if there else [data.read_audio(deepest.cache.paths[number]) for number in batch]

    bar = tqdm(missing, desc="cache", unit="batch", disable=parallel.rank() > 0 or None)
    for numbers, waveforms in zip(bar, data.prefetch(load, missing), strict=True):
        wanted = [job for job in jobs if waveforms and not job.cache.has(numbers)]
        depths = sorted({depth for job in wanted for depth in job.model.sources(job.depth)})
        states = deepest.model.states([send(waveform, device) for waveform in waveforms], depths)
        parts: dict[int, list[Tensor]] = {}
        shared = 0.0  # seconds so far that every cache would have needed
        for depth in depths:
            begin = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                x, lengths = next(states)
            hardware.synchronize(device)
            shared += time.perf_counter() - begin
            for i, job in enumerate(wanted):
                if depth in (sources := job.model.sources(job.depth)):
                    begin = time.perf_counter()
                    parts.setdefault(i, []).append(job.model.part(x, lengths, job.depth))
                    if depth == sources[-1]:
                        job.cache.write(numbers, *job.model.join(parts.pop(i), lengths))
                        job.seconds = (job.seconds or 0.0) + shared + time.perf_counter() - begin
    parallel.wait()
    for job in jobs:
        job.cache.close()
        job.cache.load_index()  # with what other processes have written


# ---------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill, check, list or delete activation caches.")
    commands = parser.add_subparsers(dest="command", required=True)
    built = commands.add_parser("build", help="fill the caches that configs use, in one pass over the audio")
    built.add_argument("words", nargs="+", metavar="config | key=value", help="keys are for all of the configs")
    built.add_argument("--report", help="JSON file to write: directory, bytes and seconds of each config's cache")
    verified = commands.add_parser("verify", help="name damaged activations")
    verified.add_argument("directory")
    verified.add_argument("--repair", action="store_true", help="forget them, so that the next run computes them anew")
    listed = commands.add_parser("list", help="size, content, last use and users of each cache in a folder")
    listed.add_argument("directory", nargs="?", default="cache")
    cleared = commands.add_parser("clear", help="delete caches, without asking, and say what that freed")
    cleared.add_argument("names", nargs="+", metavar="directory", help="of a cache, or its name below ./cache")
    arguments = parser.parse_args()
    if arguments.command == "list":
        print(list_caches(arguments.directory))
    elif arguments.command == "clear":
        print(clear(arguments.names))
    elif arguments.command == "verify":
        damaged = verify(arguments.directory, arguments.repair)
        print("\n".join(damaged) or "every activation is as it was written")
        if damaged:
            advice = "forgotten: the next run computes them anew" if arguments.repair else "--repair forgets them"
            print(f"{len(damaged)} damaged; {advice}")
        sys.exit(bool(damaged))
    else:
        parallel.start()
        reports = build(arguments.words)
        for path, report in reports.items() if parallel.rank() == 0 else ():
            how = "was complete" if report["seconds"] is None else f"built in {report['seconds']:.1f} s"
            print(f"{path}: {report['directory']}, {report['bytes'] / 1e6:.1f} MB, {how}")
        if arguments.report:
            hardware.write_text(Path(arguments.report), json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command continues")
