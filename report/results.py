"""What finished runs of several methods come to: scores with intervals and tests, costs, and the table of both.

Records are plain numbers, one for each method; the first method is what the others are compared with.
"""

import csv
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import filterfalse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import from_cell, is_nobody, speaker_groups
from metrics import bootstrap, ccc, interval
from report import tables
from report.statistics import bootstrap_p, holm, paired_t_test
from weights import read_json

SCORES = ("ccc", "sd", "low", "high", "difference", "difference_low", "difference_high", "p_seeds", "p_utterances")
FOLD_SCORE = "mean_of_folds"  # what a comparison over folds has beside these
COSTS = ("precision", "trainable_parameters", "trainable_reduction", "best_epoch", "epochs", "epoch_seconds")
COSTS += ("build_seconds", "total_seconds", "epoch_factor", "total_factor", "epoch_factor_at_equal_precision")
COSTS += ("peak_memory_bytes", "cache_bytes")
ONE_SET = (
    "CCC: mean ± standard deviation over seeds, on one test set. To predict the mean always scores 0 by construction.",
)
POOLED = (
    "Pooled CCC: of the predictions of all folds together, each utterance tested once, by a model that was not trained "
    "on its fold; mean ± standard deviation over seeds. Intervals, differences and tests are those of the pooled CCC.",
    "Mean of the folds' CCC: each fold scored alone, then averaged over folds and seeds. Both are in use, and they are "
    "not the same: a fold has few speakers, and only the pooled CCC sees how they differ from those of other folds.",
    "Times, memory and epochs are those of one run: one seed and one fold.",
)
READING = (
    "95%: bootstrap over the {speakers} speakers tested, what other speakers could change; with fewer "
    "than 8 it is still too narrow. Of a difference: over the seeds that both methods have.",
    "p over seeds: paired t-test, would the difference remain with other seeds. p over utterances: paired bootstrap, "
    "would it remain with other utterances of these speakers. Both are corrected over all methods and targets (Holm).",
    "Times (without imports) and memory: medians over runs. Total: with one build of the cache. 4.00x, 75% less: in a "
    "quarter of the time. At equal precision: against what differs from the first method in nothing else and ran in "
    "this precision.",
)


@dataclass
class Run:
    """A finished run: what train.py wrote, and of the test set N speakers, labels and predictions `(N, K)`.

    Or the runs of a seed on several `folds`, by number, with the predictions of all test sets together.
    """

    result: dict
    log: list[dict]
    speakers: list[str]
    labels: np.ndarray
    predictions: np.ndarray
    folds: dict[int, "Run"] = field(default_factory=dict)

    @property
    def parts(self) -> list["Run"]:
        """The runs of train.py that this one is made of."""
        return list(self.folds.values()) or [self]


Runs = dict[str, dict[int, Run]]  # by method and seed, the finished ones


class Job(NamedTuple):
    """A run of a comparison in the folder `out`; `fold` is None where there are none."""

    out: Path
    method: str
    seed: int
    fold: int | None = None

    def __str__(self) -> str:
        return f"{self.method} seed {self.seed}" + ("" if self.fold is None else f" fold {self.fold}")

    @property
    def directory(self) -> Path:
        return self.out / (f"{self.method}-seed{self.seed}" + ("" if self.fold is None else f"-fold{self.fold}"))

    @property
    def finished(self) -> bool:
        return (self.directory / "result.json").is_file()


