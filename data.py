"""From files to tensors: utterances, manifests, audio of any kind as 16 kHz mono, and random batches.

    utterances = load_corpus("manifest", manifest="my/manifest.csv")
    check_labels(utterances, ["activation", "valence"], label_range=(1, 7))
    seconds = check_audio(utterances)
    waveform = read_audio(utterances[0].source)  # (S,) float32, 16 kHz

Nothing is padded, cropped or normalised here: an utterance is its samples, and its length is its own.
"""

import codecs
import csv
import math
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import numpy as np
from torch import Tensor

from config import extra
from machine.audio import MIN_SAMPLES, SAMPLE_RATE, TooShortError, read_original, resample, silence  # noqa: F401

SPLITS = ("train", "dev", "test")
REQUIRED_COLUMNS = ("path", "split", "speaker")
LABEL_COLUMNS = ("activation", "valence", "dominance")
SYNONYMS = {"activation": "arousal", "arousal": "activation"}
RANGES = [(0, 1), (-1, 1), (1, 5), (1, 7), (1, 9), (0, 10), (0, 100)]  # scales in use, the likely before the wide
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # at the start of a cell; the last are the wide = + - @

Range = tuple[float, float]  # the lowest and the highest label of a corpus
Notes = dict[str, list[str]]  # what was left out of a corpus or is odd, and the names of the files
Item = TypeVar("Item")
Result = TypeVar("Result")


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


def load_corpus(name: str, root: str | None = None, **keys: Any) -> list[Utterance]:
    """The utterances of a corpus, as of `read_corpus`; what was left out or is odd is printed to stderr."""
    utterances, notes = read_corpus(name, root, **keys)
    for note, files in notes.items():
        examples = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        say_once(f"warning: {root}: {note}" + (f": {len(files):,} ({examples})" if files else ""))
    return utterances


def read_corpus(
    name: str, root: str | None = None, manifest: str | None = None, targets: Sequence[str] | None = None, **keys: Any
) -> tuple[list[Utterance], Notes]:
    """The utterances of a corpus, and what a user should know of them.

    "manifest" is a CSV file with a column for each of `targets`; every other corpus is read by `corpora.published` from
    the folder `root`, and `keys` of the configuration choose a part of it. Raises FileNotFoundError or ValueError for
    an unknown name, a key that the corpus does not use, and files that are not as published.
    """
    keys |= {"data_root": root, "manifest": manifest}
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
) -> Range:
    """The range as configured, else that of the published corpus; a ValueError proposes one for a manifest."""
    if label_range is not None:
        return label_range[0], label_range[1]
    if name != "manifest":
        return extra("corpora.published", f"corpus: {name}").CORPORA[name].label_range
    labels = [utterance.labels.get(target, math.nan) for utterance in utterances for target in targets]
    found = [label for label in labels if math.isfinite(label)] or [1.0, 7.0]
    low, high = min(found), max(found)
    likely = next((each for each in RANGES if each[0] <= low and high <= each[1]), (math.floor(low), math.ceil(high)))
    advice = f"the labels, {low:g} to {high:g}, suggest this line:\nlabel_range: [{likely[0]}, {likely[1]}]"
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
    folder = os.path.dirname(os.path.abspath(path))
    utterances, problems = [], []
    with reading(path, "manifest") as file:
        reader = csv.reader(file)
        header = [cell.strip() for cell in next(reader, [])]
        columns = find_columns(path, header, targets)
        for row in reader:
            if not any(map(str.strip, row)):  # a blank line
                continue
            try:
                if len(row) != len(header):
                    raise ValueError(f"{len(row)} cells, expected {len(header)}")
                utterances.append(parse_row({name: row[at].strip() for name, at in columns.items()}, folder))
            except ValueError as problem:
                problems.append(f"line {reader.line_num}: {problem}")
    raise_listed(f"{path}: bad rows in the manifest", problems)
    if not utterances:
        raise ValueError(f"{path}: the manifest has a header but no rows, expected one for each audio file")
    return utterances


def find_columns(path: str | Path, header: Sequence[str], targets: Sequence[str] | None) -> dict[str, int]:
    """Where the columns of a manifest are; their names may begin with a capital, and a label have its other word."""
    if not any(header):
        raise ValueError(f"{path}: the manifest is empty, expected a header {','.join(REQUIRED_COLUMNS)}, and targets")
    columns: dict[str, int] = {}
    for name in (*REQUIRED_COLUMNS, "start", "end", *(targets or LABEL_COLUMNS)):
        other = SYNONYMS.get(name, name)
        for word in (name, other, name.lower(), name.capitalize(), other.capitalize()):
            if header.count(word) > 1:
                raise ValueError(f"{path}: column {word} is there more than once; found {header}")
            if word in header:
                columns.setdefault(name, header.index(word))
    if missing := [name for name in (*REQUIRED_COLUMNS, *(targets or ())) if name not in columns]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; found {list(header)}, separated by commas")
    return columns


