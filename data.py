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
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    keys = {"data_root": root, "manifest": manifest, **keys}
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
        return label_range[0], label_range[1]
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
    times = [name for name in ("start", "end") if name in at]
    labelled = [name for name in at if name not in (*REQUIRED_COLUMNS, "start", "end")]
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
    seconds = dict(zip(sources, (each for each in checked if not isinstance(each, str)), strict=True))
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
