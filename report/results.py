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
SCORES += ("mean_of_folds",)
ONE_SET = ("CCC: mean ± standard deviation over seeds. To predict the mean always scores 0 by construction.",)
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
    if all(tested):  # each speaker in one fold
        corpus = {"test": {key: sum(split[key] for split in tested) for key in ("utterances", "speakers", "hours")}}
    result = result | {"test": test, "corpus": corpus, "config": result["config"] | {"fold": None}}
    return Run(result, [], speakers, labels, predictions, runs)


# --- records ---------------------------------------------------------------------------------------------------------


def analyse(runs: Runs, targets: Sequence[str], builds: Mapping[str, dict]) -> list[dict]:
    """A record for each method, whatever of `SCORES` (after `<target>_`) and `COSTS` its finished runs allow.

    `builds` has by method the "seconds" that its cache cost, None where that is not known. p-values are corrected over
    methods and targets. Raises ValueError if two runs were tested on different utterances.
    """
    records = {name: {"method": name, "seeds": len(by_seed), "folds": 0} for name, by_seed in runs.items()}
    for name in filter(runs.get, runs):
        records[name] |= costs(list(runs[name].values()), builds.get(name, {}))
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
        self.jobs, self.scores = list(chosen), [each.result["test"][target]["ccc"] for each in chosen.values()]
        groups = speaker_groups(some.speakers)
        self.speakers, self.utterances = len(set(groups)), len(groups)
        self.by_speaker = bootstrap(predictions, some.labels[:, k], groups)
        self.by_utterance = bootstrap(predictions, some.labels[:, k], range(self.utterances))

    def of(self, name: str, seeds: Sequence[int]) -> tuple[list[float], np.ndarray, np.ndarray]:
        """A method's scores with these seeds, and draws `(draws,)` of their mean by speakers and by utterances."""
        columns = [self.jobs.index((name, seed)) for seed in seeds]
        scores = [self.scores[column] for column in columns]
        return scores, self.by_speaker[:, columns].mean(1), self.by_utterance[:, columns].mean(1)


def add_scores(records: Mapping[str, dict], runs: Runs, k: int, target: str) -> None:
    """Scores of target number `k`; a difference from the first method is that over the seeds that both have."""
    draws, first = Draws(runs, k, target), next(iter(runs))
    for name in filter(runs.get, runs):
        scores, by_speaker, _ = draws.of(name, list(runs[name]))
        low, high = interval(by_speaker, draws.speakers) or (None, None)
        sd = statistics.stdev(scores) if len(scores) > 1 else None
        found = {"ccc": statistics.fmean(scores), "sd": sd, "low": low, "high": high}
        if parts := [part for each in runs[name].values() for part in each.folds.values()]:
            found["mean_of_folds"] = statistics.fmean(part.result["test"][target]["ccc"] for part in parts)
        both = [seed for seed in runs[name] if seed in runs[first]]
        if name != first and both:
            (mine, *my_draws), (theirs, *their_draws) = draws.of(name, both), draws.of(first, both)
            by_speaker, by_utterance = np.subtract(my_draws, their_draws)
            low, high = interval(by_speaker, draws.speakers) or (None, None)
            found |= {"difference": statistics.fmean(mine) - statistics.fmean(theirs)}
            found |= {"difference_low": low, "difference_high": high, "p_seeds": paired_t_test(mine, theirs)}
            found |= {"p_utterances": bootstrap_p(by_utterance, draws.utterances)}
        records[name].update({f"{target}_{key}": value for key, value in found.items()})


def costs(runs: Sequence[Run], build: Mapping) -> dict:
    """Medians over the runs of a method; in the total one build of the cache, whichever run or program paid for it."""
    results = [part.result for each in runs for part in each.parts]
    first, spent = results[0], [result["seconds"] for result in results]
    own = max(seconds["cache_build"] for seconds in spent)
    build_seconds = (build.get("seconds") or own or None) if first["config"]["cache"] else None
    without_build = statistics.median(seconds["total"] - seconds["cache_build"] for seconds in spent)
    medians = ("best_epoch", "epochs", "peak_memory_bytes")
    return {key: statistics.median(result[key] for result in results) for key in medians} | {
        "folds": len(runs[0].folds),
        "precision": first["precision"],
        "trainable_parameters": first["trainable_parameters"],
        "epoch_seconds": statistics.median(seconds["per_epoch"] for seconds in spent),
        "build_seconds": build_seconds,
        "total_seconds": without_build + (build_seconds or 0.0),
        "cache_bytes": first["cache_bytes"] or None,
        "note": first.get("note", ""),
    }


