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
from typing import Any

import numpy as np
from tqdm import tqdm

import data
import run
from config import expand, load_config
from corpora.published import CORPORA
from data import SPLITS, Problem, Utterance
from machine.audio import TooShortError, read_original, silence
from machine.programs import command

CLIPPED = 1e-3  # the share of samples at full scale that is heard
LONG = 60.0  # seconds; one label hardly holds for so long, and attention needs memory for the square
# What training refuses, and what makes scores too good; every other kind of problem is a warning.
ERRORS = {"missing", "unreadable", "too short", "no label", "label outside the range", "several labels", "empty split"}
ERRORS |= {"constant labels", "speaker overlap", "file in two splits", "duplicate in two splits"}
DENSE = 2000  # utterances from which on a picture shows their number in place of each
LOOKS = {"train": ("#000000", "-", "o"), "dev": ("#0072b2", "--", "^"), "test": ("#d55e00", ":", "s")}
Rows = Sequence[tuple[Utterance, float]]  # each with its seconds, 0 if it cannot be read
Heard = tuple[float, bytes, list[Problem]]  # of a file: seconds, a hash of its samples unless it is silent, and faults


def check_corpus(path: str, overrides: Sequence[str], out: str | None = None) -> tuple[str, int]:
    """Check the corpus of a configuration and write what is found into folder `out`, by default below its output_dir.

    Returns the report in Markdown, and how bad it is: 0, 1 for warnings alone, 2 for errors. What cannot be written is
    said at its end, and an error. Raises FileNotFoundError, OSError or ValueError where there is no corpus to look at.
    """
    config = load_config(path, overrides)
    utterances, notes = data.read_corpus(**run.corpus_keys(config))
    label_range = data.find_label_range(config.corpus, config.label_range, utterances, config.targets)
    chosen = {"fold": config.fold, "test_set": config.test_set, "dev_set": config.dev_set}
    words = [config.corpus, *(f"{key}={value}" for key, value in chosen.items() if value is not None)]
    title = run.DEMO_NOTE if config.corpus == "demo" else " ".join(words)
    folder = Path(out) if out else Path(config.output_dir) / "check" / "_".join(words)
    folder.mkdir(parents=True, exist_ok=True)  # before anything that takes long
    heard = listen_to(utterances)
    rows = [(utterance, seconds) for utterance, (seconds, _, _) in zip(utterances, heard, strict=True)]
    problems = list(data.label_problems(utterances, config.targets, label_range, config.allow_speaker_overlap))
    problems += [Problem(note, file, "") for note, files in notes.items() for file in files or [""]]
    problems += [problem for _, _, faults in heard for problem in faults] + duplicates(utterances, heard)
    problems.sort(key=lambda problem: problem.kind not in ERRORS)  # errors first, else as they were
    lines = [f"# {title}", "", *split_table(rows, config.targets), ""]
    corpus = CORPORA.get(config.corpus)
    if corpus and corpus.agreement:
        scores = corpus.agreement(Path(config.data_root or "")).items()
        agreement = ", ".join(f"{target} {spread(values, 2)}" for target, values in scores if values)
        lines += [f"Raters, each against the mean of the others, CCC: {agreement or 'unknown'}.", ""]
    report = "\n".join(lines + list_problems(problems))
    texts = {"report.md": f"{report}\n", "problems.csv": problems_csv(problems), "speakers.csv": speakers_csv(rows)}
    severities = {severity(problem.kind) for problem in problems}
    try:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", errors="as_named")
        pictures = draw_labels(rows, config.targets, label_range, title, folder / "labels")
        end = ", ".join([*texts, *(pictures or ["no picture, since matplotlib is not installed"])])
    except OSError as error:  # a full disk does not take the report away
        severities, end = {"error"}, f"cannot be written: {error}"
    return f"{report}\n\n{folder}: {end}", 2 if "error" in severities else len(severities)


def listen_to(utterances: Sequence[Utterance]) -> list[Heard]:
    """Decode every file, several at a time, with a progress bar."""
    sources = [utterance.source for utterance in utterances]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(listen, sources), "audio", len(sources), unit="file", disable=None))


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


def split_table(rows: Rows, targets: Sequence[str]) -> list[str]:
    """Markdown: a row a split; seconds, labels and a speaker's utterances as mean (least to most)."""
    columns = ["split", "utterances", "speakers", "utterances a speaker", "hours", "seconds", *targets]
    table = [columns, ["---"] * len(columns)]
    for split in (*SPLITS, "all"):
        chosen = [utterance for utterance, _ in rows if split in (utterance.split, "all")]
        lengths = [seconds for utterance, seconds in rows if split in (utterance.split, "all")]
        speakers = Counter(utterance.speaker for utterance in chosen)
        named = sum(not data.is_nobody(speaker) for speaker in speakers)
        table.append([split, f"{len(chosen):,}", f"{named:,}", spread(list(speakers.values()), 0)])
        table[-1] += [f"{sum(lengths) / 3600:.2f}", spread([length for length in lengths if length], 1)]
        table[-1] += [spread(finite(chosen, target), 2) for target in targets]
    return [f"| {' | '.join(row)} |" for row in table]


