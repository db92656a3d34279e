"""What `compare.py` promises: nothing runs that cannot be compared, nothing finished is lost, nothing runs twice."""

import csv
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import audmetric
import numpy as np
import pytest
import yaml
from conftest import forget_plots, tiny_settings
from test_emotale import make as make_emotale
from test_results import TARGETS, fabricate

import compare
import report
import run
from config import load_config
from corpora import emotale
from freeze import trained_state
from machine import hardware
from report import results, tables

ROOT = Path(__file__).parents[1]


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A function that writes `name.yaml` files with these keys into the working directory of the test."""
    monkeypatch.chdir(tmp_path)

    def write(**methods: dict) -> list[str]:
        for name, keys in methods.items():
            Path(f"{name}.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
        return [f"{name}.yaml" for name in methods]

    return write


def command_line(monkeypatch, *arguments: object) -> object:
    """`python compare.py ...` in this process: what it exits with, a message or 0, 1 or 2."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "compare.py"), run_name="__main__")
    return end.value.code


def main(monkeypatch, *arguments: object) -> object:
    """The same in the imported module, in which a test may have put something in another's place."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        compare.main()
    return end.value.code


def finish(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in that folder, with what it prints. Its runs are processes, forked from one that this file shares."""
    said = {name: io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for name in ("stdout", "stderr")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # which `logged` adds to
        for name, stream in said.items():
            patch.setattr(sys, name, stream)
        code = command_line(patch, *arguments)
    out, err = (stream.buffer.getvalue().decode() for stream in said.values())
    return subprocess.CompletedProcess(arguments, code, out, err)


@pytest.fixture
def unrendered(monkeypatch):
    """What pictures show is worked out as ever, but none is rendered, which takes a second each."""
    functions = dict.fromkeys(("cost", "curves", "depth", "scatter"), lambda *given: None)
    monkeypatch.setattr(tables, "find_plots", lambda: types.SimpleNamespace(**functions))


# ---------------------------------------------------------------- through the real command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_checkpoint, tiny_manifest):
    """A comparison of a cached method and one that must fail, two seeds each; its folder and the process."""
    folder = tmp_path_factory.mktemp("compared")
    keys = tiny_settings(folder, tiny_checkpoint, tiny_manifest, epochs=2)
    keys.pop("output_dir")
    for name, more in {"heads": {"cache": True}, "nine": {"trainable_layers": 9}}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**keys, **more}), encoding="utf-8")
    return folder, finish(folder, "heads.yaml", "nine.yaml", "lr=1e-3", "--seeds", "2", "--out", "out")


def test_a_failing_method_stays_in_the_notes_and_the_others_in_the_table(finished):
    """Exit status 1, its last lines in the table, a row for it, and all that was promised of the other."""
    folder, done = finished
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    table = (folder / "out" / "table.md").read_text(encoding="utf-8")
    assert table.strip() in done.stdout
    assert table.count("error: trainable_layers: the model has 3 layers, found 9") == 2
    assert "nine seed 1 failed (exit code 1)" in table
    with open(folder / "out" / "table.csv", newline="", encoding="utf-8") as file:
        heads, nine = csv.DictReader(file)
    assert (heads["method"], heads["seeds"], nine["method"], nine["seeds"]) == ("heads", "2", "nine", "0")
    scores = []
    for seed in range(2):
        directory = folder / "out" / f"heads-seed{seed}"
        result = json.loads((directory / "result.json").read_text())
        assert (result["config"]["seed"], result["config"]["lr"], result["epochs"]) == (seed, 1e-3, 2)
        assert (folder / "out" / "logs" / f"heads-seed{seed}.txt").is_file()
        scores.append(result["test"]["valence"]["ccc"])
    assert len(set(scores)) == 2
    assert float(heads["valence_ccc"]) == pytest.approx(np.mean(scores))
    assert nine["valence_ccc"] == heads["note"] == ""
    assert load_config(folder / "out" / "configs" / "heads.yaml").cache


