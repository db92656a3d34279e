"""Look at a corpus without training: its numbers, a picture of its labels, and every problem with its file.

The exit status is 0 if no problem was found, 1 after warnings, and 2 after errors.
"""

import argparse
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm.contrib.concurrent import thread_map

import data
import run
from config import expand, load_config
from corpora.published import CORPORA
from data import SPLITS, Problem, Utterance
from machine import hardware
from machine.audio import TooShortError, read_original, silence
from machine.programs import command
from report import tables

CLIPPED = 1e-3  # the share of samples at full scale that is heard
LONG = 60.0  # seconds; one label hardly holds for so long, and attention needs memory for the square
# What training refuses, and what makes scores too good; every other kind of problem is a warning.
ERRORS = {"missing", "unreadable", "too short", "no label", "label outside the range", "several labels", "empty split"}
ERRORS |= {"constant labels", "speaker overlap", "file in two splits", "duplicate in two splits"}
PROBLEM, SPEAKER = ("severity", "problem", "file", "detail"), ("split", "speaker", "utterances", "hours")  # columns
Rows = Sequence[tuple[Utterance, float]]  # each with its seconds, 0 if it cannot be read
Heard = tuple[float, bytes, list[Problem]]  # of a file: seconds, a hash of its samples unless it is silent, and faults


def check_corpus(path: str, overrides: Sequence[str], out: str | None = None) -> int:
    """Print a report on the corpus of a configuration and write it to folder `out`, by default below its output_dir.

    Returns how bad it is: 0, 1 for warnings alone, 2 for errors. Raises OSError or ValueError where there is no corpus
    to look at, or no place to write to.
    """
    config = load_config(path, overrides)
    utterances, notes = data.read_corpus(**run.corpus_keys(config))
    label_range = data.find_label_range(config.corpus, config.label_range, utterances, config.targets)
    chosen = {"fold": config.fold, "test_set": config.test_set, "dev_set": config.dev_set}
    words = [config.corpus, *(f"{key}={value}" for key, value in chosen.items() if value is not None)]
    title = run.DEMO_NOTE if config.corpus == "demo" else " ".join(words)
    folder = Path(out) if out else Path(config.output_dir) / "check" / "_".join(words)
    folder.mkdir(parents=True, exist_ok=True)  # before anything that takes long
    sources, workers = [utterance.source for utterance in utterances], min(16, os.cpu_count() or 1)
    heard = thread_map(listen, sources, max_workers=workers, desc="audio", unit="file", disable=None)
    rows = [(utterance, seconds) for utterance, (seconds, _, _) in zip(utterances, heard, strict=True)]
    problems = list(data.label_problems(utterances, config.targets, label_range, config.allow_speaker_overlap))
    problems += [Problem(note, file, "") for note, files in notes.items() for file in files or [""]]
    problems += [problem for _, _, faults in heard for problem in faults] + duplicates(utterances, heard)
    problems.sort(key=lambda problem: problem.kind not in ERRORS)  # errors first, else as they were
    found = [("error" if problem.kind in ERRORS else "warning", *problem) for problem in problems]
    splits = labels_and_seconds(rows, config.targets)
    lines = [f"# {title}", "", split_table(utterances, splits, config.targets), ""]
    corpus = CORPORA.get(config.corpus)
    if corpus and corpus.agreement:
        scores = corpus.agreement(Path(config.data_root or "")).items()
        agreement = ", ".join(f"{target} {spread(values, 2)}" for target, values in scores if values)
        lines += [f"Raters, each against the mean of the others, CCC: {agreement or 'unknown'}.", ""]
    report = "\n".join(lines + list_problems(found))
    print(report)  # before a full disk can take it away
    hardware.write_text(folder / "report.md", f"{report}\n", "as_named")
    problems_csv = [dict(zip(PROBLEM, problem, strict=True)) for problem in found]
    tables.write_csv(folder / "problems.csv", PROBLEM, problems_csv, "as_named")
    tables.write_csv(folder / "speakers.csv", SPEAKER, speakers(rows), "as_named")
    if plots := tables.find_plots():
        plots.labels(splits, config.targets, label_range, title, folder / "labels")
    drawn = "labels.png, labels.pdf" if plots else "no picture, since matplotlib is not installed"
    print(f"\n{folder}: report.md, problems.csv, speakers.csv, {drawn}")
    return max((2 if severity == "error" else 1 for severity, *_ in found), default=0)


