"""From files to tensors: utterances, manifests, audio of any kind as 16 kHz mono, and random batches.

    utterances = load_corpus("manifest", manifest="my/manifest.csv")
    check_labels(utterances, ["activation", "valence"], label_range=(1, 7))
    seconds = check_audio(utterances)
    waveform = read_audio(utterances[0].path)  # (S,) float32, 16 kHz

Nothing is padded, cropped or normalised here: an utterance is its samples, and its length is its own.
"""

import codecs
import csv
import math
import numbers
import os
import re
import stat
import struct
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, TypeVar

import numpy as np
import soundfile
import torch
from torch import Tensor

from config import extra

SPLITS = ("train", "dev", "test")
REQUIRED_COLUMNS = ("path", "split", "speaker")
LABEL_COLUMNS = ("activation", "valence", "dominance")
SYNONYMS = {"activation": "arousal", "arousal": "activation"}
RANGES = [(0, 1), (-1, 1), (1, 5), (1, 7), (1, 9), (0, 10), (0, 100)]  # scales in use, the likely before the wide
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # at the start of a cell; the last are the wide = + - @

SAMPLE_RATE = 16_000  # Hz, what every Wav2Vec 2.0 was trained on
MIN_SAMPLES = 400  # at SAMPLE_RATE: one frame of the CNN, 25 ms
BLOCK = 1 << 20  # samples decoded at once
MIN_SAMPLE_RATE = 1000  # Hz; less is a damaged header, and a second becomes hours at 16 kHz
MAX_SAMPLE_RATE = 1_000_000  # Hz; more is a damaged header, and a resampling filter that fills the memory
MAX_SAMPLES = 1 << 30  # of a file, at its rate and at 16 kHz: 6 hours at 48 kHz, 4 GB; FLAC packs silence to nothing

BY_SOUNDFILE = {"WAV", "WAVEX", "RF64", "FLAC", "HTK", "MAT4", "MAT5", "MPC2K", "SD2", "SDS", "WVE", "XI"}
PART = re.compile(r"(.+)#t=(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)?", re.DOTALL)  # W3C Media Fragments

Notes = dict[str, list[str]]  # what was left out of a corpus or is odd, and the names of the files
Item, Result = TypeVar("Item"), TypeVar("Result")


class TooShortError(ValueError):
    """Audio with less than one frame of the CNN."""


# ---------------------------------------------------------------- corpora


@dataclass(frozen=True, slots=True)
class Utterance:
    """One turn of one speaker: an audio file and its labels by target name, in the scale of the corpus."""

    path: str
    split: str
    speaker: str
    labels: dict[str, float]
    start: float = 0.0  # seconds
    end: float | None = None  # None: the end of the file

    @property
    def source(self) -> str:
        """What `read_audio` takes and a cache knows it by: the path, or `path#t=START,END` for a part of the file."""
        if self.start == 0 and self.end is None:
            return self.path
        times = (f"{time:.6f}".rstrip("0").rstrip(".") for time in (self.start, self.end) if time is not None)
        return f"{self.path}#t={','.join(times)}" + ("," if self.end is None else "")


class Problem(NamedTuple):
    """Something wrong: of which kind, in which file ("" for the corpus), and what was found and expected."""

    kind: str
    file: str
    detail: str


def load_corpus(
    name: str, root: str | None = None, manifest: str | None = None, fold: int | None = None, **keys: Any
) -> list[Utterance]:
    """The utterances of a corpus. What was left out of it or is odd is printed to stderr. See `read_corpus`."""
    utterances, notes = read_corpus(name, root, manifest, fold=fold, **keys)
    for note, files in notes.items():
        examples = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        say_once(f"warning: {root}: {note}" + (f": {len(files):,} ({examples})" if files else ""))
    return utterances