def test_every_run_has_a_line_of_progress(finished):
    """Number, method, seed, seconds and what came of it, seed after seed."""
    lines = [line for line in finished[1].stdout.splitlines() if line.startswith("[")]
    begins = ["[1/4] heads seed 0: ", "[2/4] nine seed 0: ", "[3/4] heads seed 1: ", "[4/4] nine seed 1: "]
    assert [line[: len(begin)] for line, begin in zip(lines, begins, strict=True)] == begins
    assert " s, test CCC activation " in lines[0]
    assert "failed after" in lines[1]


def test_the_same_command_again_runs_only_what_is_not_finished(finished, unrendered, monkeypatch, capsys):
    """The failed method is tried again; of the finished one not even a process is started, nor its cache filled."""
    folder, _ = finished
    monkeypatch.chdir(folder)
    started = []
    monkeypatch.setattr(compare, "logged", lambda arguments, log: started.append(arguments))
    arguments = ("heads.yaml", "nine.yaml", "lr=1e-3", "--seeds", "2", "--out", "out")
    assert main(monkeypatch, *arguments) == 1
    assert [Path(words[1]).stem for words in started] == ["nine", "nine"]
    assert "[3/4] heads seed 1: finished before, test CCC" in capsys.readouterr().out
    started.clear()
    assert main(monkeypatch, *arguments, "--table") == 0
    assert started == []
    assert "| heads " in capsys.readouterr().out


def test_a_directory_with_another_configuration_or_test_set_is_an_error(finished, monkeypatch):
    """The keys are named with both values; a corpus that has changed since is noticed by its labels."""
    monkeypatch.chdir(finished[0])
    message = command_line(monkeypatch, "heads.yaml", "lr=1e-3", "head_lr=0.5", "--seeds", "1", "--out", "out")
    assert "heads-seed0 holds another run (head_lr 0.001, now 0.5); choose another --out" in message
    manifest = Path(yaml.safe_load(Path("heads.yaml").read_text())["manifest"])
    utterances = run.data.read_manifest(manifest)
    next(u for u in utterances if u.split == "test").labels["valence"] = 1.0
    monkeypatch.setattr(run.data, "load_corpus", lambda **_: utterances)
    message = command_line(monkeypatch, "heads.yaml", "lr=1e-3", "--seeds", "1", "--out", "out")
    assert "heads-seed0 was tested on other utterances or labels than there are now; choose another --out" in message


# ---------------------------------------------------------------- every fold


@pytest.fixture(scope="module")
def folded(tmp_path_factory, tiny_checkpoint):
    """Two cached methods over the six folds of a small EmoTale, one of which fails in fold 2; folder and process.

    Fold 2 of `layer` fails as a file stands where its directory should be.
    """
    folder = tmp_path_factory.mktemp("folded")
    tree = make_emotale(folder / "EmoTale", sound=True)
    keys = {"corpus": "emotale", "data_root": str(tree), "backbone": str(tiny_checkpoint), "cache": True}
    keys |= {"cache_dir": str(folder / "cache"), "epochs": 1, "precision": "fp32", "device": "cpu"}
    for name, more in {"heads": {}, "layer": {"trainable_layers": 1}}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**keys, **more}), encoding="utf-8")
    (folder / "out").mkdir()
    (folder / "out" / "layer-seed0-fold2").write_text("in the way")
    return folder, finish(folder, "heads.yaml", "layer.yaml", "--folds", "--seeds", "1", "--out", "out")


