"""The care of activation caches: fill them, find damage, list what they take and who uses them, delete them.

`python -m tools.caches --help` lists the commands.
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
from pathlib import Path

import torch
from tqdm import tqdm

import cache
import data
import run
from cache import Prefix, file_size, read_description, read_index, read_line
from config import load_config
from machine import hardware
from machine.audio import file_state
from machine.hardware import parallel, replace
from machine.int8 import SCALE_ROWS
from machine.programs import command, split_words

PARTS = (".bin", ".index", ".user", ".tmp", ".csv")  # of a cache, beside cache.json; .csv: the index until format 2


def list_caches(root: Path) -> str:
    """A few lines on each cache below `root`, the largest first. Raises FileNotFoundError if there is no folder."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected one of caches, as cache_dir names it")
    caches = sorted((path.parent for path in root.glob("*/cache.json")), key=size, reverse=True)
    total = f"{root}: {len(caches)} caches, {sum(map(size, caches)) / 1e6:,.1f} MB"
    return "\n".join([*map(describe, caches), total])


def describe(directory: Path) -> str:
    """Size, content, age and users of a cache; users are those runs and configs that are still there."""
    text = f"{directory}: {size(directory) / 1e6:,.1f} MB, "
    try:
        identity = read_description(directory)
    except ValueError as error:
        return f"{text}cannot be told: {error}"
    recorded = {line.source: is_current(line) for line in read_index(directory)}  # of several lines the last counts
    lost, users, sources = len(recorded) - sum(recorded.values()), set(), set()
    for path in directory.glob("*.user"):
        with suppress(OSError, ValueError):  # torn, by a process that was killed
            match json.loads(path.read_text(encoding="utf-8")):
                case {"path": str(user), "backbone": str(source)}:
                    sources.add(source)
                    users.add(user)
    used = time.localtime(max(path.stat().st_mtime for path in files(directory)))
    text += f"{len(recorded):,} utterances{f' ({lost:,} of files that are gone or have changed)' if lost else ''}, "
    text += time.strftime("last used %Y-%m-%d %H:%M\n  ", used)
    text += ", ".join(sorted(sources)) or f"SHA-256 {str(identity.get('backbone'))[:12]}..."
    text += f", hidden state {identity.get('depth')}, {identity['width']} of {identity['dtype']}"
    for user in sorted(filter(os.path.exists, users)) or ["nothing that still exists"]:
        text += f"\n  used by {user}"
    return text + "\n  written by another version; no longer used" * (identity.get("format") != cache.FORMAT)


def is_current(line: cache.Line) -> bool:
    """Whether the audio file of an entry is there, and is what it was."""
    return file_state(line.source) == (line.size, line.mtime_ns)


def files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name == "cache.json" or path.suffix in PARTS]


def size(directory: Path) -> int:
    return sum(map(file_size, files(directory))) if directory.is_dir() else 0


# ---------------------------------------------------------------- clear and verify


def clear(names: list[str], only_lost: bool = False) -> str:
    """Delete caches, each a directory or the name of one below ./cache; a line on each, and what was freed.

    `only_lost` deletes what they hold of files that are gone or have changed. Files of others stay. Raises ValueError
    or FileNotFoundError for what is no cache, before anything is deleted.
    """
    chosen = dict.fromkeys(Path(name) if Path(name).is_dir() else Path("cache", name) for name in names)
    identities = [read_description(Path(os.path.abspath(directory))) for directory in chosen]
    freed = {}  # MB
    for directory, identity in zip(chosen, identities, strict=True):
        before = size(directory)
        drop_lost(Path(os.path.abspath(directory)), identity) if only_lost else delete(directory)
        freed[directory] = (before - size(directory)) / 1e6
    lines = [f"{directory}: freed {amount:,.1f} MB" for directory, amount in freed.items()]
    return "\n".join([*lines, f"freed {sum(freed.values()):,.1f} MB in all"])


