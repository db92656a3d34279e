"""The methods of several configs side by side: score, cost and what the one buys for the other.

Every method, seed and fold is a run of train.py in a process of its own, so that time and memory are its own. Caches
are filled first, each for all seeds and folds. Then come the runs, all methods of a seed and fold before the next, so
that an interrupted table is even. The first method is what the others are compared with.

Below `--out`: `table.md`, `table.csv`, pictures, `configs/`, `logs/`, and a directory for each run (docs/methods.md).
"""

import argparse
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

import run
from config import Config, extra, load_config, parse
from machine import hardware
from machine.programs import command, last_lines, logged, split_words
from report import results, tables
from report.results import Job, Run, Runs
from weights import read_json

CORPUS = ("corpus", "data_root", "manifest", "fold", "test_set", "dev_set", "flip_activation")  # the same for all
CORPUS += ("label_range", "targets", "allow_speaker_overlap")
OURS = {"name": "as the name of the YAML file", "seed": "as --seeds", "output_dir": "as --out"}  # what compare.py sets
Methods = dict[str, Config]

# --- what is compared ------------------------------------------------------------------------------------------------


def make_methods(configs: Sequence[str], overrides: Sequence[str], sweeps: Sequence[str], wrong: list[str]) -> Methods:
    """Methods by name: each config, once for each combination of the sweeps' values. Adds errors to `wrong`."""
    keys = [word.partition("=")[0] for word in [*overrides, *sweeps]]
    wrong += [f"{key}: is set by compare.py; give it {OURS[key]}" for key in keys if key in OURS]
    wrong += [f"{key}: is given more than once" for key in keys if keys.count(key) > 1]
    methods: Methods = {}
    for path, values in itertools.product(configs, itertools.product(*map(parse_sweep, sweeps))):
        name = "-".join([Path(path).stem, *(f"{key}={file_name(value)}" for key, value in values)])
        try:
            baseline = load_config(path).backbone == "logmel"  # with another backbone it would not be that
            words = [word for word in overrides if not (baseline and word.startswith("backbone="))]
            config = load_config(path, [*words, *(f"{key}={value}" for key, value in values)])
        except (OSError, ValueError) as error:
            wrong.append(str(error))
            continue
        for other, there in methods.items():
            if other.casefold() == name.casefold():  # would be one directory on Windows and macOS
                wrong.append(f"{path}: a second method is called {name}; rename the file")
            elif settings(config) == settings(there):
                wrong.append(f"{name} and {other} are the same configuration; leave one out")
        methods[name] = config
    return methods


def parse_sweep(text: str) -> list[tuple[str, str]]:
    """`key=v1,v2,...` as pairs of the key and a value in YAML, which may be a list or null."""
    key, _, values = text.partition("=")
    with suppress(ValueError):
        if parsed := parse(f"[{values}]", text):
            return [(key, json.dumps(value, default=str)) for value in parsed]
    raise ValueError(f"--sweep: expected key=value,value,..., as in trainable_layers=0,1,2; found {text!r}")