def test_every_utterance_is_tested_once_and_the_score_is_that_of_all_together(folded):
    """Pooled CCC by another implementation, and beside it the mean of the folds' own, but of fold 2, which failed."""
    folder, done = folded
    tables = []
    for fold in range(1, 7):
        with open(folder / "out" / f"heads-seed0-fold{fold}" / "predictions_test.csv", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    rows = [row for table in tables for row in table]
    assert len(rows) == len({row["file"] for row in rows}) == 64
    del tables[1]
    rows = [row for table in tables for row in table]

    def score(table: list[dict]) -> float:
        return audmetric.concordance_cc(*([float(row[key]) for row in table] for key in ("valence", "valence_label")))

    with open(folder / "out" / "table.csv", newline="", encoding="utf-8") as file:
        record = next(csv.DictReader(file))
    assert (record["method"], record["seeds"], record["folds"]) == ("heads", "1", "5")
    assert float(record["valence_ccc"]) == pytest.approx(score(rows), abs=1e-6)
    assert float(record["valence_mean_of_folds"]) == pytest.approx(np.mean([score(t) for t in tables]), abs=1e-4)
    assert "pooled CCC of valence | mean of the folds' CCC" in done.stdout


def test_a_failed_fold_is_named_and_the_others_stand(folded):
    """All are scored on the folds that every method has finished, which the table says."""
    folder, done = folded
    assert done.returncode == 1, done.stderr
    assert "layer seed 0 fold 2 failed (exit code 1)" in done.stdout
    assert "- folds: 6, each the test set once; scored on what every method has finished: 1, 3, 4, 5, 6" in done.stdout
    with open(folder / "out" / "table.csv", newline="", encoding="utf-8") as file:
        heads, other = csv.DictReader(file)
    assert (other["folds"], heads["folds"]) == ("5", "5")
    runs = {
        name: results.pool(
            {f: results.read_run(folder / "out" / f"{name}-seed0-fold{f}") for f in (1, 3, 4, 5, 6)}
        ).result["test"]["valence"]["ccc"]
        for name in ("heads", "layer")
    }
    assert float(other["valence_ccc"]) == pytest.approx(runs["layer"])
    assert float(other["valence_difference"]) == pytest.approx(runs["layer"] - runs["heads"])
    for picture in ("ccc_against_time", "curves", "scatter_valence"):
        assert (folder / "out" / f"{picture}.png").is_file()


def test_one_cache_serves_all_folds_and_nothing_is_computed_twice(folded):
    """Each file stands once in the index of each cache, and no run has built anything."""
    folder, _ = folded
    caches = list((folder / "cache").iterdir())
    assert len(caches) == 2  # means for the head, the input of the last layer
    for cache in caches:
        lines = [line for index in cache.glob("*.index") for line in index.read_text().splitlines()]
        assert len(lines) == 64
    finished = [json.loads(path.read_text()) for path in (folder / "out").glob("*/result.json")]
    assert [result["seconds"]["cache_build"] for result in finished] == [0.0] * 11


def test_the_agreement_of_the_raters_is_a_line(folded):
    """Of the targets that are compared."""
    low, *_, high = sorted(emotale.agreement(folded[0] / "EmoTale")["valence"])
    lines = [line for line in folded[1].stdout.splitlines() if line.startswith("- raters, each against the mean")]
    assert len(lines) == 1
    assert f"({low:.3f} to {high:.3f})" in lines[0]
    assert "dominance" not in lines[0]


def test_the_same_command_runs_only_the_folds_that_are_not_finished(folded, unrendered, monkeypatch):
    """And with nothing in its way the failed one is run."""
    folder, started = folded[0], []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(compare, "logged", lambda arguments, log: started.append(arguments))
    assert main(monkeypatch, "heads.yaml", "layer.yaml", "--folds", "--seeds", "1", "--out", "out") == 1
    train = [words for words in started if words[0] == "train"]
    assert [words[-2:] for words in train] == [['name="layer-seed0-fold2"', "fold=2"]]
    config = load_config(train[0][1], train[0][2:])
    assert (config.fold, config.seed, config.name) == (2, 0, "layer-seed0-fold2")


def test_a_stopped_comparison_goes_on(folded, unrendered, monkeypatch, capsys):
    """Ctrl-C in fold 4: what is finished is in the table, marked, and the message says how to go on."""
    folder, out = folded[0], folded[0] / "stopped"
    monkeypatch.chdir(folder)

    def train(words: list[str], log: Path) -> int:
        if words[0] == "tools.caches":
            return 0
        if words[-1] == "fold=4":
            raise KeyboardInterrupt
        shutil.copytree(folder / "out" / f"heads-seed0-{words[-1].replace('=', '')}", out / log.stem)
        return 0

    monkeypatch.setattr(compare, "logged", train)
    message = main(monkeypatch, "heads.yaml", "--folds", "--seeds", "1", "--out", out)
    assert message == "stopped; the same command continues with what is not finished"
    text = capsys.readouterr().out
    assert "scored on what every method has finished: 1, 2, 3\n" in text
    assert "Not finished: heads seed 0 fold 4, heads seed 0 fold 5, heads seed 0 fold 6." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.yaml"], "--folds: corpus 'demo' has a fixed split and no folds; leave out --folds"),
        (["a.yaml", "corpus=msp-podcast"], "--folds: corpus 'msp-podcast' has a fixed split"),
        (["a.yaml", "corpus=manifest"], "--folds: corpus 'manifest' has a fixed split"),
        (["e.yaml", "fold=3"], "e: fold is 3, but --folds runs every fold; leave out one of the two"),
        (["e.yaml", "--sweep", "fold=1,2"], "e-fold=1: fold is 1, but --folds runs every fold"),
        (["e.yaml", "fold=all"], "fold: expected one number, found 'all'; for all: python compare.py CONFIG --folds"),
        (["e.yaml", "b.yaml"], "b: corpus is 'iemocap', that of e 'emotale'; compare on one test set"),
        (["e.yaml", "t.yaml"], "t: targets is ['valence'], that of e ('activation', 'valence')"),
        (["e.yaml", "corpus=emotal"], "corpus: 'emotal' is unknown"),
    ],
)
def test_folds_that_cannot_be_run_are_one_message(configs, monkeypatch, arguments, message):
    """Before anything runs."""
    e = {"corpus": "emotale", "data_root": "."}
    configs(a={}, e=e, b={**e, "corpus": "iemocap"}, t={**e, "targets": ["valence"]})
    said = command_line(monkeypatch, *arguments, "--folds")
    assert said.startswith("error: ")
    assert said.count(message) == 1
    assert not Path("runs").exists()