def delete(directory: Path) -> None:
    """Delete a cache: `cache.json` last, so that what remains after a kill is still known as a cache."""
    for path in sorted(files(directory), key=lambda path: path.name == "cache.json"):
        path.unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()


def drop_lost(directory: Path, identity: dict) -> None:
    """Copy what is current into new files and delete the old ones; no run may use the cache meanwhile."""
    for index in sorted(directory.glob("*.index")):
        lines = [line for _, line in read_lines(index) if line]
        current = [line for line in lines if is_current(line)]
        if len(current) == len(lines):
            continue
        stem = directory / uuid.uuid4().hex[:12]
        with stem.with_suffix(".bin").open("xb") as shard, stem.with_suffix(".index").open("xb") as new_index:
            for line in current:
                if rows := read_rows(directory, line, identity):  # else it is computed again
                    moved = line._replace(shard=f"{stem.name}.bin", offset=shard.tell())
                    shard.write(rows)
                    new_index.write(cache.make_line(moved, directory.name))
        index.unlink()  # from here on the new files count alone
        for name in {line.shard for line in lines}:
            (directory / name).unlink(missing_ok=True)


def verify(directory: str | Path, repair: bool = False) -> list[str]:
    """Read every activation of a cache; the audio paths of those that are damaged, and damaged lines as they stand.

    What lies past the end of its shard counts only where no whole one took its place: reading passes it over too.
    `repair` takes what is damaged out of the index; no run may use the cache meanwhile.
    """
    directory = Path(os.path.abspath(directory))
    identity, whole, cut, damaged = read_description(directory), set(), [], []
    for index in sorted(directory.glob("*.index")):
        lines, kept = read_lines(index), []
        for number, (text, line) in enumerate(lines, 1):
            ended = text.endswith(b"\n")
            if line is None or not ended:
                if line or ended:  # else torn, by a full disk or a process that was killed
                    damaged.append(f"{index}, line {number}: {text.rstrip().decode('ascii', 'backslashreplace')}")
            elif (rows := read_rows(directory, line, identity)) is None:
                cut.append(line.source)
            elif zlib.crc32(rows) != line.crc32:
                damaged.append(line.source)
            else:
                whole.add(line.source)
                kept.append(text)
        if repair and len(kept) < len(lines):
            content = b"".join(kept)
            replace(index, lambda file, content=content: file.write_bytes(content))
    return damaged + [path for path in cut if path not in whole]


def read_lines(index: Path) -> list[tuple[bytes, cache.Line | None]]:
    """Each line as it stands in an index, and what it says, None if it is damaged."""
    return [(text, read_line(text, index.parent.name)) for text in index.read_bytes().splitlines(True)]


def read_rows(directory: Path, line: cache.Line, identity: dict) -> bytes | None:
    """The bytes of an activation; None if they go past the end of its shard, or the disk is broken there."""
    path, kind = directory / line.shard, getattr(torch, identity["dtype"])
    count = (line.frames + (SCALE_ROWS if kind == torch.int8 else 0)) * identity["width"] * kind.itemsize
    if line.offset + count <= file_size(path):
        with suppress(OSError), open(path, "rb", buffering=0) as file:
            file.seek(line.offset)
            return file.read(count)
    return None


# ---------------------------------------------------------------- build