def parse_row(cells: dict[str, str], folder: str) -> Utterance:
    """The utterance of a manifest's row; the path of its audio is relative to `folder`."""
    audio, split, speaker = (cells.pop(column) for column in REQUIRED_COLUMNS)
    if split not in SPLITS:
        raise ValueError(f"split {split!r}, expected one of {', '.join(SPLITS)}")
    values = {name: number(name, cell) for name, cell in cells.items() if cell}
    start, end = values.pop("start", 0.0), values.pop("end", None)
    if not 0 <= start < (math.inf if end is None else end):
        raise ValueError(f"start {start:g} and end {end}, expected seconds, the end after the start")
    return Utterance(find_file(folder, audio), split, speaker, values, start, end)


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
        with open(path, encoding="utf-8-sig", errors=errors, newline="") as file:  # -sig: Excel writes a mark
            yield file
    except OSError as error:
        raise ValueError(f"{path}: the {what} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        utf_16 = error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        found = "UTF-16" if utf_16 else f"not UTF-8 ({error.reason})"
        raise ValueError(f"{path}: the {what} is {found}; save it as UTF-8") from None
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
    utterances: Sequence[Utterance], targets: Sequence[str], label_range: Range, allow_speaker_overlap: bool = False
) -> None:
    """Raise one ValueError that lists all that `label_problems` finds."""
    problems = label_problems(utterances, targets, label_range, allow_speaker_overlap)
    raise_listed("the corpus cannot be used", [f"{file}: {detail}" if file else detail for _, file, detail in problems])


def label_problems(
    utterances: Sequence[Utterance], targets: Sequence[str], label_range: Range, allow_speaker_overlap: bool = False
) -> Iterator[Problem]:
    """All that is wrong with splits, labels and speakers.

    Right is: each utterance has a finite label within `label_range` (inclusive) for each target, each split has two
    that differ, no speaker and no part of a file is in two splits, and no part of a file has several labels.
    """
    (low, high), rows_of, splits_of = label_range, defaultdict(list), defaultdict(set)
    for split in SPLITS:
        labels = [row.labels for row in utterances if row.split == split]
        if not labels:
            yield Problem("empty split", "", f"split {split!r} has no utterances")
        for target in targets:
            if len({each[target] for each in labels if target in each}) == 1:
                found = f"split {split!r} has no two different labels of {target}; its CCC would be 0/0"
                yield Problem("constant labels", "", found)
    for row in utterances:
        rows_of[os.path.normpath(row.path)].append(row)
        splits_of[row.speaker].add(row.split)
        for target in targets:
            if (value := row.labels.get(target)) is None:
                found = f"no label for target {target!r}, found {', '.join(row.labels) or 'none'}"
                yield Problem("no label", row.path, found)
            elif not math.isfinite(value):
                yield Problem("no label", row.path, f"{target} is {value}, expected a finite number")
            elif not low <= value <= high:
                found = f"{target} is {value:g}, outside `label_range` {low:g} to {high:g}"
                yield Problem("label outside the range", row.path, found)
    for path, rows in rows_of.items():
        rows.sort(key=lambda row: (row.start, row.end or math.inf))
        for row, other in pairwise(rows):
            if row.split != other.split and other.start < (row.end or math.inf):
                found = f"is in {row.split} and in {other.split}; an utterance belongs to one split"
                yield Problem("file in two splits", path, found)
            elif row.source == other.source and row.labels != other.labels:
                found = "has several rows with different labels; for parts of a file, give columns `start` and `end`"
                yield Problem("several labels", path, found)
    for speaker, splits in splits_of.items():
        if len(splits) > 1 and not is_nobody(speaker) and not allow_speaker_overlap:
            shared = " and ".join(split for split in SPLITS if split in splits)
            found = f"speaker {speaker!r} is in {shared}; part them, or set `allow_speaker_overlap: true`"
            yield Problem("speaker overlap", "", found)


def is_nobody(speaker: str) -> bool:
    """Whether this is no name: utterances of "Unknown" are by as many speakers as there are utterances."""
    return speaker.strip().lower() in ("", "unknown")


def speaker_groups(speakers: Sequence[str]) -> list[str]:
    """What a bootstrap over speakers draws as a whole, by name: an utterance of nobody by itself.

    With fewer than two known speakers there is but one group, of which there is no interval.
    """
    known = {speaker for speaker in speakers if not is_nobody(speaker)}
    groups = [speaker if speaker in known else f" {number}" for number, speaker in enumerate(speakers)]
    return groups if len(known) > 1 else [""] * len(speakers)


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

    parts = [sources[start : start + 64] for start in range(0, len(sources), 64)]  # one by one would cost more
    with ThreadPoolExecutor(threads) as pool:
        found = [each for part in pool.map(lambda part: list(map(length, part)), parts) for each in part]
    raise_listed("bad audio files", [each for each in found if isinstance(each, str)], limit=1000)
    seconds = dict(zip(sources, map(float, found), strict=True))
    return [seconds[utterance.source] for utterance in utterances]


def read_audio(source: str | Path, silent: list[str] | None = None) -> Tensor:
    """An audio file of any rate, width, channel count and format as (S,) float32, 16 kHz; channels averaged.

    `source` is a path, or `path#t=START,END` in seconds for a part of the file (see `Utterance.source`). Raises
    FileNotFoundError, or ValueError for a file that is empty, not audio, truncated, not finite or shorter than
    MIN_SAMPLES. A file in which nothing can be heard is read, and added to `silent`, without it named on stderr.
    """
    waveform, _, sample_rate = read_original(str(source))
    assert waveform is not None, "left out only without `decode_pcm`"
    if problem := silence(waveform):
        problem = f"{source}: {problem}"
        say_once(f"warning: {problem}") if silent is None else silent.append(problem)
    return resample(waveform, sample_rate)


# ---------------------------------------------------------------- scales and batches


def scale_labels(labels: Tensor, label_range: Range) -> Tensor:
    """Corpus scale -> 0..1, any shape."""
    low, high = label_range
    return (labels - low) / (high - low)


def unscale_labels(labels: Tensor, label_range: Range) -> Tensor:
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
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(thread.submit(function, item))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        for last in ahead:
            yield last.result()
