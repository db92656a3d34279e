"""The methods of several configs side by side: score, cost and what the one buys for the other.

    python compare.py configs/full.yaml configs/partial3_cached.yaml configs/lora_r8.yaml [key=value ...] [--seeds 5]
    python compare.py configs/partial3_cached.yaml --sweep trainable_layers=0,1,2,3,6,9,12
    python compare.py CONFIG ... --folds        every fold of a corpus that is tested so, such as emotale or iemocap
    python compare.py CONFIG ... --table        the tables again, from what is finished

Every method, seed and fold is a run of train.py in a process of its own, so that time and memory are its own. Caches
are filled before, each for all seeds and folds. Then come the runs, all methods of a seed and fold before the next, so
that an interrupted table is even. The same command again goes on where it was left: a finished run is not repeated, a
stopped one is resumed.

Below `--out`: `table.md`, `table.csv`, pictures, `configs/`, `logs/`, and the runs' directories, `<method>-seed<K>` or
`<method>-seed<K>-fold<F>`. The first method is what the others are compared with.
"""

import argparse
import csv
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

import run
from config import Config, extra, load_config, parse, split_words
from data import text_cell
from machine import hardware
from machine.programs import last_lines, logged
from report.results import (
    COSTS,
    FOLD_SCORE,
    SCORES,
    Run,
    Runs,
    analyse,
    markdown,
    pool,
    read_method,
    read_run,
    run_directory,
)
from weights import read_json

HERE = Path(__file__).parent
CORPUS = ("corpus", "data_root", "manifest", "fold", "test_set", "dev_set", "flip_activation")  # the same for all
CORPUS += ("label_range", "targets", "allow_speaker_overlap")
OURS = {"name": "as the name of the YAML file", "seed": "as --seeds", "output_dir": "as --out"}  # what compare.py sets
Job = tuple[str, int, int | None]  # method, seed, and fold or None

# --- what is compared ------------------------------------------------------------------------------------------------


def make_methods(
    configs: Sequence[str], overrides: Sequence[str], sweeps: Sequence[str], wrong: list[str]
) -> dict[str, Config]:
    """Methods by name: each config, once for each combination of the sweeps' values. Adds to `wrong` what is so."""
    choices = [[(key, value) for value in values] for key, values in map(parse_sweep, sweeps)]
    keys = [word.partition("=")[0] for word in [*overrides, *sweeps]]
    wrong += [f"{key}: is set by compare.py; give it {OURS[key]}" for key in keys if key in OURS]
    wrong += [f"{key}: is given more than once" for key in keys if keys.count(key) > 1]
    methods: dict[str, Config] = {}
    for path, chosen in itertools.product(configs, itertools.product(*choices)):
        values = [(key, json.dumps(value, default=str)) for key, value in chosen]
        name = "-".join([Path(path).stem, *(f"{key}={file_name(value)}" for key, value in values)])
        try:
            words = overrides
            if load_config(path).backbone == "logmel":  # with another backbone it would not be that baseline
                words = [word for word in overrides if not word.startswith("backbone=")]
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


def parse_sweep(text: str) -> tuple[str, list]:
    """`key=v1,v2,...` as the key and YAML values, of which each may be a list or null."""
    key, equals, values = text.partition("=")
    try:
        parsed = parse(f"[{values}]", text)
    except ValueError:
        parsed = None
    if not equals or not parsed:
        raise ValueError(f"--sweep: expected key=value,value,..., as in trainable_layers=0,1,2; found {text!r}")
    return key, parsed