def add_factors(records: Mapping[str, dict], runs: Runs) -> None:
    """Costs against the first method's, and an epoch against it at a record's own precision where that was run."""
    own, first = dict.fromkeys(("name", "seed", "output_dir", "precision")), next(iter(runs))
    settings = {name: next(iter(runs[name].values())).result["config"] | own for name in filter(runs.get, runs)}
    if first not in settings:
        return
    base, alike = records[first], [records[name] for name in settings if settings[name] == settings[first]]
    for name in settings.keys() - {first}:
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
    runs: Runs, records: Sequence[dict], targets: Sequence[str], notes: Sequence[str], folds: int, agreement: Mapping
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
    known = {target: agreement[target] for target in targets if agreement.get(target)}
    scores = [f"{target} {statistics.fmean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for target, v in known.items()]
    lines += [f"- raters, each against the mean of the others, CCC: {', '.join(scores)}"] if scores else []
    shown = [[score_row(record, target, folds) for record in records] for target in targets]
    for rows in [*shown, [cost_row(record) for record in records]]:
        lines += ["", tables.markdown(list(rows[0]), [list(row.values()) for row in rows])]
    return "\n".join([*lines, "", *(f"- {note}" for note in [*notes, *cautions(runs, records, folds)])])


def header(results: Sequence[dict]) -> list[str]:
    """Machine, corpus, backbone and versions of all runs; what differs between them is listed."""
    if not results:
        return ["No run is finished."]
    known = [origin(result) for result in results]
    lines = [results[0]["note"], ""] if "note" in results[0] else []
    lines += [f"- {fact}: {'; '.join(dict.fromkeys(each[fact] for each in known))}" for fact in known[0]]
    return [*lines, f"- seeds: {len({result['config']['seed'] for result in results})}"]


def origin(result: dict) -> dict[str, str]:
    """Where a run's figures come from, in words."""
    config, splits = result["config"], result.get("corpus", {})
    corpus = config["corpus"] + (f" ({config['manifest']})" if config["manifest"] else "")
    for split in filter(splits.get, ("train", "dev", "test")):
        corpus += ", {} {utterances:,} utterances {speakers} speakers {hours:.3g} h".format(split, **splits[split])
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    known = {"machine": result["device"], "precision": result["precision"], "corpus": corpus}
    return known | {"backbone": result["backbone"]["source"], "versions": versions}


def cautions(runs: Runs, records: Sequence[dict], folds: int) -> list[str]:
    """What the figures hide, and how to read them."""
    finished = [(name, seed, each) for name, by_seed in runs.items() for seed, each in by_seed.items()]
    if not finished:
        return []
    places: dict[str, dict[str, None]] = {}  # by machine and versions its runs, each once
    for name, seed, each in finished:
        for known in (origin(part.result) for part in each.parts):
            places.setdefault("{machine}, {versions}".format(**known), {})[f"{name} seed {seed}"] = None
    found = []
    if len(places) > 1:
        mixed = "".join(f"\n  - {place}: {', '.join(jobs)}" for place, jobs in places.items())
        found.append(f"Runs of different machines or versions are mixed, and their times do not compare:{mixed}")
    cached = {name for name, _, each in finished if each.result["config"]["cache"]}
    if unknown := [r["method"] for r in records if r["method"] in cached and r["build_seconds"] is None]:
        found.append(f"A cache was complete before its first run, what it cost is in no total: {', '.join(unknown)}.")
    speakers = len(set(filterfalse(is_nobody, finished[0][2].speakers)))
    return found + [text.format(speakers=speakers) for text in (*(POOLED if folds else ONE_SET), *READING)]


def score_row(record: dict, target: str, folds: int) -> dict[str, str]:
    """A record's row in the table of a target, by column."""

    def written(form: Callable[..., str], *scores: str) -> str:
        return cell(form, *(record.get(f"{target}_{score}") for score in scores))

    scored = written("{:.3f}".format, "ccc") + written(" ± {:.3f}".format, "sd")
    pooled = {f"pooled CCC of {target}": scored, "mean of the folds' CCC": written("{:.3f}".format, "mean_of_folds")}
    between = written(" [{:+.3f}, {:+.3f}]".format, "difference_low", "difference_high")
    return {
        "method": record["method"],
        **(pooled if folds else {f"CCC of {target}": scored}),
        "95% over speakers": written("[{:.3f}, {:.3f}]".format, "low", "high"),
        "difference [95% over speakers]": written("{:+.3f}".format, "difference") + between,
        "p over seeds": written(p_value, "p_seeds"),
        "p over utterances": written(p_value, "p_utterances"),
    }


def cost_row(record: dict) -> dict[str, str]:
    """A record's row in the table of costs, by column."""
    cells = {column: cell(form, *map(record.get, keys)) for column, (form, *keys) in COST_COLUMNS.items()}
    return {"method": record["method"], **cells}


def cell(form: Callable[..., str], *values: object) -> str:
    """These values written so; empty where one is missing."""
    return "" if None in values else form(*values)


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def saved(factor: float) -> str:
    """A factor, and the same as time: 3.41 times as fast takes 71% less."""
    change = 1 - 1 / factor
    digits = 1 if change > 0.99 else 0  # no time at all is 100% less
    return f"{factor:.2f}x, {abs(change):.{digits}%} {'less' if change >= 0 else 'more'}"


COST_COLUMNS: dict[str, tuple] = {  # of the table: how a cell is written, and the keys of a record that it shows
    "precision": (str, "precision"),
    "trainable": (lambda n: f"{n / 1e6:.2f} M" if n >= 1e4 else f"{n:,}", "trainable_parameters"),
    "fewer": (lambda x: f"{x:.1%}" if x >= 0 else f"{1 - x:.3g} times as many", "trainable_reduction"),
    "best epoch / epochs": ("{:g} / {:g}".format, "best_epoch", "epochs"),
    "s an epoch": (seconds, "epoch_seconds"),
    "cache build": (seconds, "build_seconds"),
    "total": (seconds, "total_seconds"),
    "an epoch against the first": (saved, "epoch_factor"),
    "total against the first": (saved, "total_factor"),
    "an epoch at equal precision": ("{:.2f}x".format, "epoch_factor_at_equal_precision"),
    "peak memory": (size, "peak_memory_bytes"),
    "cache size": (size, "cache_bytes"),
}
COSTS = [key for _, *keys in COST_COLUMNS.values() for key in keys]
