"""Look at a corpus without training: its numbers, a picture of its labels, and every problem with its file.

    python -m corpora.check CONFIG [key=value ...] [--out DIR]

The exit status is 0 if no problem was found, 1 after warnings, and 2 after errors, which are what training refuses
and what makes scores too good.
"""

import argparse
import csv
import io
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import data
import run
from config import load_config
from corpora.published import CORPORA
from data import SPLITS, Problem, Utterance, is_nobody, text_cell
from machine.audio import TooShortError, read_original, silence

CLIPPED = 1e-3  # the share of samples at full scale that is heard
LONG = 60.0  # seconds; one label hardly holds for so long, and attention needs memory for the square
ERRORS = (  # what training refuses, and what makes scores too good; every other kind of problem is a warning
    "empty split",
    "missing",
    "unreadable",
    "too short",
    "no label",
    "label outside the range",
    "speaker overlap",
    "duplicate in two splits",
    "constant labels",
    "file in two splits",
    "several labels",
)
DENSE = 2000  # utterances from which on a picture shows their number in place of each
LOOKS = {"train": ("#000000", "-", "o"), "dev": ("#0072b2", "--", "^"), "test": ("#d55e00", ":", "s")}


class Heard(NamedTuple):
    """What was found in a file: its length, a hash of its samples unless it is silent, and what is wrong with it."""

    seconds: float
    digest: bytes
    problems: list[Problem]


def inspect(
    utterances: Sequence[Utterance],
    problems: Sequence[Problem],
    targets: Sequence[str],
    label_range: tuple[float, float],
    title: str,
    folder: Path,
    agreement: dict[str, list[float]] | None = None,
) -> tuple[str, int]:
    """Listen to a corpus, and write what is found, `problems` known before included, into a folder.

    Returns the report in Markdown, and 2 if there is an error, 1 if there is but a warning, else 0. What cannot be
    written is said at its end, and an error. Raises OSError for a folder that cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)  # before anything that takes long
    heard = listen_to(utterances, threads=min(16, os.cpu_count() or 1))
    seconds = [each.seconds for each in heard]
    problems = [*problems, *(problem for each in heard for problem in each.problems), *duplicates(utterances, heard)]
    problems.sort(key=lambda problem: severity(problem.kind))  # errors first, else as they were
    report = "\n".join(
        [f"# {title}", "", *split_table(utterances, seconds, targets), "", *raters(agreement), *problem_list(problems)]
    )
    texts = {"report.md": report + "\n", "problems.csv": problems_csv(problems)}
    texts["speakers.csv"] = speakers_csv(utterances, seconds)
    severities = {severity(problem.kind) for problem in problems}
    try:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        pictures = draw_labels(utterances, seconds, targets, label_range, title, folder / "labels")
        end = ", ".join([*texts, *(pictures or ["no picture, since matplotlib is not installed"])])
    except OSError as error:  # a full disk does not take the report away
        severities, end = {"error"}, f"cannot be written: {error}"
    return f"{report}\n\n{folder}: {end}", 2 if "error" in severities else len(severities)


def listen_to(utterances: Sequence[Utterance], threads: int) -> list[Heard]:
    """Decode every file, a few at a time, with a progress bar."""
    parts = [utterances[start : start + 16] for start in range(0, len(utterances), 16)]
    heard: list[Heard] = []
    bar = tqdm(total=len(utterances), desc="audio", unit="file", disable=None)
    with ThreadPoolExecutor(threads) as pool, bar:
        for part in pool.map(lambda part: [listen(utterance.source) for utterance in part], parts):
            heard += part
            bar.update(len(part))
    return heard


def listen(path: str) -> Heard:
    """Decode a file whole. Its length is 0 if it cannot be read."""
    try:
        waveform, samples, sample_rate = read_original(path)
    except (FileNotFoundError, ValueError) as error:
        kinds = {FileNotFoundError: "missing", TooShortError: "too short"}
        detail = str(error).removeprefix(f"{path}: ")
        return Heard(0.0, b"", [Problem(kinds.get(type(error), "unreadable"), path, detail)])
    problems = []
    seconds = samples / sample_rate
    if seconds > LONG:
        problems.append(Problem("too long", path, f"{seconds:.1f} s, expected at most {LONG:g} s"))
    if problem := silence(waveform):
        problems.append(Problem("silent", path, problem))
        return Heard(seconds, b"", problems)
    share = float((np.abs(waveform) >= 0.999).mean())
    if share >= CLIPPED:
        problems.append(Problem("clipped", path, f"{share:.1%} of the samples are at full scale"))
    return Heard(seconds, blake2b(waveform.tobytes(), digest_size=16).digest(), problems)


def duplicates(utterances: Sequence[Utterance], heard: Sequence[Heard]) -> list[Problem]:
    """Every utterance with the same samples as one before it; worse if they are in different splits."""
    same = defaultdict(list)
    for utterance, (_, digest, _) in zip(utterances, heard, strict=True):
        if digest:
            same[digest].append(utterance)
    problems = []
    for first, *others in same.values():
        for other in others:
            kind = "duplicate" if other.split == first.split else "duplicate in two splits"
            problems.append(Problem(kind, other.path, f"in {other.split}, sounds as {first.path} in {first.split}"))
    return problems


def split_table(utterances: Sequence[Utterance], seconds: Sequence[float], targets: Sequence[str]) -> list[str]:
    """Markdown: a row a split; seconds, labels and a speaker's utterances as mean (least to most)."""
    columns = ["split", "utterances", "speakers", "utterances a speaker", "hours", "seconds", *targets]
    cells = []
    for split in (*SPLITS, "all"):
        chosen = [(u, s) for u, s in zip(utterances, seconds, strict=True) if split in (u.split, "all")]
        speakers = Counter(utterance.speaker for utterance, _ in chosen)
        row = [
            split,
            f"{len(chosen):,}",
            f"{sum(not is_nobody(speaker) for speaker in speakers):,}",
            spread(list(speakers.values()), 0),
        ]
        row += [f"{sum(s for _, s in chosen) / 3600:.2f}", spread([s for _, s in chosen if s], 1)]
        cells.append(row + [spread(finite([u for u, _ in chosen], target), 2) for target in targets])
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]