def file_name(text: str) -> str:
    """What every file system takes: `[9, 10]` is 9_10."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def settings(config: Config) -> dict:
    """All that makes a method: the configuration without what compare.py sets."""
    return {key: value for key, value in run.plain(config).items() if key not in OURS}


def find_folds(methods: Mapping[str, Config], wrong: list[str]) -> list[int]:
    """The folds of the corpus of all methods. Adds to `wrong` why there are none, and a fold that is set already."""
    for name, config in methods.items():
        if config.fold is not None:
            wrong.append(f"{name}: fold is {config.fold}, but --folds runs every fold; leave out one of the two")
    corpus = next(iter(methods.values())).corpus
    known = extra("corpora.published", "--folds").CORPORA
    if corpus != "manifest" and corpus not in known:
        return []  # reading it will say so
    count = 0 if corpus == "manifest" else known[corpus].folds
    if not count:
        has = ", ".join(name for name, other in known.items() if other.folds)
        wrong.append(f"--folds: corpus {corpus!r} has a fixed split and no folds; leave out --folds (folds have {has})")
    return list(range(1, count + 1))


def make_jobs(methods: Mapping[str, Config], seeds: Sequence[int], folds: Sequence[int] = ()) -> list[Job]:
    """Every run in its order: all methods of a seed and fold before the next."""
    return [(name, seed, fold) for seed in seeds for fold in folds or [None] for name in methods]


def check(methods: dict[str, Config], seeds: Sequence[int], folds: Sequence[int], out: Path, wrong: list[str]) -> None:
    """Add to `wrong` what keeps methods from being compared, and directories that hold other runs."""
    first = next(iter(methods))
    for name in methods:
        for key in CORPUS:
            here, there = (absolute(key, getattr(methods[method], key)) for method in (name, first))
            if here != there:
                wrong.append(f"{name}: {key} is {here!r}, that of {first} {there!r}; compare on one test set")
    for name, seed, fold in make_jobs(methods, seeds, folds):
        directory, here = run_directory(out, name, seed, fold), settings(methods[name])
        here |= {} if fold is None else {"fold": fold}
        if any((directory / file).is_file() for file in ("best.pt", "last.pt", "result.json")):
            there = settings(load_config(directory / "config.yaml"))
            changed = [key for key in here if here[key] != there[key] and key not in run.PLACE_KEYS]
            if told := [f"{key} {there[key]!r}, now {here[key]!r}" for key in changed]:
                wrong.append(f"{directory} holds another run ({'; '.join(told)}); choose another --out")


def check_corpus(
    methods: dict[str, Config], seeds: Sequence[int], folds: Sequence[int], out: Path, wrong: list[str]
) -> None:
    """Add to `wrong` what is so with the corpus, and finished runs that were tested on what it was before."""
    config, checked = next(iter(methods.values())), set()
    for fold in folds or [config.fold]:
        try:
            utterances, _ = run.load_utterances(replace(config, fold=fold))
            tested = [utterance for utterance in utterances if utterance.split == "test"]
            jobs = make_jobs(methods, seeds, [fold] if folds else [])
            places = {run_directory(out, *job): methods[job[0]] for job in jobs}
            runs = {place: read_run(place) for place in places if (place / "result.json").is_file()}
            for place, each in runs.items():
                backbone = places[place].backbone, places[place].adapter, each.result["backbone"]["sha256"]
                if backbone not in checked:  # reading all of it takes a second
                    run.require_content(places[place], each.result, place, ["backbone"])
                checked.add(backbone)
        except (OSError, ValueError) as error:
            wrong.append(str(error))
            return
        speakers = [utterance.speaker for utterance in tested]
        labels = [[utterance.labels[target] for target in config.targets] for utterance in tested]
        for place, each in runs.items():
            if each.speakers != speakers or each.labels.tolist() != labels:
                wrong.append(
                    f"{place} was tested on other utterances or labels than there are now; choose another --out"
                )


def absolute(key: str, value: object) -> object:
    return os.path.realpath(value) if key in ("data_root", "manifest") and value is not None else value


# --- running ---------------------------------------------------------------------------------------------------------


def build_caches(methods: dict[str, Config], seeds: Sequence[int], out: Path, folds: Sequence[int] = ()) -> None:
    """Fill every cache that a run will want, in one pass over the corpus. Where that fails the runs do it.

    A cache is one of files, whatever their split: that of the first fold is that of all.
    """
    unfinished = {job[0] for job in make_jobs(methods, seeds, folds) if not finished(out, job)}
    wanted = [name for name, config in methods.items() if config.cache and name in unfinished]
    paths = [str(config_path(out, name)) for name in wanted]
    if not paths:
        return
    print(f"filling the caches of {', '.join(wanted)}", flush=True)
    report, log = out / "builds.json", log_path(out, "caches")
    before = read_json(report) if report.is_file() else {}
    fold = [f"fold={folds[0]}"] if folds else []
    if logged(["-m", "tools.caches", "build", *paths, *fold, "--report", str(report)], log):
        print(f"failed, see {log}; the runs fill them in their first epoch")
    if report.is_file():
        after = read_json(report)  # where nothing was left to build, what it cost then still holds
        known = {path: build for path, build in before.items() if after.get(path, {}).get("seconds") is None}
        hardware.write_text(report, json.dumps({**after, **known}, indent=2) + "\n")


def train_all(methods: dict[str, Config], seeds: Sequence[int], out: Path, folds: Sequence[int] = ()) -> None:
    """Every run that is not finished, and the table after each seed."""
    jobs = make_jobs(methods, seeds, folds)
    for number, job in enumerate(jobs, 1):
        name, seed, fold = job
        print(f"[{number}/{len(jobs)}] {job_name(job)}: ", end="", flush=True)
        start, directory, took = time.perf_counter(), run_directory(out, *job), "finished before"
        if not finished(out, job):
            words = [f"seed={seed}", f"output_dir={json.dumps(str(out))}", f"name={json.dumps(directory.name)}"]
            words += [] if fold is None else [f"fold={fold}"]
            logged([str(HERE / "train.py"), str(config_path(out, name)), *words], log_path(out, directory.name))
            took = f"{time.perf_counter() - start:.1f} s"
        if finished(out, job):
            test = read_json(directory / "result.json")["test"]
            scores = ", ".join(f"{target} {score['ccc']:.3f}" for target, score in test.items())
            print(f"{took}, test CCC {scores}", flush=True)
        else:
            print(f"failed after {took}, see {log_path(out, directory.name)}", flush=True)
        if number < len(jobs) and jobs[number][1] != seed:
            write_table(methods, seeds, out, folds)


def finished(out: Path, job: Job) -> bool:
    return (run_directory(out, *job) / "result.json").is_file()


def job_name(job: Job) -> str:
    name, seed, fold = job
    return f"{name} seed {seed}" + ("" if fold is None else f" fold {fold}")


def config_path(out: Path, name: str) -> Path:
    return out / "configs" / f"{name}.yaml"


def log_path(out: Path, name: str) -> Path:
    return out / "logs" / f"{name}.txt"


# --- showing ---------------------------------------------------------------------------------------------------------


def write_table(
    methods: dict[str, Config], seeds: Sequence[int], out: Path, folds: Sequence[int] = ()
) -> tuple[str, Runs, list[dict]]:
    """Make `table.md` and `table.csv` of what is finished; the Markdown, and what it was made of."""
    runs = {name: read_method(out, name, seeds, folds) for name in methods}
    report, targets = out / "builds.json", next(iter(methods.values())).targets
    builds = read_json(report) if report.is_file() else {}
    records = analyse(runs, targets, {Path(path).stem: build for path, build in builds.items()})
    notes = failures(methods, seeds, out, folds)
    text = markdown(runs, records, targets, notes, len(folds), raters_agreement(methods))
    hardware.write_text(out / "table.md", text + "\n")
    scores = [*SCORES, *([FOLD_SCORE] if folds else [])]
    columns = ["method", "seeds", "folds", *(f"{target}_{score}" for target in targets for score in scores)]
    columns += [*COSTS, "note"]

    def save(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({**record, "method": text_cell(record["method"])} for record in records)

    hardware.replace(out / "table.csv", save)
    return text, runs, records


def raters_agreement(methods: Mapping[str, Config]) -> dict[str, list[float]]:
    """By target the CCC of each rater with the mean of the others, where the corpus is there and has it."""
    config = next(iter(methods.values()))
    if config.corpus == "manifest" or config.data_root is None:
        return {}
    corpus = extra("corpora.published", f"corpus: {config.corpus}").CORPORA.get(config.corpus)
    try:
        found = corpus.agreement(Path(config.data_root)) if corpus and corpus.agreement else {}
    except (OSError, ValueError):  # shown from another place, without the corpus
        return {}
    return found | ({"arousal": found["activation"]} if "activation" in found else {})


def failures(methods: Mapping[str, Config], seeds: Sequence[int], out: Path, folds: Sequence[int] = ()) -> list[str]:
    """Notes on the runs that are not finished, with the last lines of those that failed."""
    notes, missing = [], []
    for job in make_jobs(methods, seeds, folds):
        if finished(out, job):
            continue
        log = log_path(out, run_directory(out, *job).name)
        if lines := last_lines(log):
            said = "".join(f"\n      {line}" for line in lines[:-1])
            notes.append(f"{job_name(job)} failed ({lines[-1]}). The end of {log}:\n{said}\n")
        else:
            missing.append(job_name(job))
    if missing:
        notes.append(f"Not finished: {', '.join(missing)}.")
    if lines := last_lines(log_path(out, "caches")):
        notes.append(f"Caches were not filled beforehand ({lines[-1]}), see {log_path(out, 'caches')}.")
    return notes


def draw(
    methods: dict[str, Config], runs: Runs, records: Sequence[dict], out: Path, agreement: Mapping[str, Sequence[float]]
) -> str:
    """Every picture that the finished runs allow; returns what to say of them."""
    try:
        import report.plots as plots
    except ImportError:
        return "no pictures: pip install matplotlib"
    shown = [record for record in records if record["seeds"]]
    names, seeds = [record["method"] for record in shown], sorted({seed for name in runs for seed in runs[name]})
    if not names:
        return "no pictures: no run is finished"
    config = next(iter(methods.values()))
    targets, note = config.targets, shown[0]["note"]
    scores = np.full((len(names), len(seeds), len(targets)), np.nan)  # (M, S, K)
    for m, name in enumerate(names):
        for seed, each in runs[name].items():
            scores[m, seeds.index(seed)] = [each.result["test"][target]["ccc"] for target in targets]
    times, gigabytes = (np.array([r[key] for r in shown]) for key in ("total_seconds", "peak_memory_bytes"))
    ceiling = {target: fmean(agreement[target]) for target in targets if agreement.get(target)}
    for costs, name, label in (
        (times, "ccc_against_time", "training time in s (with the cache)"),
        (gigabytes / 1e9, "ccc_against_memory", "peak memory in GB"),
    ):
        plots.cost(names, costs, scores, targets, label, note, out / name, ceiling)
    curves = [[curve(r, part, targets) for each in runs[r["method"]].values() for part in each.parts] for r in shown]
    plots.curves(names, curves, targets, note, out / "curves")
    depths: dict[int, int] = {}  # number of trained layers: the first method with it
    for m, name in enumerate(names):
        first = min(runs[name])
        fold = next(iter(runs[name][first].folds), None)
        count = trained_layers(methods[name], run_directory(out, name, first, fold), methods)
        if count is not None:
            depths.setdefault(count, m)
    if len(depths) > 1:
        plots.depth(list(depths), scores[list(depths.values())], targets, note, out / "ccc_against_depth")
    chosen = alike([runs[name][min(runs[name])] for name in names])
    for k, target in enumerate(targets if chosen else ()):
        of_chosen = [each.result["test"][target]["ccc"] for each in chosen]
        predictions, labels = [each.predictions[:, k] for each in chosen], chosen[0].labels[:, k]
        plots.scatter(names, predictions, labels, target, of_chosen, note, out / f"scatter_{target}")
    return f"pictures in {out}"


def alike(runs: Sequence[Run]) -> list[Run]:
    """Runs restricted to the folds that all of them have; none if there is no such fold."""
    if not any(each.folds for each in runs):
        return list(runs)
    common = [fold for fold in runs[0].folds if all(fold in each.folds for each in runs)]
    return [pool({fold: each.folds[fold] for fold in common}) for each in runs] if common else []


def curve(record: dict, each: Run, targets: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds `(E,)` at the end of each epoch, with the build of the cache, and CCC on the development set `(E, K)`."""
    build = (record["build_seconds"] or 0.0) - each.result["seconds"]["cache_build"]  # what the run has not paid itself
    values = [[row[f"dev_ccc_{target}"] for target in targets] for row in each.log]
    return np.array([row["seconds"] + build for row in each.log]), np.array(values)


