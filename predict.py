"""Predict activation and valence of audio files with a finished run, or with a published emotion model.

A file longer than the window becomes equal windows, a row each; with --hop windows slide, and the last one ends with
the file. Files that cannot be read are named at the end and do not stop the others; the exit status is then 1.
"""

import argparse
import codecs
import csv
import glob
import json
import mimetypes
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import chain, count, islice, pairwise, repeat, takewhile
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import run
from config import expand, extra, load_config
from corpora.tree import folders_below
from formats.media import SUFFIXES
from machine import hardware
from machine.programs import command
from model import EmotionModel

KINDS = mimetypes.MimeTypes()  # as Python knows them, whatever this machine has installed
RARE = (".pcm", ".raw", ".sln", ".vox", ".ds2", ".dss", ".dvf", ".msv")  # without a header, or of dictating machines
MAGIC = re.compile(  # how sound and film begin; the pictures of phones have `ftyp` too
    rb"(?s)RIFF....(WAVE|AVI )|RF64|fLaC|OggS|ID3|\xff[\xfb\xf3\xf2]|FORM....AIF|caff|#!AMR|\x1aE\xdf\xa3|0&\xb2u|"
    rb"....ftyp(?!hei|mif|msf|avi|crx)"
)
Row = dict[str, str | float]


class Window(NamedTuple):
    """What gets a row: samples `start` to `stop` of a recording's waveform `(S,)`, 16 kHz."""

    number: int  # of the file
    path: Path
    waveform: Tensor
    start: int
    stop: int


Results = Iterator[tuple[list[Window], list[list[float]]]]


# ---------------------------------------------------------------- inputs


def find_audio(words: Sequence[str]) -> list[Path]:
    """The files that words name, each once. Raises FileNotFoundError for a folder, a pattern or a list without any."""
    files: dict[str, Path] = {}
    for word in words:
        for path in map(Path, listed() if word == "-" else expanded(word)):
            for file in searched(path) if path.is_dir() else [path]:
                files.setdefault(os.path.normcase(os.path.abspath(file)), file)
    return list(files.values())


def listed() -> list[str]:
    """The paths on standard input, one a line; those in another encoding too."""
    text = sys.stdin.buffer.read()
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("-: the list is UTF-16; save it as UTF-8")
    encoding = "utf-8-sig" if text.startswith(codecs.BOM_UTF8) else sys.stdin.encoding
    lines = [line.rstrip("\r") for line in text.decode(encoding, "surrogateescape").split("\n") if line.strip()]
    if not lines:
        raise FileNotFoundError("-: no path on standard input")
    return lines


def expanded(word: str) -> list[str]:
    """What a pattern matches, `**` being any number of folders. Any other word, and what exists, is itself."""
    word = expand(word)
    if os.path.exists(word) or not set(word) & set("*?["):
        return [word]
    matches = sorted(set(matching(word)))
    if not matches:
        raise FileNotFoundError(f"{word}: nothing matches this pattern")
    return matches


def matching(pattern: str) -> list[str]:
    """As `glob.glob(recursive=True)`, but links may go round in a circle."""
    recursive = re.fullmatch(r"(|.*?/)\*\*/(.*)", pattern.replace(os.sep, "/"), re.DOTALL)
    if not recursive:
        return glob.glob(pattern)
    head, rest = recursive.groups()
    found: list[str] = []
    for place in glob.glob(head) if head else [""]:
        for folder, _ in folders_below(place or os.curdir, unread=found):
            below = Path(os.path.relpath(folder, place or os.curdir))
            if not any(part.startswith(".") for part in below.parts):
                found += matching(os.path.join(glob.escape(os.path.join(place, *below.parts)), rest))
    return found


def searched(folder: Path) -> list[Path]:
    """What looks like sound or film in a folder and below it, also behind links; and folders that cannot be read."""
    unread: list[str] = []
    files = [Path(path, name) for path, names in folders_below(folder, unread) for name in names]
    audio = [*filter(is_audio, files), *map(Path, unread)]
    if not audio:
        found = ", ".join(sorted({f"*{file.suffix}" for file in files})) or "nothing"
        raise FileNotFoundError(f"{folder}: no audio file in this folder, found {found}")
    return sorted(audio)