def raters(agreement: dict[str, list[float]] | None) -> list[str]:
    """Markdown: how well the raters agree, if that is known."""
    scores = [f"{target} {spread(values, 2)}" for target, values in (agreement or {}).items() if values]
    return [f"Raters, each against the mean of the others, CCC: {', '.join(scores)}.", ""] if scores else []


def spread(values: Sequence[float], digits: int) -> str:
    if not len(values):
        return ""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(np.mean(values), min(values), max(values), d=digits)


def finite(utterances: Sequence[Utterance], target: str) -> np.ndarray:
    """The labels of a target that there are, `(n,)`."""
    values = np.array([utterance.labels.get(target, math.nan) for utterance in utterances], dtype=float)
    return values[np.isfinite(values)]


def problem_list(problems: Sequence[Problem], limit: int = 20) -> list[str]:
    """Markdown: how many problems there are of each kind, and the first in full."""
    if not problems:
        return ["No problem was found."]
    lines = ["| severity | problem | times |", "| --- | --- | --- |"]
    lines += [f"| {severity(kind)} | {kind} | {times:,} |" for kind, times in Counter(p.kind for p in problems).items()]
    shown = [": ".join(filter(None, (p.kind, p.file, p.detail))) for p in problems[:limit]]
    more = [f"- and {len(problems) - limit:,} more"] if len(problems) > limit else []
    return [*lines, "", *(f"- {line}" for line in shown), *more]


def severity(kind: str) -> str:
    return "error" if kind in ERRORS else "warning"


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def speakers_csv(utterances: Sequence[Utterance], seconds: Sequence[float]) -> str:
    """CSV: utterances and hours of each speaker in each split."""
    lengths = defaultdict(list)
    for utterance, length in zip(utterances, seconds, strict=True):
        lengths[SPLITS.index(utterance.split), utterance.speaker].append(length)
    rows = [
        (SPLITS[at], text_cell(who), len(each), f"{sum(each) / 3600:.4f}")
        for (at, who), each in sorted(lengths.items())
    ]
    return csv_text([("split", "speaker", "utterances", "hours"), *rows])


def problems_csv(problems: Sequence[Problem]) -> str:
    rows = [(severity(problem.kind), *map(text_cell, problem)) for problem in problems]
    return csv_text([("severity", "problem", "file", "detail"), *rows])