# ---------------------------------------------------------------- what is compared


def test_methods_are_configs_times_the_values_of_every_sweep(configs):
    """Values are YAML, so lists and null work; names are fit for directories."""
    paths, wrong = configs(a={"trainable_layers": 1}, b={"lora_rank": 4}), []
    sweeps = ["lr=1e-3,0.5", "micro_batch_size=null,4"]
    methods = compare.make_methods(paths, ["epochs=7"], sweeps, wrong)
    assert wrong == []
    assert [name.split("-", 1) for name in methods if name.startswith("a")] == [
        ["a", "lr=1e-3-micro_batch_size=null"],
        ["a", "lr=1e-3-micro_batch_size=4"],
        ["a", "lr=0.5-micro_batch_size=null"],
        ["a", "lr=0.5-micro_batch_size=4"],
    ]
    config = methods["b-lr=1e-3-micro_batch_size=4"]
    assert (config.lr, config.micro_batch_size, config.lora_rank, config.epochs) == (1e-3, 4, 4, 7)
    layers = compare.make_methods(paths[:1], [], ["trainable_layers=all,[0, 2],1"], wrong)
    assert list(layers) == ["a-trainable_layers=all", "a-trainable_layers=0_2", "a-trainable_layers=1"]
    folder = compare.make_methods(paths[:1], [], ['cache_dir="C:\\\\x: *?"'], wrong)
    assert list(folder) == ["a-cache_dir=C_x"]