def file_name(text: str) -> str:
    """What every file system takes: `[9, 10]` is 9_10."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def settings(config: Config) -> dict:
    """All that makes a method: the configuration without what compare.py sets."""
    return {key: value for key, value in run.plain(config).items() if key not in OURS}


def find_folds(methods: Methods, wrong: list[str]) -> list[int]:
    """The folds of the corpus of all methods. Adds to `wrong` why there are none, and a fold that is set already."""
    for name, config in methods.items():
        if config.fold is not None:
            wrong.append(f"{name}: fold is {config.fold}, but --folds runs every fold; leave out one of the two")
    corpus, known = next(iter(methods.values())).corpus, extra("corpora.published", "--folds").CORPORA
    folds = {name: other.folds for name, other in known.items() if other.folds}
    if corpus not in folds and corpus in (*known, "manifest"):  # of an unknown one reading it will say so
        has = f"leave out --folds (folds have {', '.join(folds)})"
        wrong.append(f"--folds: corpus {corpus!r} has a fixed split and no folds; {has}")
    return list(range(1, folds.get(corpus, 0) + 1))


def make_jobs(out: Path, methods: Methods, seeds: Sequence[int], folds: Sequence[int] = ()) -> list[Job]:
    """Every run in its order: all methods of a seed and fold before the next."""
    return [Job(out, name, seed, fold) for seed in seeds for fold in folds or [None] for name in methods]


def check(methods: Methods, jobs: Sequence[Job], wrong: list[str]) -> None:
    """Add to `wrong` what keeps methods from being compared, and directories that hold other runs."""
    first = next(iter(methods))
    for name, key in itertools.product(methods, CORPUS):
        here, there = (absolute(key, getattr(methods[method], key)) for method in (name, first))
        if here != there:
            wrong.append(f"{name}: {key} is {here!r}, that of {first} {there!r}; compare on one test set")
    for job in jobs:
        here = settings(methods[job.method]) | ({} if job.fold is None else {"fold": job.fold})
        if any((job.directory / file).is_file() for file in run.RESULTS):
            there = settings(load_config(job.directory / "config.yaml"))
            changed = [key for key in here if here[key] != there[key] and key not in run.PLACE_KEYS]
            if told := [f"{key} {there[key]!r}, now {here[key]!r}" for key in changed]:
                wrong.append(f"{job.directory} holds another run ({'; '.join(told)}); choose another --out")


def check_corpus(methods: Methods, jobs: Sequence[Job], wrong: list[str]) -> None:
    """Add to `wrong` errors of the corpus, and finished runs that were tested on what it was before."""
    config, checked = next(iter(methods.values())), set()
    try:
        for fold in dict.fromkeys(job.fold for job in jobs):
            utterances, _ = run.load_utterances(config if fold is None else replace(config, fold=fold))
            tested = [utterance for utterance in utterances if utterance.split == "test"]
            speakers = [utterance.speaker for utterance in tested]
            labels = [[utterance.labels[target] for target in config.targets] for utterance in tested]
            for job in (job for job in jobs if job.fold == fold and job.finished):
                place, there, method = job.directory, results.read_run(job.directory), methods[job.method]
                backbone = method.backbone, method.adapter, there.result["backbone"]["sha256"]
                if backbone not in checked:  # reading all of it takes a second
                    run.require_content(method, there.result, place, ["backbone"])
                checked.add(backbone)
                if there.speakers != speakers or there.labels.tolist() != labels:
                    what = "was tested on other utterances or labels than there are now"
                    wrong.append(f"{place} {what}; choose another --out")
    except (OSError, ValueError) as error:
        wrong.append(str(error))


def absolute(key: str, value: object) -> object:
    return os.path.realpath(value) if key in ("data_root", "manifest") and value is not None else value


# --- running ---------------------------------------------------------------------------------------------------------


def build_caches(methods: Methods, jobs: Sequence[Job]) -> None:
    """Fill every cache that a run will want, of the first fold, which serves all. Where that fails the runs do it."""
    wanted = {job.method: job for job in jobs if methods[job.method].cache and not job.finished}
    if not wanted:
        return
    print(f"filling the caches of {', '.join(wanted)}", flush=True)
    report, log, fold = jobs[0].out / "builds.json", log_path(jobs[0].out, "caches"), jobs[0].fold
    before = read_json(report) if report.is_file() else {}
    words = [*(str(config_path(job)) for job in wanted.values()), *([] if fold is None else [f"fold={fold}"])]
    if logged(["tools.caches", "build", *words, "--report", str(report)], log):
        print(f"failed, see {log}; the runs fill them in their first epoch")
    if report.is_file():
        after = read_json(report)  # where nothing was left to build, what it cost then still holds
        known = {path: build for path, build in before.items() if after.get(path, {}).get("seconds") is None}
        hardware.write_text(report, json.dumps({**after, **known}, indent=2) + "\n")


def train_all(methods: Methods, jobs: Sequence[Job]) -> None:
    """Every run that is not finished, and the table after each seed."""
    for number, job in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {job}: ", end="", flush=True)
        start, log, took = time.perf_counter(), log_path(job.out, job.directory.name), "finished before"
        if not job.finished:
            words = [f"seed={job.seed}", f"output_dir={json.dumps(str(job.out))}"]
            words += [f"name={json.dumps(job.directory.name)}", *([] if job.fold is None else [f"fold={job.fold}"])]
            logged(["train", str(config_path(job)), *words], log)
            took = f"{time.perf_counter() - start:.1f} s"
        if job.finished:
            test = read_json(job.directory / "result.json")["test"]
            scores = ", ".join(f"{target} {score['ccc']:.3f}" for target, score in test.items())
            print(f"{took}, test CCC {scores}", flush=True)
        else:
            print(f"failed after {took}, see {log}", flush=True)
        if number < len(jobs) and jobs[number].seed != job.seed:
            write_table(methods, jobs)


def config_path(job: Job) -> Path:
    return job.out / "configs" / f"{job.method}.yaml"


def log_path(out: Path, name: str) -> Path:
    return out / "logs" / f"{name}.txt"


# --- showing ---------------------------------------------------------------------------------------------------------


def write_table(methods: Methods, jobs: Sequence[Job]) -> tuple[str, Runs, list[dict]]:
    """Make `table.md` and `table.csv` of what is finished; the Markdown, and what it was made of."""
    out, folds, targets = jobs[0].out, {job.fold for job in jobs} - {None}, next(iter(methods.values())).targets
    runs, report = results.read_runs(jobs), out / "builds.json"
    builds = read_json(report) if report.is_file() else {}
    records = results.analyse(runs, targets, {Path(path).stem: build for path, build in builds.items()})
    text = results.markdown(runs, records, targets, failures(jobs), len(folds), raters_agreement(methods))
    hardware.write_text(out / "table.md", text + "\n")
    scores = (f"{target}_{score}" for target in targets for score in results.SCORES)
    tables.write_csv(out / "table.csv", ["method", "seeds", "folds", *scores, *results.COSTS, "note"], records)
    return text, runs, records


def raters_agreement(methods: Methods) -> dict[str, list[float]]:
    """By target the CCC of each rater with the mean of the others, where the corpus is there and has it."""
    config = next(iter(methods.values()))
    if config.corpus == "manifest" or config.data_root is None:
        return {}
    corpus, found = extra("corpora.published", f"corpus: {config.corpus}").CORPORA.get(config.corpus), {}
    with suppress(OSError, ValueError):  # shown from another place, without the corpus
        found = corpus.agreement(Path(config.data_root)) if corpus and corpus.agreement else {}
    return found | ({"arousal": found["activation"]} if "activation" in found else {})


def failures(jobs: Sequence[Job]) -> list[str]:
    """Notes on the runs that are not finished, with the last lines of those that failed."""
    notes, missing, caches = [], [], log_path(jobs[0].out, "caches")
    for job in (job for job in jobs if not job.finished):
        log = log_path(job.out, job.directory.name)
        if lines := last_lines(log):
            said = "".join(f"\n      {line}" for line in lines[:-1])
            notes.append(f"{job} failed ({lines[-1]}). The end of {log}:\n{said}\n")
        else:
            missing.append(str(job))
    notes += [f"Not finished: {', '.join(missing)}."] if missing else []
    if lines := last_lines(caches):
        notes.append(f"Caches were not filled beforehand ({lines[-1]}), see {caches}.")
    return notes


def draw(methods: Methods, jobs: Sequence[Job], runs: Runs, records: Sequence[dict]) -> str:
    """Every picture that the finished runs allow; returns what to say of them."""
    plots, shown = tables.find_plots(), [record for record in records if record["seeds"]]
    if not plots or not shown:
        return "no pictures: no run is finished" if plots else "no pictures: pip install matplotlib"
    names, seeds = [record["method"] for record in shown], sorted({seed for name in runs for seed in runs[name]})
    out, targets, note = jobs[0].out, next(iter(methods.values())).targets, shown[0]["note"]
    scores = np.full((len(names), len(seeds), len(targets)), np.nan)  # (M, S, K)
    for m, name in enumerate(names):
        for seed, each in runs[name].items():
            scores[m, seeds.index(seed)] = [each.result["test"][target]["ccc"] for target in targets]
    ceiling = {target: fmean(values) for target, values in raters_agreement(methods).items()}
    for key, unit, label, file in (
        ("total_seconds", 1, "training time in s (with the cache)", "ccc_against_time"),
        ("peak_memory_bytes", 1e9, "peak memory in GB", "ccc_against_memory"),
    ):
        spent = np.array([record[key] for record in shown]) / unit
        plots.cost(names, spent, scores, targets, label, ceiling, note, out / file)
    curves = [[curve(r, part, targets) for each in runs[r["method"]].values() for part in each.parts] for r in shown]
    plots.curves(names, curves, targets, note, out / "curves")
    depths: dict[int, int] = {}  # number of trained layers: the first method with it
    for m, name in enumerate(names):
        directory = next(job.directory for job in jobs if job.method == name and job.finished)
        count = trained_layers(methods[name], directory, methods)
        if count is not None:
            depths.setdefault(count, m)
    if len(depths) > 1:
        plots.depth(list(depths), scores[list(depths.values())], targets, note, out / "ccc_against_depth")
    chosen = [runs[name][min(runs[name])] for name in names]
    for k, target in enumerate(targets):
        of_chosen = [each.result["test"][target]["ccc"] for each in chosen]
        predictions, labels = [each.predictions[:, k] for each in chosen], chosen[0].labels[:, k]
        plots.scatter(names, predictions, labels, target, of_chosen, note, out / f"scatter_{target}")
    return f"pictures in {out}"


def curve(record: dict, each: Run, targets: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds `(E,)` at the end of each epoch, with the build of the cache, and CCC on the development set `(E, K)`."""
    build = (record["build_seconds"] or 0.0) - each.result["seconds"]["cache_build"]  # what the run has not paid itself
    values = [[row[f"dev_ccc_{target}"] for target in targets] for row in each.log]
    return np.array([row["seconds"] + build for row in each.log]), np.array(values)


