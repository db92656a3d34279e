"""The methods of several configs side by side: score, cost and what the one buys for the other.

    python compare.py configs/full.yaml configs/partial3_cached.yaml configs/lora_r8.yaml [key=value ...] [--seeds 5]
    python compare.py configs/partial3_cached.yaml --sweep trainable_layers=0,1,2,3,6,9,12
    python compare.py CONFIG ... --table        the tables again, from what is finished

Every method and seed is a run of train.py in a process of its own, so that time and memory are its own. Caches are
filled before. Then come the runs, all methods of a seed before the next seed, so that an interrupted table is even. The
same command again goes on where it was left: a finished run is not repeated, a stopped one is resumed.

Below `--out`: `table.md`, `table.csv`, pictures, `configs/`, `logs/`, and the run's directories, `<method>-seed<K>`.
The first method is what the others are compared with.
"""

import argparse
import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import run
from config import Config, load_config, parse, split_words
from data import text_cell
from machine import hardware
from report.results import COSTS, SCORES, Run, Runs, analyse, markdown, read_method, run_directory
from weights import read_json

HERE = Path(__file__).parent
CORPUS = ("corpus", "data_root", "manifest", "fold", "test_set", "dev_set", "flip_activation")  # the same for all
CORPUS += ("label_range", "targets", "allow_speaker_overlap")
OURS = {"name": "as the name of the YAML file", "seed": "as --seeds", "output_dir": "as --out"}  # what compare.py sets
FAILED = "compare.py: failed, "  # begins the last line of the log of a process that failed

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


def check(methods: dict[str, Config], seeds: Sequence[int], out: Path, wrong: list[str]) -> None:
    """Add to `wrong` what keeps methods from being compared, and directories that hold other runs."""
    first = next(iter(methods))
    for name, config in methods.items():
        for key in CORPUS:
            here, there = (absolute(key, getattr(methods[method], key)) for method in (name, first))
            if here != there:
                wrong.append(f"{name}: {key} is {here!r}, that of {first} {there!r}; compare on one test set")
        here = settings(config)
        for directory in (run_directory(out, name, seed) for seed in seeds):
            if any((directory / file).is_file() for file in ("best.pt", "last.pt", "result.json")):
                there = settings(load_config(directory / "config.yaml"))
                changed = [f"{key} {there[key]!r}, now {here[key]!r}" for key in here if here[key] != there[key]]
                if changed:
                    wrong.append(f"{directory} holds another run ({'; '.join(changed)}); choose another --out")


def check_corpus(methods: dict[str, Config], seeds: Sequence[int], out: Path, wrong: list[str]) -> None:
    """Add to `wrong` what is so with the corpus, and finished runs that were tested on what it was before."""
    config = next(iter(methods.values()))
    try:
        tested = [utterance for utterance in run.load_utterances(config)[0] if utterance.split == "test"]
        runs = {name: read_method(out, name, seeds) for name in methods}
    except (OSError, ValueError) as error:
        wrong.append(str(error))
        return
    speakers = [utterance.speaker for utterance in tested]
    labels = [[utterance.labels[target] for target in config.targets] for utterance in tested]
    for name, by_seed in runs.items():
        for seed, each in by_seed.items():
            if each.speakers != speakers or each.labels.tolist() != labels:
                wrong.append(
                    f"{run_directory(out, name, seed)} was tested on other utterances or labels than there are now; "
                    "choose another --out"
                )


def absolute(key: str, value: object) -> object:
    return os.path.abspath(value) if key in ("data_root", "manifest") and value is not None else value


# --- running ---------------------------------------------------------------------------------------------------------


def build_caches(methods: dict[str, Config], seeds: Sequence[int], out: Path) -> None:
    """Fill every cache that a run will want, in one pass over the corpus. Where that fails the runs do it."""
    wanted = [
        name for name, config in methods.items() if config.cache and not all(finished(out, name, s) for s in seeds)
    ]
    paths = [str(config_path(out, name)) for name in wanted]
    if not paths:
        return
    print(f"filling the caches of {', '.join(wanted)}", flush=True)
    report, log = out / "builds.json", log_path(out, "caches")
    before = read_json(report) if report.is_file() else {}
    if logged(["-m", "tools.caches", "build", *paths, "--report", str(report)], log):
        print(f"failed, see {log}; the runs fill them in their first epoch")
    if report.is_file():
        after = read_json(report)  # where nothing was left to build, what it cost then still holds
        known = {path: build for path, build in before.items() if after.get(path, {}).get("seconds") is None}
        hardware.write_text(report, json.dumps({**after, **known}, indent=2) + "\n")


def train_all(methods: dict[str, Config], seeds: Sequence[int], out: Path) -> None:
    """Every run that is not finished, and the table after each seed."""
    for seed in seeds:
        for number, name in enumerate(methods, seed * len(methods) + 1):
            print(f"[{number}/{len(seeds) * len(methods)}] {name} seed {seed}: ", end="", flush=True)
            start, directory, took = time.perf_counter(), run_directory(out, name, seed), "finished before"
            if not finished(out, name, seed):
                words = [f"seed={seed}", f"output_dir={json.dumps(str(out))}", f"name={json.dumps(directory.name)}"]
                logged([str(HERE / "train.py"), str(config_path(out, name)), *words], log_path(out, directory.name))
                took = f"{time.perf_counter() - start:.1f} s"
            if finished(out, name, seed):
                test = read_json(directory / "result.json")["test"]
                scores = ", ".join(f"{target} {score['ccc']:.3f}" for target, score in test.items())
                print(f"{took}, test CCC {scores}", flush=True)
            else:
                print(f"failed after {took}, see {log_path(out, directory.name)}", flush=True)
        if seed != seeds[-1]:
            write_table(methods, seeds, out)