def read_corpus(
    name: str,
    root: str | None = None,
    manifest: str | None = None,
    targets: Sequence[str] | None = None,
    **keys: str | int | None,
) -> tuple[list[Utterance], Notes]:
    """The utterances of a corpus, and what a user should know of them.

    "manifest" is a CSV file with a column for each of `targets`; every other name is a corpus that `corpora.published`
    reads from the folder `root`, and `keys` are those of the configuration that choose a part of it. Raises
    FileNotFoundError or ValueError for an unknown name, a key that the corpus does not use, and files that are not as
    published.
    """
    keys = {"data_root": root, "manifest": manifest} | keys
    if name != "manifest":
        utterances, notes = extra("corpora.published", f"corpus: {name}").read(name, keys)
        for utterance in utterances if "arousal" in (targets or ()) else ():
            utterance.labels["arousal"] = utterance.labels.get("activation", math.nan)
        return utterances, notes
    require_used(name, keys, ["manifest"])
    if manifest is None:
        raise ValueError("manifest: found nothing, but corpus 'manifest' needs a CSV; set `manifest: FILE`")
    return read_manifest(manifest, targets), {}


def require_used(name: str, keys: dict[str, str | int | None], used: Sequence[str]) -> None:
    """Raise ValueError for a key that is set although the corpus does not use it."""
    for key, value in keys.items():
        if value is not None and key not in used:
            raise ValueError(f"{key}: corpus {name!r} has no use for it, found {value!r}; remove the key")


def find_label_range(
    name: str, label_range: Sequence[float] | None, utterances: Sequence[Utterance] = (), targets: Sequence[str] = ()
) -> tuple[float, float]:
    """The range as configured, else the one that the corpus was published with.

    A manifest has none of its own: the ValueError proposes the range that the labels suggest.
    """
    if label_range is not None:
        return tuple(label_range)
    if name != "manifest":
        return extra("corpora.published", f"corpus: {name}").CORPORA[name].label_range
    found = [utterance.labels[target] for utterance in utterances for target in targets if target in utterance.labels]
    found = [label for label in found if math.isfinite(label)] or [1.0, 7.0]
    low, high = min(found), max(found)
    likely = [each for each in RANGES if each[0] <= low and high <= each[1]] + [(math.floor(low), math.ceil(high))]
    advice = f"the labels, {low:g} to {high:g}, suggest this line:\nlabel_range: [{likely[0][0]}, {likely[0][1]}]"
    raise ValueError(f"label_range: corpus {name!r} has none of its own; {advice}")


@cache
def say_once(line: str) -> None:
    """Print a line to stderr once, however often called."""
    print(line, file=sys.stderr)


# ---------------------------------------------------------------- manifests