def trained_layers(config: Config, directory: Path, methods: Methods) -> int | None:
    """How many layers trained; None where that is no plain number of the backbone that the others train."""
    backbone = next((other.backbone for other in methods.values() if other.trainable_layers), None)
    if config.lora_rank or config.backbone != backbone or isinstance(config.trainable_layers, list):
        return None
    if config.trainable_layers != "all":
        return config.trainable_layers
    trained = run.load_checkpoint(directory / "best.pt")["trained"]
    return len({match.group() for key in trained if (match := re.search(r"layers\.\d+\.", key))})


# --- the command line ------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = parse_arguments()
    configs, overrides = split_words(arguments.words)
    if not configs:
        raise ValueError("expected at least one config, as in configs/")
    wrong: list[str] = []
    methods = make_methods(configs, overrides, arguments.sweep, wrong)
    folds = find_folds(methods, wrong) if methods and arguments.folds else []
    jobs = make_jobs(Path(arguments.out), methods, range(arguments.seeds), folds)
    if methods:
        check(methods, jobs, wrong)
    if not (wrong or arguments.table):
        check_corpus(methods, jobs, wrong)
    if wrong:
        raise ValueError("\n  ".join(["nothing was run:", *dict.fromkeys(wrong)]))
    stopped = not arguments.table and run_all(methods, jobs)
    jobs[0].out.mkdir(parents=True, exist_ok=True)
    text, runs, records = write_table(methods, jobs)
    print(f"\n{text}\n\n{jobs[0].out}: table.md, table.csv", flush=True)
    print(draw(methods, jobs, runs, records))
    if stopped:
        sys.exit("stopped; the same command continues with what is not finished")
    sys.exit(not arguments.table and not all(job.finished for job in jobs))