def build(words: Sequence[str]) -> dict[str, dict]:
    """Fill the caches of configs, one after the other: `words` are paths, and `key=value` for all. A report by path."""
    paths, overrides = split_words(words)
    if not paths:
        raise ValueError("build: expected at least one config")
    jobs: dict[Path, tuple[Prefix, str, bool]] = {}  # by directory: what fills it, in what precision, with TF32
    directories: dict[str, Path] = {}  # by path
    length: dict[tuple, float] = {}  # seconds of audio, by files
    needed: dict[Path, int] = {}  # bytes, by directory
    for path in paths:
        config = load_config(path, overrides)
        device = hardware.pick_device(config.device, parallel.local_rank())
        precision = hardware.pick_precision(config.precision, device)
        with parallel.first_alone():  # it writes the demo corpus
            utterances, label_range = run.load_utterances(config)
        audio = tuple(utterance.source for utterance in utterances)
        length[audio] = length.get(audio) or sum(data.check_audio(utterances))
        with parallel.first_alone():  # it downloads
            model, backbone = run.build_model(config, label_range)
        tf32 = config.tf32 and device.type == "cuda"
        how = {"backbone": backbone["sha256"], "precision": precision, "dtype": config.cache_dtype, "tf32": tf32}
        opened = cache.open_cache(config.cache_dir, model, audio, **how)
        if opened.missing and not opened.writable:
            lacks = f"is read-only and lacks {len(opened.missing):,} files"
            raise OSError(f"cache {opened.directory}: {lacks}; set cache_dir")
        opened.note_user(path, backbone["source"])
        needed[opened.directory] = opened.space(length[audio])
        directories[path], size = opened.directory, config.micro_batch_size or config.batch_size
        prefix = Prefix(model, audio, device, hardware.DTYPES[precision], opened, size)
        jobs.setdefault(opened.directory, (prefix, precision, tf32))
    hardware.require_space(needed)
    reports = {directory: fill(*job) for directory, job in jobs.items()}
    return {path: reports[directory] for path, directory in directories.items()}


def fill(prefix: Prefix, precision: str, tf32: bool) -> dict:
    """Complete a cache: its "directory", its "bytes", and the "seconds" that it took, None if it was complete.

    Several commands may do this at once, in random orders. The processes of one command share the work.
    """
    start, opened = time.perf_counter(), prefix.cache
    lacking = bool(opened.missing)
    if lacking:
        run.prepare(prefix.model, prefix.device, precision, tf32)
        size, count = prefix.at_once, len(prefix.paths)
        batches = parallel.share([range(i, min(i + size, count)) for i in range(0, count, size)])
        missing = [batch for batch in batches if not opened.has(batch)]
        random.shuffle(missing)
        quiet = parallel.rank() > 0 or None
        for _ in tqdm(prefix(missing), desc="cache", total=len(missing), unit="batch", disable=quiet):
            pass
    parallel.wait()
    opened.close()
    prefix.release_if_cached()  # looks for what other processes have written, too
    seconds = time.perf_counter() - start if lacking else None
    return {"directory": str(opened.directory), "seconds": seconds, "bytes": opened.stored_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill, check, list or delete activation caches.")
    commands = parser.add_subparsers(dest="command", required=True)
    built = commands.add_parser("build", help="fill the caches that configs use; under torchrun processes share this")
    built.add_argument("words", nargs="+", metavar="config | key=value", help="keys are for all of the configs")
    built.add_argument("--report", help="JSON file to write: directory, bytes and seconds of each config's cache")
    verified = commands.add_parser("verify", help="read everything, and name damaged activations")
    verified.add_argument("directory")
    verified.add_argument("--repair", action="store_true", help="forget them, so that the next run computes them anew")
    listed = commands.add_parser("list", help="size, content, last use and users of each cache in a folder")
    listed.add_argument("directory", nargs="?", type=Path, default="cache")
    cleared = commands.add_parser("clear", help="delete caches, without asking, and say what that freed")
    cleared.add_argument("names", nargs="+", metavar="directory", help="of a cache, or its name below ./cache")
    lost = "delete only what they hold of files that are gone or have changed; an unmounted disk is gone"
    cleared.add_argument("--gone", action="store_true", help=lost)
    arguments = parser.parse_args()
    if arguments.command == "list":
        print(list_caches(arguments.directory))
    elif arguments.command == "clear":
        print(clear(arguments.names, arguments.gone))
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
    command(main, "stopped; the same command continues")