def logged(arguments: Sequence[str], log: Path) -> int:
    """Run a Python program, all that it says into `log`; its exit code, of which the log's last line tells."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what a killed process has said is in the file
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))  # for -m
        command = [sys.executable, *arguments]
        with subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                process.terminate()  # it ends its step and saves
                process.wait()
                raise
        if code:
            reason = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
            if code == -9:
                reason += ", perhaps for memory"
            file.write(f"\n{FAILED}{reason}\n".encode())
    return code


def finished(out: Path, name: str, seed: int) -> bool:
    return (run_directory(out, name, seed) / "result.json").is_file()


def last_lines(log: Path, count: int = 5) -> list[str]:
    """Of a process that failed, its last lines as a terminal would show them and how it ended; else none."""
    if not log.is_file():
        return []
    lines = [line.rstrip().split("\r")[-1] for line in log.read_bytes().decode(errors="replace").split("\n")]
    lines = [line for line in lines if line]
    if not lines or not lines[-1].startswith(FAILED):
        return []
    return [*lines[-1 - count : -1], lines[-1].removeprefix(FAILED)]


def config_path(out: Path, name: str) -> Path:
    return out / "configs" / f"{name}.yaml"


def log_path(out: Path, name: str) -> Path:
    return out / "logs" / f"{name}.txt"


# --- showing ---------------------------------------------------------------------------------------------------------


def write_table(methods: dict[str, Config], seeds: Sequence[int], out: Path) -> tuple[str, Runs, list[dict]]:
    """Make `table.md` and `table.csv` of what is finished; the Markdown, and what it was made of."""
    runs = {name: read_method(out, name, seeds) for name in methods}
    report, targets = out / "builds.json", next(iter(methods.values())).targets
    builds = read_json(report) if report.is_file() else {}
    records = analyse(runs, targets, {Path(path).stem: build for path, build in builds.items()})
    text = markdown(runs, records, targets, failures(runs, seeds, out))
    hardware.write_text(out / "table.md", text + "\n")
    columns = ["method", "seeds", *(f"{target}_{score}" for target in targets for score in SCORES), *COSTS, "note"]

    def save(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({**record, "method": text_cell(record["method"])} for record in records)

    hardware.replace(out / "table.csv", save)
    return text, runs, records


def failures(runs: Runs, seeds: Sequence[int], out: Path) -> list[str]:
    """Notes on the runs that are not finished, with the last lines of those that failed."""
    notes, missing = [], []
    for name, seed in [(name, seed) for name in runs for seed in seeds if seed not in runs[name]]:
        log = log_path(out, run_directory(out, name, seed).name)
        if lines := last_lines(log):
            said = "".join(f"\n      {line}" for line in lines[:-1])
            notes.append(f"{name} seed {seed} failed ({lines[-1]}). The end of {log}:\n{said}\n")
        else:
            missing.append(f"{name} seed {seed}")
    if missing:
        notes.append(f"Not finished: {', '.join(missing)}.")
    if lines := last_lines(log_path(out, "caches")):
        notes.append(f"Caches were not filled beforehand ({lines[-1]}), see {log_path(out, 'caches')}.")
    return notes


def draw(methods: dict[str, Config], runs: Runs, records: Sequence[dict], out: Path) -> str:
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
    label = "training time in s (with the cache)"
    plots.cost(names, times, scores, targets, label, note, out / "ccc_against_time")
    plots.cost(names, gigabytes / 1e9, scores, targets, "peak memory in GB", note, out / "ccc_against_memory")
    curves = [[curve(r, each, targets) for each in runs[r["method"]].values()] for r in shown]
    plots.curves(names, curves, targets, note, out / "curves")
    depths: dict[int, int] = {}  # number of trained layers: the first method with it
    for m, name in enumerate(names):
        count = trained_layers(methods[name], run_directory(out, name, min(runs[name])), methods)
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
    if methods:
        check(methods, seeds, out, wrong)
    if not (wrong or arguments.table):
        check_corpus(methods, seeds, out, wrong)
    if wrong:
        raise ValueError("\n  ".join(["nothing was run:", *dict.fromkeys(wrong)]))
    stopped = False
    if not arguments.table:
        for number in hardware.STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler)
        stopped = run_all(methods, seeds, out)
    out.mkdir(parents=True, exist_ok=True)
    text, runs, records = write_table(methods, seeds, out)
    print(f"\n{text}\n\n{out}: table.md, table.csv", flush=True)
    print(draw(methods, runs, records, out))
    if stopped:
        sys.exit("stopped; the same command continues with what is not finished")
    sys.exit(not arguments.table and any(len(runs[name]) < len(seeds) for name in methods))


def run_all(methods: dict[str, Config], seeds: Sequence[int], out: Path) -> bool:
    """Caches and runs; whether the user stopped them."""
    try:
        for name, config in methods.items():
            config_path(out, name).parent.mkdir(parents=True, exist_ok=True)
            hardware.write_yaml(config_path(out, name), settings(config))
        build_caches(methods, seeds, out)
        train_all(methods, seeds, out)
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