def test_a_backbone_for_all_leaves_the_baseline_without_one_as_it_is(configs):
    """It would be called logmel and be something else."""
    paths = configs(a={}, logmel={"backbone": "logmel"})
    methods = compare.make_methods(paths, ["backbone=mine", "epochs=2"], [], [])
    assert [(config.backbone, config.epochs) for config in methods.values()] == [("mine", 2), ("logmel", 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.yaml", "a.yaml"], "a.yaml: a second method is called a; rename the file"),
        (["a.yaml", "A/a.yaml"], "no such config"),
        (["a.yaml", "same.yaml"], "same and a are the same configuration; leave one out"),
        (["a.yaml", "--sweep", "lr=1,1"], "a second method is called a-lr=1"),
        (
            ["a.yaml", "--sweep", "lr"],
            "--sweep: expected key=value,value,..., as in trainable_layers=0,1,2; found 'lr'",
        ),
        (["a.yaml", "--sweep", "lr=[1"], "--sweep: expected key=value,value"),
        (["a.yaml", "--sweep", "lrr=1,2"], "unknown key 'lrr', did you mean 'lr'?"),
        (["a.yaml", "--sweep", "lr=1,2", "lr=3"], "lr: is given more than once"),
        (["a.yaml", "seed=1"], "seed: is set by compare.py; give it as --seeds"),
        (["a.yaml", "--sweep", "name=x,y"], "name: is set by compare.py; give it as the name of the YAML file"),
        (["a.yaml", "epochs=0"], "epochs: expected at least 1, found 0"),
        (["epochs=1"], "expected at least one config"),
        (["a.yaml", "other.yaml"], "other: targets is ['valence'], that of a ('activation', 'valence')"),
        (["a.yaml", "corpus=manifest", "manifest=no.csv", "label_range=[1,7]"], "no such manifest"),
    ],
)
def test_bad_input_is_said_before_anything_runs(configs, monkeypatch, arguments, message):
    """One error, and not a file is written."""
    configs(a={}, same={"seed": 3}, other={"targets": ["valence"]})
    monkeypatch.setattr(subprocess, "run", None)
    said = command_line(monkeypatch, *arguments)
    assert said.startswith("error: ")
    assert message in said
    assert not Path("runs").exists()


def test_all_that_is_wrong_is_said_at_once(configs, monkeypatch):
    """Each config with its own; the same manifest under two names is no difference."""
    Path("m.csv").write_text("")
    corpus = {"corpus": "manifest", "label_range": [1, 7]}
    paths = configs(
        a={**corpus, "manifest": "m.csv"},
        b={**corpus, "manifest": os.path.abspath("m.csv"), "lr": 1.0},
        c={**corpus, "manifest": "n.csv", "allow_speaker_overlap": True},
        d={"lr": "fast"},
    )
    lines = command_line(monkeypatch, *paths).splitlines()
    assert lines[0] == "error: nothing was run:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["d.yaml", "c", "c"]
    assert "manifest" in lines[2]
    assert "allow_speaker_overlap is True, that of a False" in lines[3]


def test_fewer_than_one_seed_is_refused(configs, monkeypatch, capsys):
    """By the parser, as any number of no use."""
    assert command_line(monkeypatch, *configs(a={}), "--seeds", "0") == 2
    assert "--seeds: expected at least 1, found 0" in capsys.readouterr().err


# ---------------------------------------------------------------- running