def run_all(methods: Methods, jobs: Sequence[Job]) -> bool:
    """Caches and runs; whether the user stopped them."""
    for number in hardware.STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    try:
        config_path(jobs[0]).parent.mkdir(parents=True, exist_ok=True)
        for job in {job.method: job for job in jobs}.values():
            hardware.write_yaml(config_path(job), settings(methods[job.method]))
        build_caches(methods, jobs)
        train_all(methods, jobs)
    except KeyboardInterrupt:
        return True
    return False


def parse_arguments() -> argparse.Namespace:
    """The command line, whose configs, keys and options may come in any order."""
    parser = argparse.ArgumentParser(description="The methods of several configs side by side.")
    words = "YAML files, and keys to set in all; backbone= is not for the log-mel baseline"
    parser.add_argument("words", nargs="+", metavar="CONFIG or key=value", help=words)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to one less than this (default 3)")
    parser.add_argument("--sweep", action="append", default=[], metavar="key=v1,v2,...", help="may be given repeatedly")
    parser.add_argument("--folds", action="store_true", help="every fold: each utterance is tested once")
    parser.add_argument("--out", default="runs/compare", help="a folder (default runs/compare)")
    parser.add_argument("--table", action="store_true", help="run nothing: show what is finished")
    arguments = parser.parse_intermixed_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds: expected at least 1, found {arguments.seeds}")
    return arguments


if __name__ == "__main__":
    command(main)