def trained_layers(config: Config, directory: Path, methods: dict[str, Config]) -> int | None:
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
    out, seeds = Path(arguments.out), range(arguments.seeds)
    configs, overrides = split_words(arguments.words)
    if not configs:
        raise ValueError("expected at least one config, as in configs/")
    wrong: list[str] = []
    methods = make_methods(configs, overrides, arguments.sweep, wrong)
    folds = find_folds(methods, wrong) if methods and arguments.folds else []
    if methods:
        check(methods, seeds, folds, out, wrong)
    if not (wrong or arguments.table):
        check_corpus(methods, seeds, folds, out, wrong)
    if wrong:
        raise ValueError("\n  ".join(["nothing was run:", *dict.fromkeys(wrong)]))
    stopped = False
    if not arguments.table:
        for number in hardware.STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler)
        stopped = run_all(methods, seeds, out, folds)
    out.mkdir(parents=True, exist_ok=True)
    text, runs, records = write_table(methods, seeds, out, folds)
    print(f"\n{text}\n\n{out}: table.md, table.csv", flush=True)
    print(draw(methods, runs, records, out, raters_agreement(methods)))
    if stopped:
        sys.exit("stopped; the same command continues with what is not finished")
    sys.exit(not arguments.table and not all(finished(out, job) for job in make_jobs(methods, seeds, folds)))


def run_all(methods: dict[str, Config], seeds: Sequence[int], out: Path, folds: Sequence[int] = ()) -> bool:
    """Caches and runs; whether the user stopped them."""
    try:
        for name, config in methods.items():
            config_path(out, name).parent.mkdir(parents=True, exist_ok=True)
            hardware.write_yaml(config_path(out, name), settings(config))
        build_caches(methods, seeds, out, folds)
        train_all(methods, seeds, out, folds)
    except KeyboardInterrupt:
        return True
    return False


def parse_arguments() -> argparse.Namespace:
    """The command line, whose configs, keys and options may come in any order."""
    parser = argparse.ArgumentParser(description="The methods of several configs side by side.")
    parser.add_argument(
        "words",
        nargs="+",
        metavar="CONFIG or key=value",
        help="YAML files, and keys to set in all; backbone= is not for the log-mel baseline",
    )
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
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