def test_caches_are_filled_by_one_command_and_what_they_cost_is_kept(configs, monkeypatch, tmp_path):
    """Only for methods that have runs to go. A cache found complete was built once, and that is what it cost."""
    methods = compare.make_methods(
        configs(a={"cache": True}, b={}, c={"cache": True, "trainable_layers": 1}), [], [], []
    )
    report, commands, jobs = tmp_path / "builds.json", [], compare.make_jobs(tmp_path, methods, range(2))
    answers = iter([{"a": (3.0, 10), "c": (4.0, 20)}, {"c": (None, 20)}])

    def build(arguments: list[str], log: Path) -> int:
        commands.append([Path(word).stem for word in arguments[2:-2]])
        assert arguments[-2:] == ["--report", str(report)]
        answer = {
            str(compare.config_path(compare.Job(tmp_path, name, 0))): cost for name, cost in next(answers).items()
        }
        report.write_text(json.dumps({key: {"seconds": s, "bytes": b} for key, (s, b) in answer.items()}))
        return 0

    monkeypatch.setattr(compare, "logged", build)
    compare.build_caches(methods, jobs)
    for seed in range(2):
        fabricate(tmp_path, "a", seed, cache=True)
    compare.build_caches(methods, jobs)
    assert commands == [["a", "c"], ["c"]]
    kept = {Path(key).stem: build["seconds"] for key, build in json.loads(report.read_text()).items()}
    assert kept == {"a": 3.0, "c": 4.0}
    for seed in range(2):
        fabricate(tmp_path, "c", seed, cache=True)
    compare.build_caches(methods, jobs)
    assert len(commands) == 2


def test_control_c_leaves_the_table_of_what_is_finished(configs, unrendered, monkeypatch, capsys, tmp_path):
    """The second run is stopped; the first is in the table, and the message says how to go on."""
    paths = configs(a={}, b={"trainable_layers": 1})
    monkeypatch.setattr(run, "load_utterances", lambda config: ([], (1, 7)))

    def train(arguments: list[str], log: Path) -> int:
        if log.stem == "b-seed0":
            raise KeyboardInterrupt
        fabricate(tmp_path / "out", "a", 0)
        return 0

    monkeypatch.setattr(compare, "logged", train)
    message = main(monkeypatch, *paths, "--out", tmp_path / "out", "--seeds", "1")
    assert message == "stopped; the same command continues with what is not finished"
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| a      | 0.500" in table
    assert "Not finished: b seed 0." in table
    assert table.startswith(run.DEMO_NOTE)
    assert table.strip() in capsys.readouterr().out


def test_a_run_is_a_command_that_anyone_could_give(configs, monkeypatch, tmp_path):
    """train.py with the method's configuration; every word of it is YAML, whatever the folder is called."""
    out, commands = tmp_path / 'a "folder": #1', []
    methods = compare.make_methods(configs(a={"lr": 0.5, "seed": 9}), [], [], [])
    monkeypatch.setattr(compare, "logged", lambda arguments, log: commands.append(arguments))
    assert not compare.run_all(methods, compare.make_jobs(out, methods, range(2)))
    config = load_config(commands[1][1], commands[1][2:])
    assert commands[1][0] == "train"
    assert (config.name, config.seed, config.lr, config.output_dir) == ("a-seed1", 1, 0.5, str(out))


# ---------------------------------------------------------------- showing


def test_every_form_of_a_demo_table_says_that_it_is_one(configs, monkeypatch, tmp_path, capsys):
    """Markdown, terminal, CSV in each row, and what the pictures are given."""
    paths, notes = configs(a={}, b={"trainable_layers": 1}), []
    for name, keys in (("a", {}), ("b", {"trainable_layers": 1})):
        fabricate(tmp_path / "out", name, 0, **keys)
    functions = dict.fromkeys(("cost", "curves", "depth", "scatter"), lambda *given: notes.append(given[-2]))
    monkeypatch.setitem(sys.modules, "report.plots", types.SimpleNamespace(**functions))
    monkeypatch.setattr(report, "plots", sys.modules["report.plots"], raising=False)
    assert main(monkeypatch, *paths, "--out", tmp_path / "out", "--table", "--seeds", "1") == 0
    assert notes == [run.DEMO_NOTE] * 6  # time, memory, curves, depth, and a scatter for each target
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8").startswith(run.DEMO_NOTE)
    assert run.DEMO_NOTE in capsys.readouterr().out
    with open(tmp_path / "out" / "table.csv", newline="", encoding="utf-8") as file:
        assert [row["note"] for row in csv.DictReader(file)] == [run.DEMO_NOTE] * 2


