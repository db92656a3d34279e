"""What finished runs of several methods come to: scores with intervals and tests, costs, and the table of both.

Records are plain numbers, one for each method; the first method is what the others are compared with.
"""

import csv
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import from_cell
from metrics import bootstrap, interval
from report.statistics import bootstrap_p, holm, paired_t_test
from weights import read_json

SCORES = ("ccc", "sd", "low", "high", "difference", "difference_low", "difference_high", "p_seeds", "p_utterances")
COSTS = ("precision", "trainable_parameters", "trainable_reduction", "best_epoch", "epochs", "epoch_seconds")
COSTS += ("build_seconds", "total_seconds", "epoch_factor", "total_factor", "epoch_factor_at_equal_precision")
COSTS += ("peak_memory_bytes", "cache_bytes")
READING = (
    "CCC: mean ± standard deviation over seeds, on one test set. To predict the mean always scores 0 by construction.",
    "95%: bootstrap over the {speakers} speakers of the test set, what other speakers could change; with fewer "
    "than 8 it is still too narrow. Of a difference: over the seeds that both methods have.",
    "p over seeds: paired t-test, would the difference remain with other seeds. p over utterances: paired bootstrap, "
    "would it remain with other utterances of these speakers. Both are corrected over all methods and targets (Holm).",
    "Times and memory: medians over seeds. Total: with one build of the cache. 4.00x, 75% less: in a quarter of the "
    "time. At equal precision: against what differs from the first method in nothing else and ran in this precision.",
)


@dataclass
class Run:
    """A finished run: what train.py wrote, and of the test set N speakers, labels and predictions `(N, K)`."""

    result: dict
    log: list[dict]
    speakers: list[str]
    labels: np.ndarray
    predictions: np.ndarray


Runs = dict[str, dict[int, Run]]  # by method and seed, the finished ones


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


def run_directory(out: Path, method: str, seed: int) -> Path:
    return out / f"{method}-seed{seed}"


def read_method(out: Path, method: str, seeds: Iterable[int]) -> dict[int, Run]:
    """The finished runs of a method by seed."""
    places = {seed: run_directory(out, method, seed) for seed in seeds}
    return {seed: read_run(place) for seed, place in places.items() if (place / "result.json").is_file()}


# --- records ---------------------------------------------------------------------------------------------------------


def analyse(runs: Runs, targets: Sequence[str], builds: Mapping[str, dict]) -> list[dict]:
    """A record for each method, whatever of `SCORES` (after `<target>_`) and `COSTS` its finished runs allow.

    `builds` has by method the "seconds" that its cache cost, None where that is not known. p-values are corrected over
    methods and targets. Raises ValueError if two runs were tested on different utterances.
    """
    records = {name: {"method": name, "seeds": len(by_seed)} for name, by_seed in runs.items()}
    if any(runs.values()):
        for k, target in enumerate(targets):
            add_scores(records, runs, k, target)
    for kind in ("p_seeds", "p_utterances"):
        cells = [(record, f"{target}_{kind}") for target in targets for record in records.values()]
        for (record, key), p in zip(cells, holm([record.get(key) for record, key in cells]), strict=True):
            record[key] = p
    for name, by_seed in runs.items():
        if by_seed:
            records[name] |= costs(list(by_seed.values()), builds.get(name, {}))
    add_factors(records, runs)
    return list(records.values())


def add_scores(records: Mapping[str, dict], runs: Runs, k: int, target: str) -> None:
    """Scores of target number `k`; a difference from the first method is that over the seeds that both have."""
    finished = {(name, seed): each for name, by_seed in runs.items() for seed, each in by_seed.items()}
    some, column = next(iter(finished.values())), {job: number for number, job in enumerate(finished)}
    for (name, seed), each in finished.items():
        if each.speakers != some.speakers or not np.array_equal(each.labels, some.labels):
            raise ValueError(f"{name}-seed{seed}: was tested on other utterances or labels than {next(iter(finished))}")
    predictions = np.stack([each.predictions[:, k] for each in finished.values()])
    by_speaker = bootstrap(predictions, some.labels[:, k], some.speakers)
    by_utterance = bootstrap(predictions, some.labels[:, k], range(len(some.speakers)))
    ccc = {job: each.result["test"][target]["ccc"] for job, each in finished.items()}

    def mean(draws: np.ndarray, name: str, seeds: Sequence[int]) -> np.ndarray:
        return draws[:, [column[name, seed] for seed in seeds]].mean(1)

    def put(name: str, **values: object) -> None:
        records[name].update({f"{target}_{key}": value for key, value in values.items()})

    first, speakers = next(iter(runs)), len(set(some.speakers))
    for name in filter(runs.get, runs):
        seeds = list(runs[name])
        scores = [ccc[name, seed] for seed in seeds]
        low, high = interval(mean(by_speaker, name, seeds), speakers) or (None, None)
        sd = statistics.stdev(scores) if len(scores) > 1 else None
        put(name, ccc=statistics.fmean(scores), sd=sd, low=low, high=high)
        if name != first and (both := [seed for seed in seeds if seed in runs[first]]):
            mine, theirs = ([ccc[method, seed] for seed in both] for method in (name, first))
            put(name, difference=statistics.fmean(mine) - statistics.fmean(theirs), p_seeds=paired_t_test(mine, theirs))
            low, high = interval(mean(by_speaker, name, both) - mean(by_speaker, first, both), speakers) or (None, None)
            put(name, difference_low=low, difference_high=high)
            draws = mean(by_utterance, name, both) - mean(by_utterance, first, both)
            put(name, p_utterances=bootstrap_p(draws, len(some.speakers)))