def read_run(directory: Path) -> Run:
    """Raises OSError or ValueError for a directory that is not as train.py leaves it."""
    result, path = read_json(directory / "result.json"), directory / "predictions_test.csv"
    try:
        targets = result["config"]["targets"]
        log = [json.loads(line) for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        values = np.array([row[2 : 2 + 2 * len(targets)] for row in rows], float)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{directory}: is not as train.py leaves a finished run ({reason})") from None
    columns = [*targets, *(f"{target}_label" for target in targets)]
    if header[2 : 2 + len(columns)] != columns or values.shape[1:] != (len(columns),):
        raise ValueError(f"{path}: has columns {header}, expected file, speaker, then {', '.join(targets)} and labels")
    speakers = [from_cell(row[1]) for row in rows]
    return Run(result, log, speakers, values[:, len(targets) :], values[:, : len(targets)])


def read_runs(jobs: Iterable[Job]) -> Runs:
    """The finished runs; of several folds those that every method has finished, pooled for each seed that has them all.

    So all are scored on the same utterances. A method of which nothing is finished does not count.
    """
    found: dict[str, dict[int, dict[int | None, Run]]] = {}
    for job in jobs:
        of_seed = found.setdefault(job.method, {}).setdefault(job.seed, {})
        if job.finished:
            of_seed[job.fold] = read_run(job.directory)
    most = [max(by_seed.values(), key=len) for by_seed in found.values()]
    common = [fold for fold in max(most, key=len) if all(fold in folds for folds in most if folds)]
    runs: Runs = {method: {} for method in found}
    for method, by_seed in found.items() if common else ():
        for seed, r in by_seed.items():
            if r.keys() >= set(common):
                runs[method][seed] = r[None] if None in r else pool({fold: r[fold] for fold in common})
    return runs


def pool(runs: dict[int, Run]) -> Run:
    """The runs of a seed on several folds as one, whose score is the CCC of all their predictions together."""
    parts = list(runs.values())
    predictions, labels = (np.concatenate([getattr(p, kind) for p in parts]) for kind in ("predictions", "labels"))
    speakers, result = [speaker for part in parts for speaker in part.speakers], parts[0].result
    scores = ccc(torch.from_numpy(predictions), torch.from_numpy(labels)).tolist()
    test = {target: {"ccc": score} for target, score in zip(result["config"]["targets"], scores, strict=True)}
    tested, corpus = [part.result.get("corpus", {}).get("test") for part in parts], {}
    if all(tested):
        hours = sum(split["hours"] for split in tested)
        known = len(set(filterfalse(is_nobody, speakers)))
        corpus = {"test": {"utterances": len(labels), "speakers": known, "hours": hours}}
    result = result | {"test": test, "corpus": corpus, "config": result["config"] | {"fold": None}}
    return Run(result, [], speakers, labels, predictions, runs)


# --- records ---------------------------------------------------------------------------------------------------------


def analyse(runs: Runs, targets: Sequence[str], builds: Mapping[str, dict]) -> list[dict]:
    """A record for each method, whatever of `SCORES` (after `<target>_`) and `COSTS` its finished runs allow.

    `builds` has by method the "seconds" that its cache cost, None where that is not known. p-values are corrected over
    methods and targets. Raises ValueError if two runs were tested on different utterances.
    """
    records = {name: {"method": name, "seeds": len(by_seed), "folds": 0} for name, by_seed in runs.items()}
    for name, by_seed in runs.items():
        if by_seed:
            records[name] |= costs(list(by_seed.values()), builds.get(name, {}))
    if any(runs.values()):
        for k, target in enumerate(targets):
            add_scores(records, runs, k, target)
    for kind in ("p_seeds", "p_utterances"):
        cells = [(record, f"{target}_{kind}") for target in targets for record in records.values()]
        for (record, key), p in zip(cells, holm([record.get(key) for record, key in cells]), strict=True):
            record[key] = p
    add_factors(records, runs)
    return list(records.values())


class Draws:
    """Scores of target number `k` of all runs, which have one test set, and bootstrap draws of these."""

    def __init__(self, runs: Runs, k: int, target: str) -> None:
        chosen = {(name, seed): each for name, by_seed in runs.items() for seed, each in by_seed.items()}
        (some_job, some), *_ = chosen.items()
        for (name, seed), each in chosen.items():
            if each.speakers != some.speakers or not np.array_equal(each.labels, some.labels):
                raise ValueError(f"{name}-seed{seed}: was tested on other utterances or labels than {some_job}")
        predictions = np.stack([each.predictions[:, k] for each in chosen.values()])
        self.column = {job: number for number, job in enumerate(chosen)}
        self.score = {job: each.result["test"][target]["ccc"] for job, each in chosen.items()}
        groups = speaker_groups(some.speakers)
        self.speakers, self.utterances = len(set(groups)), len(groups)
        self.by_speaker = bootstrap(predictions, some.labels[:, k], groups)
        self.by_utterance = bootstrap(predictions, some.labels[:, k], range(self.utterances))

    def mean(self, draws: np.ndarray, name: str, seeds: Sequence[int]) -> np.ndarray:
        """The draws of a method's mean over these seeds."""
        return draws[:, [self.column[name, seed] for seed in seeds]].mean(1)


def add_scores(records: Mapping[str, dict], runs: Runs, k: int, target: str) -> None:
    """Scores of target number `k`; a difference from the first method is that over the seeds that both have."""
    draws, first = Draws(runs, k, target), next(iter(runs))
    for name in filter(runs.get, runs):
        seeds = list(runs[name])
        scores = [draws.score[name, seed] for seed in seeds]
        low, high = interval(draws.mean(draws.by_speaker, name, seeds), draws.speakers) or (None, None)
        sd = statistics.stdev(scores) if len(scores) > 1 else None
        found = {"ccc": statistics.fmean(scores), "sd": sd, "low": low, "high": high}
        if parts := [part for each in runs[name].values() for part in each.folds.values()]:
            found[FOLD_SCORE] = statistics.fmean(part.result["test"][target]["ccc"] for part in parts)
        both = [seed for seed in seeds if seed in runs[first]]
        if name != first and both:
            found |= difference(draws, name, first, both)
        records[name].update({f"{target}_{key}": value for key, value in found.items()})


def difference(draws: Draws, name: str, first: str, seeds: Sequence[int]) -> dict:
    """How much better a method is than the first over these seeds, with interval and p-values."""
    mine, theirs = ([draws.score[method, seed] for seed in seeds] for method in (name, first))
    by_speaker, by_utterance = (
        draws.mean(values, name, seeds) - draws.mean(values, first, seeds)
        for values in (draws.by_speaker, draws.by_utterance)
    )
    low, high = interval(by_speaker, draws.speakers) or (None, None)
    return {
        "difference": statistics.fmean(mine) - statistics.fmean(theirs),
        "difference_low": low,
        "difference_high": high,
        "p_seeds": paired_t_test(mine, theirs),
        "p_utterances": bootstrap_p(by_utterance, draws.utterances),
    }


def costs(runs: Sequence[Run], build: Mapping) -> dict:
    """Medians over the runs of a method; in the total one build of the cache, whichever run or program paid for it."""
    results = [part.result for each in runs for part in each.parts]

    def median(value: Callable[[dict], float]) -> float:
        return statistics.median(map(value, results))

    result = results[0]
    own = max(each["seconds"]["cache_build"] for each in results)
    build_seconds = (build.get("seconds") or own or None) if result["config"]["cache"] else None
    return {
        "folds": len(runs[0].folds),
        "precision": result["precision"],
        "trainable_parameters": result["trainable_parameters"],
        "best_epoch": median(lambda r: r["best_epoch"]),
        "epochs": median(lambda r: r["epochs"]),
        "epoch_seconds": median(lambda r: r["seconds"]["per_epoch"]),
        "build_seconds": build_seconds,
        "total_seconds": median(lambda r: r["seconds"]["total"] - r["seconds"]["cache_build"]) + (build_seconds or 0.0),
        "peak_memory_bytes": median(lambda r: r["peak_memory_bytes"]),
        "cache_bytes": result["cache_bytes"] or None,
        "note": result.get("note", ""),
    }


def add_factors(records: Mapping[str, dict], runs: Runs) -> None:
    """Costs against the first method's, and an epoch against it at a record's own precision where that was run."""
    finished = {name: next(iter(by_seed.values())).result for name, by_seed in runs.items() if by_seed}
    first = next(iter(runs))
    if first not in finished:
        return
    own = dict.fromkeys(("name", "seed", "output_dir", "precision"))
    settings = {name: result["config"] | own for name, result in finished.items()}
    base, alike = records[first], [records[name] for name in finished if settings[name] == settings[first]]
    for name in finished.keys() - {first}:
        record = records[name]
        record["trainable_reduction"] = 1 - record["trainable_parameters"] / base["trainable_parameters"]
        record["epoch_factor"] = ratio(base["epoch_seconds"], record["epoch_seconds"])
        record["total_factor"] = ratio(base["total_seconds"], record["total_seconds"])
        for equal in [other for other in alike if other["precision"] == record["precision"]][:1]:
            record["epoch_factor_at_equal_precision"] = ratio(equal["epoch_seconds"], record["epoch_seconds"])


def ratio(seconds: float, others: float) -> float:
    """How many times as long one took; times below a millisecond, which a coarse clock cannot tell, count as one."""
    return max(seconds, 1e-3) / max(others, 1e-3)


# --- the table -------------------------------------------------------------------------------------------------------


def markdown(
    runs: Runs,
    records: Sequence[dict],
    targets: Sequence[str],
    notes: Sequence[str],
    folds: int = 0,
    agreement: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """Where the figures come from, a table for each target, one of the costs, and notes.

    `folds` is the number that the corpus has, where they are compared; `agreement` the CCC of each rater by target.
    """
    finished = [each for by_seed in runs.values() for each in by_seed.values()]
    lines, scored = header([each.result for each in finished]), [*finished[0].folds] if finished else []
    if folds:
        some = ", ".join(map(str, scored)) or "none"
        only = f"; scored on what every method has finished: {some}" if len(scored) < folds else ""
        lines.append(f"- folds: {folds}, each the test set once{only}")
    known = {target: agreement[target] for target in targets if (agreement or {}).get(target)}
    scores = [f"{target} {statistics.fmean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for target, v in known.items()]
    lines += [f"- raters, each against the mean of the others, CCC: {', '.join(scores)}"] if scores else []
    for target in targets:
        columns = [f"pooled CCC of {target}", "mean of the folds' CCC"] if folds else [f"CCC of {target}"]
        columns = ["method", *columns, "95% over speakers", "difference [95% over speakers]"]
        cells = [score_cells(record, target, folds) for record in records]
        lines += ["", tables.markdown([*columns, "p over seeds", "p over utterances"], cells)]
    columns = ["method", "precision", "trainable", "fewer", "best epoch / epochs", "s an epoch", "cache build", "total"]
    columns += ["an epoch against the first", "total against the first", "an epoch at equal precision"]
    columns += ["peak memory", "cache size"]
    lines += ["", tables.markdown(columns, [cost_cells(record) for record in records])]
    return "\n".join([*lines, "", *(f"- {note}" for note in [*notes, *cautions(runs, records, folds)])])


def header(results: Sequence[dict]) -> list[str]:
    """Machine, corpus, backbone and versions of all runs; what differs between them is listed."""
    if not results:
        return ["No run is finished."]
    facts: dict[str, Callable[[dict], str]] = {
        "machine": lambda result: result["device"],
        "precision": lambda result: result["precision"],
        "corpus": corpus_of,
        "backbone": lambda result: result["backbone"]["source"],
        "versions": versions,
    }
    lines = [results[0]["note"], ""] if "note" in results[0] else []
    lines += [f"- {name}: {'; '.join(dict.fromkeys(map(fact, results)))}" for name, fact in facts.items()]
    return [*lines, f"- seeds: {len({result['config']['seed'] for result in results})}"]


def corpus_of(result: dict) -> str:
    """Name and size of a run's corpus."""
    config, splits = result["config"], result.get("corpus", {})
    text = config["corpus"] + (f" ({config['manifest']})" if config["manifest"] else "")
    for split in filter(splits.get, ("train", "dev", "test")):
        text += ", {} {utterances:,} utterances {speakers} speakers {hours:.3g} h".format(split, **splits[split])
    return text


def versions(result: dict) -> str:
    return ", ".join(f"{package} {version}" for package, version in result["versions"].items())


def cautions(runs: Runs, records: Sequence[dict], folds: int = 0) -> list[str]:
    """What the figures hide, and how to read them."""
    finished = [(name, seed, each) for name, by_seed in runs.items() for seed, each in by_seed.items()]
    if not finished:
        return []
    places: dict[str, dict[str, None]] = {}  # by machine and versions its runs, each once
    for name, seed, each in finished:
        for result in (part.result for part in each.parts):
            places.setdefault(f"{result['device']}, {versions(result)}", {})[f"{name} seed {seed}"] = None
    found = []
    if len(places) > 1:
        mixed = "".join(f"\n  - {place}: {', '.join(jobs)}" for place, jobs in places.items())
        found.append(f"Runs of different machines or versions are mixed, and their times do not compare:{mixed}")
    cached = {name for name, _, each in finished if each.result["config"]["cache"]}
    if unknown := [r["method"] for r in records if r["method"] in cached and r["build_seconds"] is None]:
        found.append(f"A cache was complete before its first run, what it cost is in no total: {', '.join(unknown)}.")
    speakers = len(set(filterfalse(is_nobody, finished[0][2].speakers)))
    return found + [text.format(speakers=speakers) for text in (*(POOLED if folds else ONE_SET), *READING)]


def score_cells(record: dict, target: str, folds: int = 0) -> list[str]:
    """A record's row in the table of a target; what it has no figure for stays empty."""
    of_folds = record.get(f"{target}_{FOLD_SCORE}")
    score, sd, low, high, gain, d_low, d_high, *p_values = (record.get(f"{target}_{kind}") for kind in SCORES)
    return [
        record["method"],
        "" if score is None else f"{score:.3f}" + ("" if sd is None else f" ± {sd:.3f}"),
        *(["" if of_folds is None else f"{of_folds:.3f}"] if folds else []),
        "" if low is None else f"[{low:.3f}, {high:.3f}]",
        "" if gain is None else f"{gain:+.3f}" + ("" if d_low is None else f" [{d_low:+.3f}, {d_high:+.3f}]"),
        *("" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" for p in p_values),
    ]


def cost_cells(record: dict) -> list[str]:
    """A record's row in the table of costs."""

    def cell(key: str, form: Callable[[float], str]) -> str:
        return "" if record.get(key) is None else form(record[key])

    return [
        record["method"],
        record.get("precision", ""),
        cell("trainable_parameters", lambda count: f"{count / 1e6:.2f} M" if count >= 1e4 else f"{count:,}"),
        cell("trainable_reduction", lambda share: f"{share:.1%}" if share >= 0 else f"{1 - share:.3g} times as many"),
        cell("best_epoch", lambda epoch: f"{epoch:g} / {record['epochs']:g}"),
        cell("epoch_seconds", seconds),
        cell("build_seconds", seconds),
        cell("total_seconds", seconds),
        cell("epoch_factor", saved),
        cell("total_factor", saved),
        cell("epoch_factor_at_equal_precision", lambda factor: f"{factor:.2f}x"),
        cell("peak_memory_bytes", size),
        cell("cache_bytes", size),
    ]


def seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def saved(factor: float) -> str:
    """A factor, and the same as time: 3.41 times as fast takes 71% less."""
    change = 1 - 1 / factor
    return f"{factor:.2f}x, {abs(change):.0%} {'less' if change >= 0 else 'more'}"
