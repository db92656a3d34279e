"""What the readers of published corpora share: files found below a folder, tables, and labels joined with audio."""

import csv
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data import LABEL_COLUMNS, Notes, Utterance, number, reading


def leave_session_out(fold: int, sessions: int, session: int, gender: str, dev_set: str = "session") -> str:
    """The split of a session's speaker, "F" or "M": session `fold` is for testing.

    The next session is for development, after the last one the first. With `dev_set` "speaker" that session trains
    too, and the held-out session's woman is for development, its man for testing. Raises ValueError for `dev_set`.
    """
    if dev_set == "session":
        return {fold: "test", fold % sessions + 1: "dev"}.get(session, "train")
    if dev_set != "speaker":
        raise ValueError(f"dev_set: found {dev_set!r}, expected session or speaker")
    return "train" if session != fold else "dev" if gender == "F" else "test"


def join(source: Path, rows: Iterable[Utterance], folders: Sequence[Path]) -> tuple[list[Utterance], Notes]:
    """Rows of the label file `source` with the audio below `folders`; what has no counterpart is left out and noted.

    A row has the name of its file for a path, and split "" if it is not used.
    """
    audio: dict[str, str] = {}
    for path, files in (each for folder in folders for each in folders_below(folder)):
        for file in files:
            if file.lower().endswith(".wav"):
                audio.setdefault(file, os.path.join(path, file))
    utterances, named, no_audio, no_label = [], set(), [], []
    for row in rows:
        named.add(row.path)
        if row.path not in audio:
            no_audio.append(row.path)
        elif not {"activation", "valence"} <= row.labels.keys():
            no_label.append(row.path)
        elif row.split:
            utterances.append(replace(row, path=audio[row.path]))
    if not utterances:
        found = f"{len(no_audio):,} names without a file, {len(no_label):,} files without activation or valence"
        places = " and ".join(map(str, folders))
        raise ValueError(f"{source}: no labels of the {len(audio):,} WAV files below {places} ({found})")
    notes = {"labels without audio, left out": no_audio, "audio without activation or valence, left out": no_label}
    notes["audio that the labels do not name, left out"] = sorted(audio.keys() - named)
    return utterances, {note: files for note, files in notes.items() if files}


def folders_below(folder: str | Path, unread: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it, also behind links, and the files in each; without the `._*` of macOS.

    Each is there once, so links may go round in a circle. What cannot be listed is added to `unread`, or is an error.
    """

    def failed(error: OSError) -> None:
        if unread is None:
            raise error
        unread.append(error.filename)

    seen = set()
    for path, below, files in os.walk(folder, onerror=failed, followlinks=True):
        if (place := os.path.realpath(path)) in seen:
            below.clear()
            continue
        seen.add(place)
        below.sort()  # so that of two files with one name it is the same everywhere
        yield path, sorted(file for file in files if not file.startswith("._"))


def find(folder: Path, *names: str) -> Path:
    """The entry of a folder that has one of these names, whatever their case. Raises FileNotFoundError."""
    wanted = {name.lower() for name in names}
    for entry in sorted(os.listdir(folder)):
        if entry.lower() in wanted:
            return folder / entry
    raise not_found(folder, " or ".join(names))


def not_found(folder: Path, expected: str) -> FileNotFoundError:
    there = sorted(os.listdir(folder))
    holds = ", ".join(there[:10]) + (f" and {len(there) - 10:,} more" if len(there) > 10 else "")
    return FileNotFoundError(f"{folder}: looked for {expected}, found {holds or 'nothing'}; check the key `data_root`")


def numbers(cells: Iterable[str], where: str) -> dict[str, float]:
    """Labels of activation, valence and, if there is a third cell, dominance; "" and NaN are none."""
    try:
        values = {target: number(target, cell or "nan") for target, cell in zip(LABEL_COLUMNS, cells, strict=False)}
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from None
    return {target: value for target, value in values.items() if not math.isnan(value)}


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Of each row of a published CSV its place, for messages, and the cells of these columns; "" is the first."""
    with reading(path, "label file", errors="replace") as file:
        reader = csv.reader(file)
        header = [cell.strip() for cell in next(reader, [])]
        if missing := [column for column in columns if column and column not in header]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; found {header}: an unknown version")
        at = [header.index(column) if column else 0 for column in columns]
        for row in filter(any, reader):
            where = f"{path}: line {reader.line_num}"
            if len(row) < len(header):
                raise ValueError(f"{where}: {len(row)} cells, expected {len(header)}")
            yield where, [row[i].strip() for i in at]