def costs(runs: Sequence[Run], build: Mapping) -> dict:
    """Medians over the seeds of a method; in the total one build of the cache, whichever run or program paid for it."""

    def median(value: Callable[[dict], float]) -> float:
        return statistics.median(value(each.result) for each in runs)

    result = runs[0].result
    own = max(each.result["seconds"]["cache_build"] for each in runs)
    build_seconds = (build.get("seconds") or own or None) if result["config"]["cache"] else None
    return {
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

    def settings(name: str) -> dict:
        own = ("name", "seed", "output_dir", "precision")
        return {key: value for key, value in finished[name]["config"].items() if key not in own}

    base = records[first]
    alike = [records[name] for name in finished if settings(name) == settings(first)]
    for name in finished.keys() - {first}:
        record = records[name]
        record["trainable_reduction"] = 1 - record["trainable_parameters"] / base["trainable_parameters"]
        record["epoch_factor"] = base["epoch_seconds"] / record["epoch_seconds"]
        record["total_factor"] = base["total_seconds"] / record["total_seconds"]
        for equal in [other for other in alike if other["precision"] == record["precision"]][:1]:
            record["epoch_factor_at_equal_precision"] = equal["epoch_seconds"] / record["epoch_seconds"]


# --- the table -------------------------------------------------------------------------------------------------------


def markdown(runs: Runs, records: Sequence[dict], targets: Sequence[str], notes: Sequence[str]) -> str:
    """Where the figures come from, a table for each target, one of the costs, and notes."""
    lines = header([each.result for by_seed in runs.values() for each in by_seed.values()])
    for target in targets:
        columns = ["method", f"CCC of {target}", "95% over speakers", "difference [95% over speakers]"]
        cells = [score_cells(record, target) for record in records]
        lines += ["", *table([*columns, "p over seeds", "p over utterances"], cells)]
    columns = ["method", "precision", "trainable", "fewer", "best epoch / epochs", "s an epoch", "cache build", "total"]
    columns += ["an epoch against the first", "total against the first", "an epoch at equal precision"]
    lines += ["", *table([*columns, "peak memory", "cache size"], [cost_cells(record) for record in records])]
    return "\n".join([*lines, "", *(f"- {note}" for note in [*notes, *cautions(runs, records)])])


def header(results: Sequence[dict]) -> list[str]:
    """Machine, corpus, backbone and versions of all runs; what differs between them is listed."""
    if not results:
        return ["No run is finished."]

    def distinct(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    return [
        *([results[0]["note"], ""] if "note" in results[0] else []),
        f"- machine: {distinct(result['device'] for result in results)}",
        f"- precision: {distinct(result['precision'] for result in results)}",
        f"- corpus: {distinct(map(corpus_of, results))}",
        f"- backbone: {distinct(result['backbone']['source'] for result in results)}",
        f"- versions: {distinct(map(versions, results))}",
        f"- seeds: {len({result['config']['seed'] for result in results})}",
    ]


def corpus_of(result: dict) -> str:
    """Name and size of a run's corpus."""
    config, splits = result["config"], result.get("corpus", {})
    text = config["corpus"] + (f" ({config['manifest']})" if config["manifest"] else "")
    for split in ("train", "dev", "test"):
        if split in splits:
            text += ", {} {utterances:,} utterances {speakers} speakers {hours:.3g} h".format(split, **splits[split])
    return text


def versions(result: dict) -> str:
    return ", ".join(f"{package} {version}" for package, version in result["versions"].items())


def cautions(runs: Runs, records: Sequence[dict]) -> list[str]:
    """What the figures hide, and how to read them."""
    finished = {f"{name} seed {seed}": each for name, by_seed in runs.items() for seed, each in by_seed.items()}
    if not finished:
        return []
    places: dict[str, list[str]] = {}
    for job, each in finished.items():
        places.setdefault(f"{each.result['device']}, {versions(each.result)}", []).append(job)
    found = []
    if len(places) > 1:
        found.append("Runs of different machines or versions are mixed, and their times do not compare:")
        found[-1] += "".join(f"\n  - {place}: {', '.join(jobs)}" for place, jobs in places.items())
    cached = {name for name, by_seed in runs.items() for each in by_seed.values() if each.result["config"]["cache"]}
    if unknown := [r["method"] for r in records if r["method"] in cached and r["build_seconds"] is None]:
        found.append(f"A cache was complete before its first run, what it cost is in no total: {', '.join(unknown)}.")
    speakers = len(set(next(iter(finished.values())).speakers))
    return [*found, *(text.format(speakers=speakers) for text in READING)]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, padded so that it reads on a terminal too."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in (columns, rule, *rows)]


def score_cells(record: dict, target: str) -> list[str]:
    """A record's row in the table of a target; what it has no figure for stays empty."""
    ccc, sd, low, high, difference, d_low, d_high, *p_values = (record.get(f"{target}_{score}") for score in SCORES)
    return [
        record["method"],
        "" if ccc is None else f"{ccc:.3f}" + ("" if sd is None else f" ± {sd:.3f}"),
        "" if low is None else f"[{low:.3f}, {high:.3f}]",
        ""
        if difference is None
        else f"{difference:+.3f}" + ("" if d_low is None else f" [{d_low:+.3f}, {d_high:+.3f}]"),
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
