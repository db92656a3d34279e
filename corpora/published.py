"""From the files that a corpus is published with to utterances: paths, splits, speakers, labels. No audio is opened.

    utterances = load_corpus("iemocap", "corpora/IEMOCAP_full_release", fold=1)

Splits are those that were published, else of whole sessions or speakers, so that no speaker is in two of them.
"""

import csv
import difflib
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from corpora.demo import synthesize_demo
from manifest import LABEL_COLUMNS, Utterance, number, read_manifest, reading

CORPORA = {  # and the keys of the configuration that each has a use for
    "demo": ("data_root",),
    "manifest": ("manifest",),
    "msp-podcast": ("data_root", "test_set"),
    "iemocap": ("data_root", "fold", "dev_set"),
    "msp-improv": ("data_root", "fold", "flip_activation"),
    "muse": ("data_root",),
}
LABEL_RANGE: dict[str, tuple[float, float]] = {  # a manifest has no range of its own
    "demo": (1.0, 7.0),
    "msp-podcast": (1.0, 7.0),
    "iemocap": (1.0, 5.0),
    "msp-improv": (1.0, 5.0),
    "muse": (1.0, 9.0),
}
SESSIONS = {"iemocap": 5, "msp-improv": 6}  # as many folds, each with another session held out
PODCAST_COLUMNS = ("FileName", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Split_Set")
PODCAST_SPLITS = {"train": "train", "validation": "dev", "development": "dev"}
PODCAST_TESTS = ("Test1", "Test2", "Test3")
IEMOCAP_TURN = re.compile(r"\[[\d.]+ - [\d.]+\]\t(Ses\d\d\w+)\t\w+\t\[([\d.]+), ([\d.]+), ([\d.]+)\]")
IEMOCAP_SLACK = 0.5  # how far above 5 a mean of ratings is a slip and not another scale
IMPROV_TURN = re.compile(
    r"UTD-(IMPROV-S\d\d\w-([FM]\d\d)-\w-\w+)\.avi\s*;\s*(\w)\s*;"
    r"\s*A:([\d.]+|NaN)\s*;\s*V:([\d.]+|NaN)\s*;\s*D:([\d.]+|NaN)\s*;"
)

Notes = dict[str, list[str]]  # what was left out or is odd, and the names of the files


class Row(NamedTuple):
    """What a label file says of an audio file, which it names without its folder; split "" is not used."""

    file: str
    split: str
    speaker: str
    labels: dict[str, float]


# ---------------------------------------------------------------- any corpus


def load_corpus(
    name: str,
    root: str | None = None,
    manifest: str | None = None,
    fold: int | None = None,
    test_set: str | None = None,
    dev_set: str | None = None,
    flip_activation: bool | None = None,
) -> list[Utterance]:
    """The utterances of a corpus; what was left out of it or is odd is said once on stderr. See `read_corpus`."""
    utterances, notes = read_corpus(name, root, manifest, fold, test_set, dev_set, flip_activation)
    for note, files in notes.items():
        examples = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        say_once(f"warning: {root}: {note}" + (f": {len(files):,} ({examples})" if files else ""))
    return utterances


@cache
def say_once(line: str) -> None:
    """Print a line to stderr, however often it is asked for."""
    print(line, file=sys.stderr)


def read_corpus(
    name: str,
    root: str | None = None,
    manifest: str | None = None,
    fold: int | None = None,
    test_set: str | None = None,
    dev_set: str | None = None,
    flip_activation: bool | None = None,
) -> tuple[list[Utterance], Notes]:
    """The utterances of corpus `name`, one of `CORPORA`, in folder `root`, and what a user should know of them.

    "demo" is synthesised into `root` if it is not there, "manifest" is a CSV. `test_set` of MSP-Podcast is Test1
    (the default), Test2 or Test3. IEMOCAP and MSP-IMPROV have a `fold` for each session, which it holds out to test on,
    while the next session is the development set; `dev_set` "speaker" of IEMOCAP keeps that for training, develops on
    the held-out session's woman and tests on its man. `flip_activation` (the default) is for MSP-IMPROV alone.

    Raises FileNotFoundError or ValueError for an unknown name, an argument that the corpus has no use for, and files
    that are not as published.
    """
    if name not in CORPORA:
        nearest = difflib.get_close_matches(name, CORPORA, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"corpus: {name!r} is unknown, expected one of {', '.join(CORPORA)}{hint}")
    given = {"data_root": root, "manifest": manifest, "fold": fold, "test_set": test_set, "dev_set": dev_set}
    for key, value in (given | {"flip_activation": flip_activation}).items():
        if value is not None and key not in CORPORA[name]:
            raise ValueError(f"{key}: corpus {name!r} has no use for it, found {value!r}; remove the key")
    if name == "demo":
        return read_manifest(synthesize_demo(root or "data/demo")), {}
    if name == "manifest":
        if manifest is None:
            raise ValueError("manifest: found nothing, but corpus 'manifest' needs a CSV; set `manifest: FILE`")
        return read_manifest(manifest), {}
    if root is None:
        raise ValueError(f"data_root: found nothing; set it to the folder of corpus {name!r}")
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; check the key `data_root`")
    if name == "msp-podcast":
        return read_msp_podcast(folder, test_set or "Test1")
    if name == "muse":
        return read_muse(folder)
    split = leave_session_out(fold, SESSIONS[name], dev_set or "session")
    if name == "iemocap":
        return read_iemocap(folder, split)
    return read_msp_improv(folder, split, flip_activation is not False)


def leave_session_out(fold: int | None, sessions: int, dev_set: str) -> Callable[[int, str], str]:
    """The split of a session's speaker, "F" or "M", as `read_corpus` describes it. Raises ValueError for `fold`."""
    if fold not in range(1, sessions + 1):
        raise ValueError(f"fold: found {fold!r}, expected 1 to {sessions}: the session that is held out")
    if dev_set not in ("session", "speaker"):
        raise ValueError(f"dev_set: found {dev_set!r}, expected session or speaker")

    def split(session: int, gender: str) -> str:
        if dev_set == "session":
            return {fold: "test", fold % sessions + 1: "dev"}.get(session, "train")
        return "train" if session != fold else "dev" if gender == "F" else "test"

    return split


def join(source: Path, rows: Iterable[Row], folders: Iterable[Path]) -> tuple[list[Utterance], Notes]:
    """Rows of the label file `source` with the audio below `folders`; what has no counterpart is left out and noted."""
    folders = list(folders)
    audio = find_wavs(folders)
    utterances, named = [], set()
    no_audio, no_label = [], []
    for file, split, speaker, labels in rows:
        named.add(file)
        if file not in audio:
            no_audio.append(file)
        elif not {"activation", "valence"} <= labels.keys():
            no_label.append(file)
        elif split:
            utterances.append(Utterance(audio[file], split, speaker, labels))
    if not utterances:
        found = f"{len(no_audio):,} names without a file, {len(no_label):,} files without activation or valence"
        places = " and ".join(map(str, folders))
        raise ValueError(f"{source}: no labels of the {len(audio):,} WAV files below {places} ({found})")
    notes = {"labels without audio, left out": no_audio, "audio without activation or valence, left out": no_label}
    notes["audio that the labels do not name, left out"] = sorted(audio.keys() - named)
    return utterances, {note: files for note, files in notes.items() if files}


def find_wavs(folders: Iterable[Path]) -> dict[str, str]:
    """Paths of all WAV files below the folders by their names, without the `._*` that macOS puts beside them."""
    found: dict[str, str] = {}
    for folder in folders:
        for path, below, files in os.walk(folder):
            below.sort()  # so that of two files with one name it is the same everywhere
            for file in files:
                if file.lower().endswith(".wav") and not file.startswith("._"):
                    found.setdefault(file, os.path.join(path, file))
    return found


def find(folder: Path, *names: str) -> Path:
    """The entry of a folder that has one of these names, whatever their case. Raises FileNotFoundError."""
    there = sorted(os.listdir(folder))
    wanted = {name.lower() for name in names}
    for entry in there:
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


# ---------------------------------------------------------------- published corpora


def read_msp_podcast(folder: Path, test_set: str = "Test1") -> tuple[list[Utterance], Notes]:
    """MSP-Podcast 1.6 to 2.0: train, development and one of its test sets; labels 1..7."""
    audio = find(folder, "Audios", "Audio")
    source = find(find(folder, "Labels", "Label"), "labels_consensus.csv", "labels_concensus.csv")
    if test_set not in PODCAST_TESTS:
        raise ValueError(f"test_set: found {test_set!r}, expected one of {', '.join(PODCAST_TESTS)}")
    splits = PODCAST_SPLITS | {test.lower(): "test" if test == test_set else "" for test in PODCAST_TESTS}

    def rows() -> Iterator[Row]:
        for line, (file, *cells, speaker, split) in read_table(source, PODCAST_COLUMNS):
            if split.lower() not in splits:
                known = "Train, Development or Validation, Test1, Test2, Test3"
                raise ValueError(f"{source}: line {line}: split {split!r}, expected one of {known}: an unknown version")
            yield Row(file, splits[split.lower()], speaker, numbers(cells, f"{source}: line {line}"))

    utterances, notes = join(source, rows(), [audio])
    if not any(utterance.split == "test" for utterance in utterances):
        raise ValueError(f"test_set: {source} has no labels of {test_set}; choose another of Test1, Test2 and Test3")
    return utterances, notes


def read_iemocap(folder: Path, split: Callable[[int, str], str]) -> tuple[list[Utterance], Notes]:
    """IEMOCAP: labels 1..5, where a mean of ratings slightly above 5 counts as 5. `split`: see `leave_session_out`."""
    sessions = {number: find(folder, f"Session{number}") for number in range(1, SESSIONS["iemocap"] + 1)}
    high, above = LABEL_RANGE["iemocap"][1], []

    def rows() -> Iterator[Row]:
        for session, place in sessions.items():
            sources = find(find(place, "dialog"), "EmoEvaluation").glob("[!.]*.txt")
            for source in sorted(sources):
                with reading(source, "label file", errors="replace") as file:
                    turns = [match.groups() for line in file if (match := IEMOCAP_TURN.match(line))]
                if not turns:
                    raise ValueError(f"{source}: no turn, expected lines [start - end] TURN category [v, a, d]")
                for turn, valence, activation, dominance in turns:
                    labels = numbers([activation, valence, dominance], f"{source}: {turn}")
                    slips = {target: high for target, value in labels.items() if high < value <= high + IEMOCAP_SLACK}
                    if slips:
                        above.append(f"{turn}.wav")
                    gender = turn.rpartition("_")[2][0]
                    yield Row(f"{turn}.wav", split(session, gender), turn[:5] + gender, labels | slips)

    places = [find(find(place, "sentences"), "wav") for place in sessions.values()]
    utterances, notes = join(folder, rows(), places)
    return utterances, notes | ({f"labels slightly above {high:g}, taken as {high:g}": above} if above else {})


def read_msp_improv(
    folder: Path, split: Callable[[int, str], str], flip_activation: bool = True
) -> tuple[list[Utterance], Notes]:
    """MSP-IMPROV: labels 1..5, activation as 6 - A if it is flipped. `split`: see `leave_session_out`.

    Activation was stored from high to low according to one laboratory, and another took it as it is. Therefore the
    turns that raters called angry and neutral are compared, and it is noted if angry is not the more active.
    """
    source = find(folder, "Evalution.txt", "Evaluation.txt")
    activations = defaultdict(list)  # by category

    def rows() -> Iterator[Row]:
        with reading(source, "label file", errors="replace") as file:
            for line, text in enumerate(file, 1):
                if not text.startswith("UTD-"):
                    continue  # a rater, or nothing
                match = IMPROV_TURN.match(text)
                if not match:
                    raise ValueError(f"{source}: line {line}: expected UTD-IMPROV-...avi; N; A:3.0; V:3.0; D:3.0; ...")
                turn, speaker, category, *cells = match.groups()
                labels = numbers(cells, f"{source}: line {line}")
                if "activation" in labels:
                    labels["activation"] = 6 - labels["activation"] if flip_activation else labels["activation"]
                    activations[category].append(labels["activation"])
                yield Row(f"MSP-{turn}.wav", split(int(speaker[1:]), speaker[0]), speaker, labels)

    utterances, notes = join(source, rows(), [folder])
    if activations["A"] and activations["N"]:
        angry, neutral = fmean(activations["A"]), fmean(activations["N"])
        if angry <= neutral:
            means = f"means {angry:.2f} and {neutral:.2f}"
            other = str(not flip_activation).lower()
            notes[f"angry turns are not more active than neutral ones ({means}): try flip_activation: {other}"] = []
    return utterances, notes


def read_muse(folder: Path) -> tuple[list[Utterance], Notes]:
    """MuSE: labels 1..9, ratings of sentences heard in random order.

    No split was published. Ours goes by speakers in the order of their names: of five the fourth is for development
    and the fifth for testing, which makes 18, 5 and 5 of 28.
    """
    sources = sorted(folder.glob("*/Emotion data from crowdsourcing*.csv"))
    if not sources:
        raise not_found(folder, "a folder with `Emotion data from crowdsourcing ... .csv`")
    audio = [find(find(folder, kind), "Audio") for kind in ("NotStressed", "Stressed")]
    columns = ("", "Activation_Mean", "Valence_Mean")
    table = list(read_table(sources[0], columns))
    speakers = sorted({file[:2] for _, (file, *_) in table})
    split = {speaker: ("train", "train", "train", "dev", "test")[at % 5] for at, speaker in enumerate(speakers)}

    def rows() -> Iterator[Row]:
        for line, (file, *cells) in table:
            labels = numbers(cells, f"{sources[0]}: line {line}")
            yield Row(file.removesuffix(".wav") + ".wav", split[file[:2]], file[:2], labels)

    return join(sources[0], rows(), audio)


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The line and the cells of these columns of each row of a published CSV; column "" is the first."""
    with reading(path, "label file", errors="replace") as file:
        reader = csv.reader(file)
        header = [cell.strip() for cell in next(reader, [])]
        if missing := [column for column in columns if column and column not in header]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; found {header}: an unknown version")
        at = [header.index(column) if column else 0 for column in columns]
        for row in filter(any, reader):
            if len(row) < len(header):
                raise ValueError(f"{path}: line {reader.line_num}: {len(row)} cells, expected {len(header)}")
            yield reader.line_num, [row[i].strip() for i in at]