def test_pictures_are_given_the_figures_of_the_table(configs, monkeypatch, tmp_path):
    """NaN for a missing seed; costs with one build; curves that begin after it; depths of whole layers alone."""
    methods = {"a": {}, "b": {"trainable_layers": 2, "cache": True}, "c": {"lora_rank": 4}, "d": {"head_width": 9}}
    paths, given, out = configs(**methods), {}, tmp_path / "out"
    for name, seeds in {"a": (0, 1), "b": (1,), "c": (0,)}.items():
        for seed in seeds:
            fabricate(out, name, seed, 0.1 + seed, total=100.0, **methods[name])
    key = str(compare.config_path(compare.Job(out, "b", 0)))
    (out / "builds.json").write_text(json.dumps({key: {"seconds": 7.0, "bytes": 1}}))
    names = ("cost", "curves", "depth", "scatter")
    functions = dict.fromkeys(names, lambda *values: given.update({values[-1].name: values}))
    monkeypatch.setitem(sys.modules, "report.plots", types.SimpleNamespace(**functions))
    monkeypatch.setattr(report, "plots", sys.modules["report.plots"], raising=False)
    assert main(monkeypatch, *paths, "--out", out, "--table", "--seeds", "2") == 0
    names, seconds, scores, targets, label, *_ = given["ccc_against_time"]
    assert (names, list(seconds), tuple(targets)) == (["a", "b", "c"], [100, 107, 100], TARGETS)
    assert label == "training time in s (with the cache)"
    nan = float("nan")
    np.testing.assert_array_equal(scores[:, :, 0], [[0.1, 1.1], [nan, 1.1], [0.1, nan]])
    assert list(given["ccc_against_memory"][1]) == [2, 2, 2]  # GB
    curves = given["curves"][1]
    assert [len(seeds) for seeds in curves] == [2, 1, 1]
    assert [curve[0][0].tolist() for curve in curves] == [[10, 20], [17, 27], [10, 20]]
    np.testing.assert_array_equal(curves[1][0][1], [[0.1, 0.1], [0.2, 0.1]])
    assert given["ccc_against_depth"][0] == [0, 2]
    names, predictions, labels, target, chosen, *_ = given["scatter_valence"]
    assert (target, chosen, len(predictions), labels.shape) == ("valence", [0.1, 1.1, 0.1], 3, (40,))


def test_all_counts_as_the_number_of_layers(finished, tmp_path):
    """Which the checkpoint tells; LoRA, a list and another backbone are no count."""
    (tmp_path / "full-seed0").mkdir()
    config = load_config(finished[0] / "heads.yaml", ["cache=false", "trainable_layers=all"])
    model, identity = run.build_model(config, (1, 7))
    hardware.save(tmp_path / "full-seed0" / "best.pt", {"trained": trained_state(model), "backbone": identity})
    methods = {"full": config}
    assert compare.trained_layers(config, tmp_path / "full-seed0", methods) == 3
    for words, expected in {"trainable_layers=2": 2, "trainable_layers=[0, 2]": None, "lora_rank=4": None}.items():
        other = load_config(finished[0] / "heads.yaml", ["cache=false", words])
        assert compare.trained_layers(other, tmp_path, methods) == expected
    other = load_config(finished[0] / "heads.yaml", ["backbone=other"])
    assert compare.trained_layers(other, tmp_path, methods) is None


def test_without_matplotlib_there_is_a_table(configs, monkeypatch, tmp_path, capsys):
    """And one line that says how to get pictures."""
    fabricate(tmp_path / "out", "a", 0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    forget_plots(monkeypatch)
    assert main(monkeypatch, *configs(a={}), "--out", tmp_path / "out", "--table", "--seeds", "1") == 0
    assert capsys.readouterr().out.endswith("no pictures: pip install matplotlib\n")