def read_manifest(path: str | Path, targets: Sequence[str] | None = None) -> list[Utterance]:
    """Read a CSV `path,split,speaker[,start,end]` with a column for each target, in UTF-8; other columns are ignored.

    `start` and `end` in seconds make the utterance a part of the file; both may be empty. Without `targets` the labels
    are those of LABEL_COLUMNS that are there. Relative audio paths are relative to the manifest; an empty label cell
    means that there is no such label. Raises FileNotFoundError, or one ValueError that lists the bad rows by line.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such manifest; check the key `manifest`")
    with reading(path, "manifest") as file:
        return parse_manifest(path, file, targets)


def find_columns(path: str | Path, header: Sequence[str], targets: Sequence[str] | None) -> dict[str, int]:
    """Where the columns of a manifest are; that of a label may be called by its other word, in capitals too."""
    if not any(header):
        raise ValueError(f"{path}: the manifest is empty, expected a header {','.join(REQUIRED_COLUMNS)}, and targets")
    at, missing = {}, []
    for name in (*REQUIRED_COLUMNS, "start", "end", *(LABEL_COLUMNS if targets is None else targets)):
        words = (
            [name] if name in (*REQUIRED_COLUMNS, "start", "end") else [name, SYNONYMS.get(name, name), name.lower()]
        )
        words += [SYNONYMS.get(name, name).capitalize(), name.capitalize()] if len(words) > 1 else []
        if found := [word for word in words if word in header]:
            at[name] = header.index(found[0])
            if header.count(found[0]) > 1:
                raise ValueError(f"{path}: column {found[0]} is there more than once; found {header}")
        elif name in REQUIRED_COLUMNS or name in (targets or ()):
            missing.append(name)
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; found {list(header)}, separated by commas")
    return at


def parse_manifest(path: str | Path, file: TextIO, targets: Sequence[str] | None = None) -> list[Utterance]:
    """The rows of an open manifest; `path` is what relative audio paths are relative to."""
    reader = csv.reader(file)
    header = [cell.strip() for cell in next(reader, [])]
    at = find_columns(path, header, targets)
    times, labelled = [name for name in ("start", "end") if name in at], set(at) - {*REQUIRED_COLUMNS, "start", "end"}
    labelled = [name for name in at if name in labelled]
    folder = os.path.dirname(os.path.abspath(path))
    utterances, problems = [], []
    for row in reader:
        if not any(map(str.strip, row)):  # a blank line
            continue
        try:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} cells, expected {len(header)}")
            audio, split, speaker = (row[at[column]].strip() for column in REQUIRED_COLUMNS)
            if split not in SPLITS:
                raise ValueError(f"split {split!r}, expected one of {', '.join(SPLITS)}")
            labels = {name: number(name, row[at[name]]) for name in labelled if row[at[name]].strip()}
            part = {name: number(name, row[at[name]]) for name in times if row[at[name]].strip()}
            start, end = part.get("start", 0.0), part.get("end")
            if not 0 <= start < (math.inf if end is None else end):
                raise ValueError(f"start {start:g} and end {end}, expected seconds, the end after the start")
            utterances.append(Utterance(find_file(folder, audio), split, speaker, labels, start, end))
        except ValueError as problem:
            problems.append(f"line {reader.line_num}: {problem}")
    raise_listed(f"{path}: bad rows in the manifest", problems)
    if not utterances:
        raise ValueError(f"{path}: the manifest has a header but no rows, expected one for each audio file")
    return utterances


def find_file(folder: str, name: str) -> str:
    """The path of a file relative to `folder`. Backslashes, as Windows has them, are understood everywhere."""
    if not name:
        raise ValueError("path is empty")
    path = os.path.join(folder, name)
    if "\\" not in name or os.sep == "\\" or os.path.exists(path):
        return path
    if not os.path.exists(path := os.path.join(folder, name.replace("\\", "/"))):
        raise ValueError(f"path {name!r} has backslashes, and with / there is no such file either")
    return path


@contextmanager
def reading(path: str | Path, what: str, errors: str = "strict") -> Iterator[TextIO]:
    """A text file, opened; what goes wrong while it is read is one error that names it."""
    try:
        with open(path, "rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ValueError(f"{path}: the {what} is UTF-16; save it as UTF-8")
        with open(path, encoding="utf-8-sig", errors=errors, newline="") as file:  # -sig: Excel writes a mark
            yield file
    except OSError as error:
        raise ValueError(f"{path}: the {what} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the {what} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: the {what} is not a CSV file: {error}") from None


def number(target: str, cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{target} {cell!r} is not a number") from None


def text_cell(text: str) -> str:
    """A name for a table that a spreadsheet opens too: an apostrophe before what it would run as a formula.

    For names of files and speakers, which come from others; `from_cell` takes it away. Numbers may begin with a sign.
    The first characters are those of OWASP's page "CSV Injection".
    """
    return f"'{text}" if text.lstrip("'").startswith(FORMULA) else text


def from_cell(cell: str) -> str:
    """The name that `text_cell` made into this cell."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(FORMULA) else cell


def raise_listed(heading: str, problems: Sequence[str], limit: int = 20) -> None:
    """Raise one ValueError for all problems, if there are any, so that a user mends them in one go."""
    if problems:
        more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
        raise ValueError("\n  ".join([f"{heading} ({len(problems)}):", *problems[:limit], *more]))


# ---------------------------------------------------------------- labels


def check_labels(
    utterances: Sequence[Utterance],
    targets: Sequence[str],
    label_range: tuple[float, float],
    allow_speaker_overlap: bool = False,
) -> None:
    """Raise one ValueError that lists all that `label_problems` finds."""
    problems = label_problems(utterances, targets, label_range, allow_speaker_overlap)
    listed = [f"{file}: {detail}" if file else detail for _, file, detail in problems]
    raise_listed("the corpus cannot be used", listed)


