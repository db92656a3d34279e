"""What an utterance is, how a manifest lists a corpus, and what may be wrong with splits, speakers and labels.

utterances = read_manifest("my/manifest.csv")
check_labels(utterances, ["activation", "valence"], label_range=(1, 7))
"""

import csv
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

SPLITS = ("train", "dev", "test")
REQUIRED_COLUMNS = ("path", "split", "speaker", "activation", "valence")
LABEL_COLUMNS = ("activation", "valence", "dominance")
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # at the start of a cell; the last are the wide = + - @


@dataclass(frozen=True, slots=True)
class Utterance:
    """One turn of one speaker: an audio file and its labels by target name, in the scale of the corpus."""

    path: str
    split: str
    speaker: str
    labels: dict[str, float]


class Problem(NamedTuple):
    """Something wrong: of which kind, in which file ("" for the corpus), and what was found and expected."""

    kind: str
    file: str
    detail: str


def read_manifest(path: str | Path) -> list[Utterance]:
    """Read a CSV `path,split,speaker,activation,valence[,dominance]` in UTF-8; other columns are ignored.

    Relative audio paths are relative to the manifest; an empty label cell means that there is no such label.
    Raises FileNotFoundError, or one ValueError that lists the bad rows by line.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such manifest; check the key `manifest`")
    with reading(path, "manifest") as file:
        return parse_manifest(path, file)


def parse_manifest(path: str | Path, file: TextIO) -> list[Utterance]:
    """The rows of an open manifest; `path` is what relative audio paths are relative to."""
    reader = csv.reader(file)
    header = [cell.strip() for cell in next(reader, [])]
    if not any(header):
        raise ValueError(f"{path}: the manifest is empty, expected a header {','.join(REQUIRED_COLUMNS)}")
    if missing := [column for column in REQUIRED_COLUMNS if column not in header]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; found {header}, separated by commas")
    if twice := [column for column in (*REQUIRED_COLUMNS, *LABEL_COLUMNS) if header.count(column) > 1]:
        raise ValueError(f"{path}: column {twice[0]} is there more than once; found {header}")
    at = {column: header.index(column) for column in header}
    targets = [(target, at[target]) for target in LABEL_COLUMNS if target in at]
    folder = os.path.dirname(os.path.abspath(path))
    utterances, problems = [], []
    for row in filter(any, reader):  # not the blank lines
        try:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} cells, expected {len(header)}")
            audio, split, speaker = (row[at[column]].strip() for column in REQUIRED_COLUMNS[:3])
            if not audio:
                raise ValueError("path is empty")
            if split not in SPLITS:
                raise ValueError(f"split {split!r}, expected one of {', '.join(SPLITS)}")
            labels = {target: number(target, row[i]) for target, i in targets if row[i].strip()}
            utterances.append(Utterance(os.path.join(folder, audio), split, speaker, labels))
        except ValueError as problem:
            problems.append(f"line {reader.line_num}: {problem}")
    raise_listed(f"{path}: bad rows in the manifest", problems)
    if not utterances:
        raise ValueError(f"{path}: the manifest has a header but no rows, expected one for each audio file")
    return utterances


@contextmanager
def reading(path: str | Path, what: str, errors: str = "strict") -> Iterator[TextIO]:
    """A text file, opened; what goes wrong while it is read is one error that names it."""
    try:
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

    Right is: each split has utterances, each utterance a finite label within `label_range` (inclusive) for
    each target, and no speaker is in two splits. A speaker "" or "Unknown" is nobody and may be in all.
    """
    low, high = label_range
    present = {utterance.split for utterance in utterances}
    problems = [Problem("empty split", "", f"split {s!r} has no utterances") for s in SPLITS if s not in present]
    splits_of = defaultdict(set)
    for utterance in utterances:
        splits_of[utterance.speaker].add(utterance.split)
        for target in targets:
            value = utterance.labels.get(target)
            if value is None:
                found = ", ".join(utterance.labels) or "none"
                detail = f"no label for target {target!r}, found {found}"
                problems.append(Problem("no label", utterance.path, detail))
            elif not math.isfinite(value):
                detail = f"{target} is {value}, expected a finite number"
                problems.append(Problem("no label", utterance.path, detail))
            elif not low <= value <= high:
                detail = f"{target} is {value:g}, outside `label_range` {low:g} to {high:g}"
                problems.append(Problem("label outside the range", utterance.path, detail))
    for speaker, splits in splits_of.items():
        if len(splits) > 1 and speaker.lower() not in ("", "unknown") and not allow_speaker_overlap:
            shared = " and ".join(split for split in SPLITS if split in splits)
            detail = f"speaker {speaker!r} is in {shared}; part them, or set `allow_speaker_overlap: true`"
            problems.append(Problem("speaker overlap", "", detail))
    return problems