def listen(path: str) -> Heard:
    """Decode a file whole. Its length is 0 if it cannot be read."""
    try:
        waveform, samples, sample_rate = read_original(path)
    except (FileNotFoundError, ValueError) as error:
        kind = {FileNotFoundError: "missing", TooShortError: "too short"}.get(type(error), "unreadable")
        return 0.0, b"", [Problem(kind, path, str(error).removeprefix(f"{path}: "))]
    seconds, problems = samples / sample_rate, []
    if seconds > LONG:
        problems.append(Problem("too long", path, f"{seconds:.1f} s, expected at most {LONG:g} s"))
    if problem := silence(waveform):
        return seconds, b"", [*problems, Problem("silent", path, problem)]
    share = float((np.abs(waveform) >= 0.999).mean())
    if share >= CLIPPED:
        problems.append(Problem("clipped", path, f"{share:.1%} of the samples are at full scale"))
    return seconds, blake2b(waveform.tobytes(), digest_size=16).digest(), problems


def duplicates(utterances: Sequence[Utterance], heard: Sequence[Heard]) -> list[Problem]:
    """Every utterance with the same samples as one before it; worse if they are in different splits."""
    problems, first = [], {}
    for utterance, (_, digest, _) in zip(utterances, heard, strict=True):
        other = first.setdefault(digest, utterance) if digest else utterance
        if other is not utterance:
            kind = "duplicate" if other.split == utterance.split else "duplicate in two splits"
            detail = f"in {utterance.split}, sounds as {other.path} in {other.split}"
            problems.append(Problem(kind, utterance.path, detail))
    return problems


def labels_and_seconds(rows: Rows, targets: Sequence[str]) -> dict[str, np.ndarray]:
    """Of each split `(N, K + 1)`: the labels and, in the last column, seconds; NaN where there is none."""
    table = [[*(u.labels.get(target, math.nan) for target in targets), seconds or math.nan] for u, seconds in rows]
    values = np.reshape(np.array(table, float), (-1, len(targets) + 1))
    values[~np.isfinite(values)] = math.nan
    return {split: values[[utterance.split == split for utterance, _ in rows]] for split in SPLITS}


def split_table(utterances: Sequence[Utterance], splits: Mapping[str, np.ndarray], targets: Sequence[str]) -> str:
    """Markdown: a row a split; seconds, labels and a speaker's utterances as mean (least to most)."""
    columns, table = ["split", "utterances", "speakers", "utterances a speaker", "hours", "seconds", *targets], []
    for split, values in (*splits.items(), ("all", np.concatenate(list(splits.values())))):
        speakers = Counter(utterance.speaker for utterance in utterances if split in (utterance.split, "all"))
        named = sum(not data.is_nobody(speaker) for speaker in speakers)
        *labels, seconds = (column[~np.isnan(column)] for column in values.T)
        table.append([split, f"{len(values):,}", f"{named:,}", spread(list(speakers.values()), 0)])
        table[-1] += [f"{sum(seconds) / 3600:.2f}", spread(seconds, 1), *(spread(found, 2) for found in labels)]
    return tables.markdown(columns, table)


def spread(values: Sequence[float], digits: int) -> str:
    if not len(values):
        return ""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(np.mean(values), min(values), max(values), d=digits)


def list_problems(found: Sequence[tuple[str, ...]], limit: int = 20) -> list[str]:
    """Markdown: how many problems there are of each kind, and the first in full, of severity, kind, file and detail."""
    if not found:
        return ["No problem was found."]
    counts = Counter((severity, kind) for severity, kind, *_ in found)
    rows = [[severity, kind, f"{count:,}"] for (severity, kind), count in counts.items()]
    lines = [tables.markdown(["severity", "problem", "times"], rows), ""]
    lines += [f"- {': '.join(filter(None, problem))}" for _, *problem in found[:limit]]
    return lines + ([f"- and {len(found) - limit:,} more"] if len(found) > limit else [])


def speakers(rows: Rows) -> list[dict]:
    """A row with the columns of SPEAKER for each speaker in each split."""
    lengths = defaultdict(list)
    for utterance, seconds in rows:
        lengths[SPLITS.index(utterance.split), utterance.speaker].append(seconds)
    found = ((SPLITS[at], who, len(each), f"{sum(each) / 3600:.4f}") for (at, who), each in sorted(lengths.items()))
    return [dict(zip(SPEAKER, row, strict=True)) for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m corpora.check", description=__doc__)
    parser.add_argument("config", help="a YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set otherwise")
    parser.add_argument("--out", type=expand, help="folder for the report, tables and pictures; else below output_dir")
    arguments = parser.parse_args()
    sys.exit(check_corpus(arguments.config, arguments.overrides, arguments.out))


if __name__ == "__main__":
    command(main, "stopped; no report is written", code=2)