def label_problems(
    utterances: Sequence[Utterance],
    targets: Sequence[str],
    label_range: tuple[float, float],
    allow_speaker_overlap: bool = False,
) -> list[Problem]:
    """All that is wrong with splits, labels and speakers.

    Right is: each utterance has a finite label within `label_range` (inclusive) for each target, each split has two
    that differ, no speaker and no part of a file is in two splits, and no part of a file has several labels.
    """
    low, high = label_range
    problems, splits_of, rows_of, values = [], defaultdict(set), defaultdict(list), defaultdict(set)
    for utterance in utterances:
        splits_of[utterance.speaker].add(utterance.split)
        rows_of[os.path.normpath(utterance.path)].append(utterance)
        for target in targets:
            value = utterance.labels.get(target)
            values[utterance.split, target].add(value)
            if value is None:
                found = ", ".join(utterance.labels) or "none"
                problems.append(Problem("no label", utterance.path, f"no label for target {target!r}, found {found}"))
            elif not math.isfinite(value):
                problems.append(Problem("no label", utterance.path, f"{target} is {value}, expected a finite number"))
            elif not low <= value <= high:
                detail = f"{target} is {value:g}, outside `label_range` {low:g} to {high:g}"
                problems.append(Problem("label outside the range", utterance.path, detail))
    return [*split_problems(values, targets), *problems, *shared_problems(splits_of, rows_of, allow_speaker_overlap)]


def split_problems(values: dict[tuple[str, str], set[float | None]], targets: Sequence[str]) -> list[Problem]:
    """Splits that are empty, or of which no CCC exists."""
    problems = []
    for split in SPLITS:
        if not any((split, target) in values for target in targets):
            problems.append(Problem("empty split", "", f"split {split!r} has no utterances"))
            continue
        for target in targets:
            if len(values[split, target] - {None}) == 1:
                detail = f"split {split!r} has no two different labels of {target}; its CCC would be 0/0"
                problems.append(Problem("constant labels", "", detail))
    return problems


def shared_problems(
    splits_of: dict[str, set[str]], rows_of: dict[str, list[Utterance]], allow_speaker_overlap: bool
) -> list[Problem]:
    """Speakers and files that are in two splits, and files with several labels."""
    problems = []
    for path, rows in rows_of.items():
        rows.sort(key=lambda row: (row.start, row.end or math.inf))
        for row, other in pairwise(rows):
            if row.split != other.split and other.start < (row.end or math.inf):
                detail = f"is in {row.split} and in {other.split}; an utterance belongs to one split"
                problems.append(Problem("file in two splits", path, detail))
            elif row.source == other.source and row.labels != other.labels:
                detail = "has several rows with different labels; for parts of a file, give columns `start` and `end`"
                problems.append(Problem("several labels", path, detail))
    for speaker, splits in splits_of.items():
        if len(splits) > 1 and not is_nobody(speaker) and not allow_speaker_overlap:
            shared = " and ".join(split for split in SPLITS if split in splits)
            detail = f"speaker {speaker!r} is in {shared}; part them, or set `allow_speaker_overlap: true`"
            problems.append(Problem("speaker overlap", "", detail))
    return problems


def is_nobody(speaker: str) -> bool:
    """Whether this is no name: utterances of "Unknown" are by as many speakers as there are utterances."""
    return speaker.strip().lower() in ("", "unknown")


# ---------------------------------------------------------------- audio


def check_audio(utterances: Sequence[Utterance], threads: int = 4) -> list[float]:
    """Seconds of each utterance, in order; one ValueError lists every file that `read_audio` would refuse.

    The header is enough for integer PCM in WAV, which declares its length and cannot hold NaN. All else is decoded.
    """
    sources = list(dict.fromkeys(utterance.source for utterance in utterances))

    def length(source: str) -> float | str:
        try:
            _, samples, sample_rate = read_original(source, decode_pcm=False)
            return samples / sample_rate
        except (FileNotFoundError, ValueError) as problem:
            return str(problem)

    # In parts, as a file's header takes less time than handing it to a thread.
    parts = [sources[start : start + 64] for start in range(0, len(sources), 64)]
    with ThreadPoolExecutor(threads) as pool:
        checked = [each for part in pool.map(lambda part: [length(source) for source in part], parts) for each in part]
    # The limit is for a wrong folder, where each of 100,000 files is missing.
    raise_listed("bad audio files", [problem for problem in checked if isinstance(problem, str)], limit=1000)
    seconds = dict(zip(sources, checked, strict=True))
    return [seconds[utterance.source] for utterance in utterances]