def draw_labels(
    utterances: Sequence[Utterance],
    seconds: Sequence[float],
    targets: Sequence[str],
    label_range: tuple[float, float],
    title: str,
    path: Path,
) -> list[str]:
    """Labels and lengths of each split, and activation over valence, as `<path>.png` and `.pdf`.

    Returns the names of the files, or none where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    of_split = {split: [u for u in utterances if u.split == split] for split in SPLITS}
    panels = {target: {s: finite(chosen, target) for s, chosen in of_split.items()} for target in targets}
    read = [(u.split, length) for u, length in zip(utterances, seconds, strict=True) if length]
    panels["seconds"] = {split: np.array([length for s, length in read if s == split]) for split in SPLITS}
    figure = Figure(figsize=(2.6 * len(panels) + 3.4, 3), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1, width_ratios=[1] * len(panels) + [1.1])
    for axis, (name, values) in zip(axes, panels.items(), strict=False):
        there = np.concatenate([*values.values(), [0.0, 1.0] if name == "seconds" else label_range])
        edges = np.linspace(there.min(), there.max(), 25 if name == "seconds" else 13)
        for split, (color, line, _) in LOOKS.items():
            weights = np.full(len(values[split]), 100 / max(1, len(values[split])))
            form = {"color": color, "linestyle": line}
            axis.hist(values[split], edges, weights=weights, histtype="step", linewidth=1.5, **form)
        axis.set(xlabel=name)
    axes[0].set(ylabel="% of the split")
    lines = [axes[0].plot([], [], color=color, linestyle=line)[0] for color, line, _ in LOOKS.values()]
    named = [f"{split} ({len(chosen):,})" for split, chosen in of_split.items()]
    figure.legend(lines, named, loc="outside lower center", ncols=len(SPLITS), frameon=False, fontsize="small")
    plane(figure, axes[-1], of_split, label_range)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    files = [path.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for file in files:
        figure.savefig(file, dpi=150)
    return [file.name for file in files]


def plane(figure: Any, axis: Any, of_split: dict[str, list[Utterance]], label_range: tuple[float, float]) -> None:
    """Activation over valence on an axis of matplotlib: a mark for each utterance, or the density of many."""
    points = {}  # (2, n) of each split
    for split, chosen in of_split.items():
        both = np.array([[u.labels.get(t, math.nan) for t in ("valence", "activation")] for u in chosen], dtype=float)
        points[split] = both.reshape(-1, 2).T[:, np.isfinite(both.reshape(-1, 2)).all(axis=1)]
    every = np.concatenate(list(points.values()), axis=1)
    low, high = min([*every.ravel(), label_range[0]]), max([*every.ravel(), label_range[1]])
    if every.shape[1] > DENSE:
        bins = axis.hexbin(*every, gridsize=24, extent=(low, high, low, high), mincnt=1, bins="log", cmap="viridis_r")
        figure.colorbar(bins, ax=axis, label="utterances")
    else:
        for split, (color, _, mark) in LOOKS.items():
            axis.plot(*points[split], mark, color=color, markersize=4, markerfacecolor="none", label=split)
        axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    axis.set(xlabel="valence", ylabel="activation", aspect="equal")


def check_corpus(path: str, overrides: Sequence[str], out: str | None = None) -> tuple[str, int]:
    """Check the corpus of a configuration and write what is found into folder `out`, by default below its output_dir.

    Returns the report, and how bad it is: 0, 1 for warnings alone, 2 for errors. Raises FileNotFoundError, OSError or
    ValueError where there is no corpus to look at.
    """
    config = load_config(path, overrides)
    utterances, notes = data.read_corpus(**run.corpus_keys(config))
    label_range = data.find_label_range(config.corpus, config.label_range, utterances, config.targets)
    problems = list(data.label_problems(utterances, config.targets, label_range, config.allow_speaker_overlap))
    problems += [Problem(note, file, "") for note, files in notes.items() for file in files or [""]]
    chosen = {"fold": config.fold, "test_set": config.test_set, "dev_set": config.dev_set}
    words = [config.corpus, *(f"{key}={value}" for key, value in chosen.items() if value is not None)]
    folder = Path(out) if out else Path(config.output_dir) / "check" / "_".join(words)
    title = run.DEMO_NOTE if config.corpus == "demo" else " ".join(words)
    corpus = CORPORA.get(config.corpus)
    agreement = corpus.agreement(Path(config.data_root)) if corpus and corpus.agreement else None
    return inspect(utterances, problems, config.targets, label_range, title, folder, agreement)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m corpora.check", description="Look at a corpus without training.")
    parser.add_argument("config", help="a YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set otherwise")
    parser.add_argument("--out", help="folder for the report, its tables and pictures; else one below output_dir")
    arguments = parser.parse_args()
    report, status = check_corpus(arguments.config, arguments.overrides, arguments.out)
    sys.stdout.reconfigure(errors="backslashreplace")  # a Windows pipe cannot carry every file's name
    print(report)
    sys.exit(status)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'stopped; no report is written'}", file=sys.stderr)
        sys.exit(2)
