"""The care of activation caches: fill them, find damage, list what they take and who uses them, delete them.

python -m tools.caches build configs/partial3_cached.yaml      fill the caches that configs use, in one pass
torchrun --nproc_per_node=2 -m tools.caches build ...          the same, each of two processes computing half of it
python -m tools.caches verify cache/1f0c3a... [--repair]       read everything, name what is damaged, and forget it
python -m tools.caches list cache                              size, content, last use and users of each cache
python -m tools.caches clear cache/1f0c3a... [--gone]          delete these caches, or what they hold of lost files
"""

import argparse
import json
import os
import random
import sys
import time
import uuid
import zlib
from collections.abc import Sequence
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
    Line,
    file_size,
    make_line,
    open_cache,
    pooled_rows,
    read_description,
    read_index,
    read_line,
)
from config import Config, load_config, split_words
from freeze import prefix_depth
from machine import hardware
from machine.audio import file_state
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
    recorded = {line.source: is_current(line) for line in read_index(directory)}  # of several lines the last counts
    lost, notes = len(recorded) - sum(recorded.values()), []
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
        f"{f' ({lost:,} of files that are gone or have changed)' if lost else ''}, last used {used}",
        f"  {', '.join(sources)}, hidden state {identity.get('depth')}, {identity['width']} of {identity['dtype']}",
    ]
    lines += [f"  used by {user}" for user in users or ["nothing that still exists"]]
    lines += ["  written by another version; no longer used"] if identity.get("format") != FORMAT else []
    return "\n".join(lines)


def is_current(line: Line) -> bool:
    """Whether the audio file of an entry is there, and is what it was."""
    return file_state(line.source) == (line.size, line.mtime_ns)


def clear(names: list[str], root: str | Path = "cache", only_lost: bool = False) -> str:
    """Delete caches, each a directory or the name of one below `root`; a line on each, and what was freed.

    With `only_lost` each remains, without what it holds of files that are gone or have changed. Raises ValueError or
    FileNotFoundError, before anything is deleted, for what is no cache. Files of others stay.
    """
    chosen = [Path(name) if Path(name).is_dir() else Path(root) / name for name in names]
    for directory in chosen:
        read_description(Path(os.path.abspath(directory)))
    lines, total = [], 0
    for directory in dict.fromkeys(chosen):
        before = size(directory)
        drop_lost(Path(os.path.abspath(directory))) if only_lost else delete(directory)
        freed = before - (size(directory) if directory.is_dir() else 0)
        lines.append(f"{directory}: freed {freed / 1e6:,.1f} MB")
        total += freed
    return "\n".join([*lines, f"freed {total / 1e6:,.1f} MB in all"])


def delete(directory: Path) -> None:
    """Delete a cache: `cache.json` last, so that what remains after a kill is still known as a cache."""
    for path in sorted(files(directory), key=lambda path: path.name == "cache.json"):
        path.unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()


def drop_lost(directory: Path) -> None:
    """Copy what is current into new files and delete the old ones; no run may use the cache meanwhile."""
    identity = read_description(directory)
    for index in sorted(directory.glob("*.index")):
        lines = [line for text in index.read_bytes().splitlines(True) if (line := read_line(text, directory.name))]
        current = [line for line in lines if is_current(line)]
        if len(current) == len(lines):
            continue
        stem = directory / uuid.uuid4().hex[:12]
        with stem.with_suffix(".bin").open("xb") as shard, stem.with_suffix(".index").open("xb") as new_index:
            for line in current:
                rows = read_part(directory / line.shard, line.offset, stored_size(identity, line))
                if rows is not None:  # else it is computed again
                    moved = line._replace(shard=f"{stem.name}.bin", offset=shard.tell())
                    shard.write(rows)
                    new_index.write(make_line(moved, directory.name))
        index.unlink()  # from here on the new files count alone
        for name in {line.shard for line in lines}:
            (directory / name).unlink(missing_ok=True)