def read_audio(source: str | Path) -> Tensor:
    """An audio file of any rate, width, channel count and format as (S,) float32, 16 kHz; channels averaged.

    `source` is a path, or `path#t=START,END` in seconds for a part of the file (see `Utterance.source`). Raises
    FileNotFoundError, or ValueError for a file that is empty, not audio, truncated, not finite or shorter than
    MIN_SAMPLES.
    """
    waveform, _, sample_rate = read_original(str(source))
    return resample(waveform, sample_rate)


def resample(waveform: Tensor | np.ndarray, sample_rate: int, new_rate: int = SAMPLE_RATE) -> Tensor:
    """(S,) floats at any integer rate in Hz -> (ceil(S * new_rate / rate),) float32 at 16 kHz or another new rate."""
    if not isinstance(sample_rate, numbers.Integral) or not 0 < sample_rate <= MAX_SAMPLE_RATE:
        expected = f"an integer from 1 to {MAX_SAMPLE_RATE} Hz"
        raise ValueError(f"sample_rate: found {sample_rate!r}, expected {expected}")
    waveform = torch.as_tensor(waveform)
    if waveform.ndim != 1 or not waveform.is_floating_point():
        found = f"{tuple(waveform.shape)} {waveform.dtype}"
        raise ValueError(f"waveform: found {found}, expected one channel (S,) of floats in -1..1")
    waveform = waveform.float()
    if sample_rate == new_rate:
        return waveform
    from scipy.signal import resample_poly  # here, since it takes a second and 70 MB to import

    common = math.gcd(new_rate, int(sample_rate))
    # scipy, not torchaudio, so that the numbers do not depend on what else is installed.
    resampled = resample_poly(waveform.cpu().numpy(), new_rate // common, int(sample_rate) // common)
    return torch.from_numpy(resampled.astype(np.float32))


def split_source(source: str) -> tuple[str, float, float | None]:
    """The path of a source, and where its part starts and ends in seconds; None is the end of the file."""
    match = PART.fullmatch(source)
    if not match or os.path.exists(source):  # a file may have such a name
        return source, 0.0, None
    path, start, end = match.groups()
    return path, float(start), float(end) if end else None


def read_original(source: str, decode_pcm: bool = True) -> tuple[np.ndarray | None, int, int]:
    """The mono waveform (S,) at the file's own rate, S, and the rate; raises as `read_audio` does.

    Without `decode_pcm` the waveform of integer PCM in WAV is left out: None.
    """
    path, start, end = split_source(source)
    try:
        waveform, samples, sample_rate = _decode(path, start, end, decode_pcm)
        if end is not None and samples < round(end * sample_rate) - round(start * sample_rate):
            raise ValueError(f"its part {start:g} to {end:g} s ends after the file; correct `end`")
        at_16k = -(-samples * SAMPLE_RATE // sample_rate)  # rounded up, as `resample` does
        if at_16k < MIN_SAMPLES:
            found = f"{at_16k} samples at 16 kHz"
            raise TooShortError(f"too short: {found}, expected at least {MIN_SAMPLES}; leave it out")
        if waveform is not None and not np.isfinite(waveform).all():
            raise ValueError("holds NaN or infinite samples; convert it again or leave it out")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such audio file; check the path or leave it out") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as problem:
        kind = TooShortError if isinstance(problem, TooShortError) else ValueError
        raise kind(f"{source}: {problem}") from None
    return waveform, samples, sample_rate


def _decode(path: str, start: float, end: float | None, decode_pcm: bool) -> tuple[np.ndarray | None, int, int]:
    """As `read_original`: WAV and FLAC with soundfile, everything else and what has no known length with PyAV."""
    known = has_known_length(path)
    try:
        sound = soundfile.SoundFile(os.fsencode(path)) if known else None
    except (RuntimeError, TypeError):  # TypeError: a headerless .raw file
        sound = None
    if sound is None or sound.format not in BY_SOUNDFILE or sound.frames > 1 << 62:
        waveform, sample_rate = extra("formats.media", f"{path}: is neither WAV nor FLAC").decode(path, start, end)
        return waveform, len(waveform), sample_rate
    with sound:
        if not MIN_SAMPLE_RATE <= sound.samplerate <= MAX_SAMPLE_RATE:
            raise ValueError(f"its header declares a sample rate of {sound.samplerate} Hz; convert it again")
        first = min(round(start * sound.samplerate), sound.frames)
        last = sound.frames if end is None else min(round(end * sound.samplerate), sound.frames)
        require_length(last - first, sound.samplerate)
        pcm = sound.format in ("WAV", "WAVEX") and sound.subtype.startswith("PCM_")
        waveform = _read_samples(sound, first, last) if decode_pcm or not pcm else None
        return waveform, last - first, sound.samplerate


def has_known_length(path: str) -> bool:
    """False for a WAV file that a program wrote into a pipe. Raises ValueError for what no decoder should be given.

    libsndfile reads a WAV file that was cut short, or one of two that were joined, without a word.
    """
    if stat.S_ISFIFO(os.stat(path).st_mode):  # to open it would wait for whoever writes into it
        raise ValueError("is no file but a pipe; leave it out")
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        header = file.read(28)
        if size == 0:
            raise ValueError("empty file (0 bytes); copy it again or leave it out")
        if header[:4] != b"RIFF" or header[8:12] != b"WAVE":
            return True
        if header[12:16] == b"fmt " and header[24:28] == bytes(4):
            raise ValueError("its header declares a sample rate of 0 Hz; convert it again")
        start, declared = _wav_samples(file)
        found = size - start
        if declared >= 0x7FFFF000 or (declared == 0 < found and int.from_bytes(header[4:8], "little") + 8 != size):
            return False  # placeholders of programs that do not know the length when they write the header
        if found < declared:
            raise ValueError(f"truncated: {found} of {declared} bytes of samples; copy it again")
        file.seek(start + declared)
        if file.read(4) == b"RIFF":
            raise ValueError("a second WAV file is joined to its end; split them")
    return True


def _wav_samples(file: BinaryIO) -> tuple[int, int]:
    """Where the samples of a WAV file begin and how many bytes of them its header declares."""
    file.seek(12)
    while len(chunk := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", chunk)
        if name == b"data":
            return file.tell(), length
        file.seek(length + length % 2, os.SEEK_CUR)
    raise ValueError("truncated: a WAV header without samples; copy it again")


def require_length(samples: int, sample_rate: int) -> None:
    if samples * max(1, SAMPLE_RATE / sample_rate) > MAX_SAMPLES:
        raise ValueError(f"is longer than {MAX_SAMPLES} samples; cut it into several files")


def _read_samples(sound: soundfile.SoundFile, first: int, last: int) -> np.ndarray:
    """Samples `first` to `last` with the channels averaged: (S,) float32; block by block, for hours of stereo."""
    blocks, left = [np.empty(0, np.float32)], last - first
    try:
        sound.seek(first)
        while left and len(block := sound.read(min(left, max(1, BLOCK // sound.channels)), "float32", always_2d=True)):
            blocks.append(block.mean(axis=1))  # (S, channels) -> (S,)
            left -= len(block)
    except RuntimeError as error:
        raise ValueError(f"truncated or damaged: {error}; copy or convert it again") from None
    if left:
        raise ValueError(f"truncated: {last - first - left} of {last - first} samples; copy it again")
    return np.concatenate(blocks)


# ---------------------------------------------------------------- scales and batches


def scale_labels(labels: Tensor, label_range: tuple[float, float]) -> Tensor:
    """Corpus scale -> 0..1, any shape."""
    low, high = label_range
    return (labels - low) / (high - low)


def unscale_labels(labels: Tensor, label_range: tuple[float, float]) -> Tensor:
    """0..1 -> corpus scale, any shape; not clipped."""
    low, high = label_range
    return labels * (high - low) + low


def batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every index below `count` once, in a random order that (seed, epoch) alone decides: a run can resume.

    Each batch has `batch_size` indices but the last, which has the remainder. A remainder of one joins the
    batch before it, because the CCC of one utterance is 0/0; for the same reason `batch_size` is at least 2.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size: found {batch_size}, expected 2 or more: the CCC of one is 0/0")
    order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    cut = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    if len(cut) > 1 and len(cut[-1]) == 1:
        cut[-2:] = [cut[-2] + cut[-1]]
    return cut


def prefetch(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) for each item in order; a thread computes the next while the caller uses this one.

    An exception surfaces where its result is due. Closing the generator early leaves no thread running.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = None
        for item in items:
            due, ahead = ahead, thread.submit(function, item)
            if due is not None:
                yield due.result()
        if ahead is not None:
            yield ahead.result()