def is_audio(file: Path) -> bool:
    """Whether a file looks like sound or film: by its suffix, or by its first bytes."""
    suffix, kind = file.suffix.lower(), KINDS.guess_type(file.name, strict=False)[0] or ""
    if suffix in SUFFIXES or suffix in RARE or kind.startswith(("audio/", "video/")):
        return True
    with suppress(OSError):
        if file.is_file():  # and no pipe, which would wait for whoever writes into it
            with open(file, "rb") as stream:
                return MAGIC.match(stream.read(16)) is not None
    return False


def spans(samples: int, window: float, hop: float | None = None) -> Iterator[tuple[int, int]]:
    """Where the windows of a recording start and stop, in samples: equal ones of at most `window` seconds.

    With `hop` they have that length, one starts every `hop` seconds, and the last ends with the recording.
    """
    size = round(min(window * data.SAMPLE_RATE, samples))
    if hop is None:
        parts = -(-samples // size)
        yield from pairwise(round(i * samples / parts) for i in range(parts + 1))
    else:
        step = max(1, round(min(hop * data.SAMPLE_RATE, samples)))
        yield from ((start, start + size) for start in range(0, samples - size, step))
        yield samples - size, samples


def windows(
    paths: Iterable[Path], window: float, hop: float | None, failed: list[str], silent: list[str] | None = None
) -> Iterator[Window]:
    """The windows of all files, read when due. Why one has none is added to `failed`, a silent one to `silent`."""
    for number, path in enumerate(paths):
        try:
            waveform = data.read_audio(data.find_file("", str(path)), silent)
        except (OSError, ValueError) as error:
            failed.append(str(error))
        else:
            yield from (Window(number, path, waveform, *span) for span in spans(len(waveform), window, hop))


# ---------------------------------------------------------------- predictions and pictures


def predict(model: EmotionModel, stream: Iterator[Window], batch: int = 8, precision: str = "fp32") -> Results:
    """Windows, `batch` at a time, and their predictions in the label's scale; a thread reads the next meanwhile."""
    device = next(model.parameters()).device
    for group in takewhile(len, data.prefetch(lambda _: list(islice(stream, batch)), repeat(None))):
        waveforms = [window.waveform[window.start : window.stop].to(device) for window in group]
        with torch.autocast(device.type, hardware.DTYPES[precision], enabled=precision != "fp32"):
            predictions = model.infer(waveforms)
        yield group, data.unscale_labels(predictions.cpu(), model.label_range).tolist()


def rows(group: Sequence[Window], predictions: Sequence[Sequence[float]], targets: Sequence[str]) -> Iterator[Row]:
    """File, start and end in seconds, and a column for each target."""
    for window, values in zip(group, predictions, strict=True):
        start, end = round(window.start / data.SAMPLE_RATE, 3), round(window.stop / data.SAMPLE_RATE, 3)
        labels = {target: round(value, 4) for target, value in zip(targets, values, strict=True)}
        yield {"file": str(window.path), "start": start, "end": end, **labels}


def row_writer(stream: TextIO, kind: str, targets: Sequence[str]) -> Callable[[Iterable[Row]], None]:
    """What writes rows as CSV, whose header it has written, or as JSON, one object a line."""
    if kind == "jsonl":
        return lambda rows: stream.writelines(f"{json.dumps(row)}\n" for row in rows)
    writer = csv.DictWriter(stream, ["file", "start", "end", *targets], lineterminator="\n")
    writer.writeheader()
    return lambda rows: writer.writerows({**row, "file": data.text_cell(row["file"])} for row in rows)


def draw(results: Results, folder: Path, model: EmotionModel, note: str) -> Results:
    """Pass results on, and draw a file when its last window is through; of two a.wav the second becomes a_2."""
    plots, taken, shown = extra("report.plots", "--plot"), set(), []
    for group, predictions in results:
        yield group, predictions
        for window, values in zip(group, predictions, strict=True):
            shown.append((window.start / data.SAMPLE_RATE, window.stop / data.SAMPLE_RATE, *values))
            if window.stop == len(window.waveform):
                numbered = (f"{window.path.stem}_{number}" for number in count(2))
                name = next(name for name in chain([window.path.stem], numbered) if name.lower() not in taken)
                taken.add(name.lower())  # some systems do not tell capitals from small letters
                shape = model.targets, model.label_range, window.path.name, note, folder / name
                plots.timeline(window.waveform.numpy(), np.array(shown), *shape)
                shown = []


def parse_arguments() -> argparse.Namespace:
    """The command line, checked before anything is read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=expand, help="the directory of a run of train.py, or a published emotion model")
    parser.add_argument("audio", nargs="+", help="files, folders, patterns in quotes, or - for a list on stdin")
    parser.add_argument("--out", type=expand, help="file to write; otherwise the rows are printed")
    parser.add_argument("--format", choices=("csv", "jsonl"), help="otherwise by the suffix of --out, else csv")
    parser.add_argument("--window", type=float, default=20.0, help="longest stretch in seconds that gets one row")
    parser.add_argument("--hop", type=float, help="seconds from one window to the next; otherwise they do not overlap")
    parser.add_argument("--plot", type=expand, metavar="DIR", help="directory for a picture of each file over time")
    parser.add_argument("--batch", type=int, default=8, help="windows in memory at once")
    parser.add_argument("--precision", choices=hardware.DTYPES, default="fp32", help="16 bits are faster on a GPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--backbone", type=expand, help="where the backbone of the run is now, if it has moved")
    arguments = parser.parse_args()
    window, hop = arguments.window, arguments.hop
    arguments.format = arguments.format or ("jsonl" if str(arguments.out).lower().endswith(".jsonl") else "csv")
    for name, fulfilled, expected in (
        ("window", window >= 0.1, "at least 0.1 seconds"),
        ("hop", hop is None or 0 < hop <= window, f"above 0 and at most the window, {window:g} seconds"),
        ("batch", arguments.batch >= 1, "at least 1"),
        ("plot", not os.path.isfile(arguments.plot or ""), "a directory"),
    ):
        if not fulfilled:
            parser.error(f"--{name}: expected {expected}, found {getattr(arguments, name)}")
    if arguments.plot:
        extra("report.plots", "--plot")  # before anything is computed
        os.makedirs(arguments.plot, exist_ok=True)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    files, failed, silent, out = find_audio(arguments.audio), [], [], arguments.out
    device = hardware.pick_device(arguments.device)
    model = run.load_run(arguments.model, backbone=arguments.backbone)
    run.prepare(model, device, arguments.precision)
    config = Path(arguments.model) / "config.yaml"
    note = run.DEMO_NOTE if config.is_file() and load_config(config).corpus == "demo" else ""
    if note:
        print(note, file=sys.stderr)
    stream = windows(files, arguments.window, arguments.hop, failed, silent)
    results = predict(model, stream, arguments.batch, arguments.precision)
    if arguments.plot:
        results = draw(results, Path(arguments.plot), model, note)
    bar = tqdm(total=len(files), unit="file", unit_scale=True, disable=None if out else True)
    form = {"newline": "", "encoding": "utf-8", "errors": "as_named"}
    try:
        with bar, open(out, "w", **form) if out else nullcontext(sys.stdout) as file:
            write = row_writer(file, arguments.format, model.targets)
            for group, predictions in results:
                write(rows(group, predictions, model.targets))
                file.flush()
                last = group[-1]
                bar.update(last.number + last.stop / len(last.waveform) - bar.n)
            bar.update(len(files) - bar.n)
    except OSError as error:
        if error.strerror is None:  # of a picture, which is named
            raise
        raise OSError(f"{out or 'stdout'}: cannot be written ({error.strerror})") from None
    if silent:
        print("\n".join([f"warning: nothing can be heard in {len(silent)} of the files:", *silent]), file=sys.stderr)
    if failed:
        sys.exit("\n".join([f"error: {len(failed)} of {len(files)} files have no prediction:", *failed]))


if __name__ == "__main__":
    command(main, "stopped; every row that is written is whole")