def stored_size(identity: dict, line: Line) -> int:
    """Bytes of an activation in its shard."""
    scale_rows = SCALE_ROWS if identity["dtype"] == "int8" else 0
    return (line.frames + scale_rows) * identity["width"] * getattr(torch, identity["dtype"]).itemsize


def verify(directory: str | Path, repair: bool = False) -> list[str]:
    """Read every activation of a cache; the audio paths of those whose bytes are not what was written.

    What lies past the end of its shard counts only where no whole one took its place: reading passes it over too. A
    damaged line of an index is given as it stands there. `repair` takes the lines of all that is damaged out of the
    index, so that the next run computes it anew; no run may use the cache meanwhile.
    """
    directory = Path(os.path.abspath(directory))
    identity = read_description(directory)
    whole, cut, damaged = set(), [], []
    for index in sorted(directory.glob("*.index")):
        with open(index, "rb") as file:
            texts, kept = file.readlines(), []
        for number, text in enumerate(texts, 1):
            line, ended = read_line(text, directory.name), text.endswith(b"\n")
            if line is None or not ended:
                if line or ended:  # else torn, by a full disk or a process that was killed
                    damaged.append(f"{index}, line {number}: {text.rstrip().decode('ascii', 'backslashreplace')}")
                continue
            rows = read_part(directory / line.shard, line.offset, stored_size(identity, line))
            if rows is None:
                cut.append(line.source)
            elif zlib.crc32(rows) != line.crc32:
                damaged.append(line.source)
            else:
                whole.add(line.source)
                kept.append(text)
        if repair and len(kept) < len(texts):
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
        if cache.missing and not cache.writable:
            raise OSError(
                f"cache {cache.directory}: is read-only and lacks {len(cache.missing):,} files; set cache_dir"
            )
        cache.note_user(path, backbone["source"])
        kind = audio, backbone["sha256"], model.backbone.config.normalize_waveform, device, precision, tf32
        group = groups.setdefault(kind, [])
        same = [job for job in group if job.cache.directory == cache.directory]
        job = same[0] if same else Job(config, model, cache, prefix_depth(model))
        job.paths.append(path)
        group += [] if same else [job]
        for other in group:
            if other is not max(group, key=lambda job: job.depth):
                other.model.to("meta")  # the deepest computes for all
    hardware.require_space(
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

    audio = data.prefetch(load, missing)
    for numbers in tqdm(missing, desc="cache", unit="batch", disable=parallel.rank() > 0 or None):
        begin = time.perf_counter()
        waveforms = next(audio)
        wanted = [job for job in jobs if waveforms and not job.cache.has(numbers)]
        depths = sorted({depth for job in wanted for depth in job.model.sources(job.depth)})
        states = deepest.model.states([send(waveform, device) for waveform in waveforms], depths)
        parts: list[list[Tensor]] = [[] for _ in wanted]
        shared = time.perf_counter() - begin  # seconds up to this depth, which each cache alone would need as well
        for depth in depths:
            begin = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                x, lengths = next(states)
            hardware.synchronize(device)
            shared += time.perf_counter() - begin
            for job, own in zip(wanted, parts, strict=True):
                begin, sources = time.perf_counter(), job.model.sources(job.depth)
                if depth in sources:
                    own.append(job.model.part(x, lengths, job.depth))
                if depth == sources[-1]:
                    job.cache.write(numbers, *job.model.join(own, lengths))
                    job.seconds = (job.seconds or 0.0) + shared
                if depth in sources:
                    job.seconds = (job.seconds or 0.0) + time.perf_counter() - begin
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
    lost = (
        "keep the caches, and delete what they hold of files that are gone or have changed; an unmounted disk is gone"
    )
    cleared.add_argument("--gone", action="store_true", help=lost)
    arguments = parser.parse_args()
    if arguments.command == "list":
        print(list_caches(arguments.directory))
    elif arguments.command == "clear":
        print(clear(arguments.names, only_lost=arguments.gone))
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