def spread(values: Sequence[float], digits: int) -> str:
    if not len(values):
        return ""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(np.mean(values), min(values), max(values), d=digits)


def finite(utterances: Sequence[Utterance], target: str) -> np.ndarray:
    """The labels of a target that there are, `(n,)`."""
    values = np.array([utterance.labels.get(target, math.nan) for utterance in utterances], dtype=float)
    return values[np.isfinite(values)]


def list_problems(problems: Sequence[Problem], limit: int = 20) -> list[str]:
    """Markdown: how many problems there are of each kind, and the first in full."""
    if not problems:
        return ["No problem was found."]
    lines = ["| severity | problem | times |", "| --- | --- | --- |"]
    lines += [f"| {severity(kind)} | {kind} | {times:,} |" for kind, times in Counter(p.kind for p in problems).items()]
    lines += ["", *(f"- {': '.join(filter(None, problem))}" for problem in problems[:limit])]
    return lines + ([f"- and {len(problems) - limit:,} more"] if len(problems) > limit else [])


def severity(kind: str) -> str:
    return "error" if kind in ERRORS else "warning"


def speakers_csv(rows: Rows) -> str:
    """CSV: utterances and hours of each speaker in each split."""
    lengths = defaultdict(list)
    for utterance, seconds in rows:
        lengths[SPLITS.index(utterance.split), utterance.speaker].append(seconds)
    cells = [[SPLITS[at], who, len(each), f"{sum(each) / 3600:.4f}"] for (at, who), each in sorted(lengths.items())]
    return csv_text(["split", "speaker", "utterances", "hours"], cells)


def problems_csv(problems: Sequence[Problem]) -> str:
    rows = [[severity(problem.kind), *problem] for problem in problems]
    return csv_text(["severity", "problem", "file", "detail"], rows)


def csv_text(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    stream = io.StringIO()
    rows = [head, *([data.text_cell(str(cell)) for cell in row] for row in rows)]
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def draw_labels(rows: Rows, targets: Sequence[str], label_range: Sequence[float], title: str, path: Path) -> list[str]:
    """Labels and lengths of each split, and activation over valence, as `<path>.png` and `.pdf`.

    Returns the names of the files, or none where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    of_split = {split: [u for u, _ in rows if u.split == split] for split in SPLITS}
    panels = {target: {split: finite(chosen, target) for split, chosen in of_split.items()} for target in targets}
    panels["seconds"] = {split: np.array([s for u, s in rows if u.split == split and s]) for split in SPLITS}
    figure = Figure(figsize=(2.6 * len(panels) + 3.4, 3), layout="constrained")
    *axes, last = figure.subplots(1, len(panels) + 1, width_ratios=[1] * len(panels) + [1.1])
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        there = np.concatenate([*values.values(), [0.0, 1.0] if name == "seconds" else label_range])
        edges = np.linspace(there.min(), there.max(), 25 if name == "seconds" else 13)
        for split, (color, line, _) in LOOKS.items():
            form = {"color": color, "linestyle": line, "label": f"{split} ({len(of_split[split]):,})"}
            weights = np.full(len(values[split]), 100 / max(1, len(values[split])))
            axis.hist(values[split], edges, weights=weights, histtype="step", linewidth=1.5, **form)
        axis.set(xlabel=name)
    axes[0].set(ylabel="% of the split")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SPLITS), frameon=False)
    draw_plane(figure, last, of_split, label_range)
    for axis in (*axes, last):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    files = [path.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for file in files:
        figure.savefig(file, dpi=150)
    return [file.name for file in files]


def draw_plane(figure: Any, axis: Any, of_split: dict[str, list[Utterance]], label_range: Sequence[float]) -> None:
    """Activation over valence on an axis of matplotlib: a mark for each utterance, or the density of many."""
    points = {}  # (2, n) of each split
    for split, chosen in of_split.items():
        both = [[u.labels.get(target, math.nan) for u in chosen] for target in ("valence", "activation")]
        points[split] = np.array(both, dtype=float)[:, np.isfinite(both).all(axis=0)]
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m corpora.check", description="Look at a corpus without training.")
    parser.add_argument("config", help="a YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set otherwise")
    parser.add_argument("--out", type=expand, help="folder for the report, tables and pictures; else below output_dir")
    arguments = parser.parse_args()
    report, status = check_corpus(arguments.config, arguments.overrides, arguments.out)
    print(report)
    sys.exit(status)


if __name__ == "__main__":
    command(main, "stopped; no report is written", code=2)
