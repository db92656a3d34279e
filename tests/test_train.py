"""What `train.py` promises: a run that is whole whatever stops it, and a step that computes what it says."""

import csv
import errno
import io
import json
import math
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import speech_like, tiny_settings
from processes import python
from torch import Tensor
from tqdm import tqdm

import data
import freeze
import metrics
import run
import train
from config import Config, load_config
from lora import LoRALinear
from machine import hardware
from model import EmotionModel, FeatureEncoder, Layer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
STEPS = 12 // 4  # an epoch: utterances of `tiny_manifest`, and of a batch
METHODS = {
    "full": {"trainable_layers": "all", "mask_time_prob": 0.2, "layer_drop": 0.1},
    "last 2": {"trainable_layers": 2},
    "LoRA": {"lora_rank": 4, "lora_dropout": 0.1, "lr": 1e-2},
    "heads": {"head_dropout": 0.1},
    "attentive heads": {"pooling": "attentive", "head_width": 0},
    "heads on all layers": {"pooling": "layers", "head_width": 0},
}
WALL_TIME = {"train_seconds", "audio_seconds_per_second", "seconds"}


@pytest.fixture
def settings(tmp_path, tiny_checkpoint, tiny_manifest):
    """A function from keys to the `Config` of a small experiment."""
    return lambda **keys: Config(**tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, **{"name": "a", **keys}))


def directory_of(config: Config) -> Path:
    return Path(config.output_dir) / config.name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_checkpoint, tiny_manifest):
    """A function from keys to the directory of such a run, with a cache of its own; each is trained once."""
    finished: dict[str, Path] = {}

    def directory(**keys) -> Path:
        if (name := str(keys)) not in finished:
            folder = tmp_path_factory.mktemp("uninterrupted")
            train.train(config := Config(**tiny_settings(folder, tiny_checkpoint, tiny_manifest, name="a", **keys)))
            finished[name] = directory_of(config)
        return finished[name]

    return directory


def command_line(monkeypatch, *arguments: object) -> object:
    """`python train.py ...` in this process: what it exits with, None at its end."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


def write_config(folder: Path, **keys) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_log(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def same(one: object, other: object) -> bool:
    """Equality down to the last bit of every tensor."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ---------------------------------------------------------------- one run through the real command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_checkpoint, tiny_manifest):
    """A finished run's directory, the process that made it, and its command line."""
    folder = tmp_path_factory.mktemp("finished")
    keys = tiny_settings(folder, tiny_checkpoint, tiny_manifest, cache=True, cache_dtype="float32", lr=1e-2)
    path = write_config(folder, **keys)
    arguments = [str(path), "lora_rank=4", "epochs=4", "name=done"]
    done = python("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "done", done, arguments


def test_a_run_directory_holds_what_the_design_names(finished):
    """These files and no leftovers; what was printed ends with the result; nothing went to stderr."""
    directory, done, _ = finished
    files = {"config.yaml", "log.jsonl", "result.json", "predictions_test.csv", "best.pt", "last.pt"}
    assert {path.name for path in directory.iterdir()} == files
    assert done.stderr == ""
    assert done.stdout.count("\nepoch ") == 4
    for expected in (
        "train       12 utterances     4 speakers",
        "layers 0 to 2",
        "test CCC  activation",
        str(directory),
    ):
        assert expected in done.stdout
    config = load_config(directory / "config.yaml")
    assert (config.name, config.lora_rank, config.epochs, config.batch_size) == ("done", 4, 4, 4)


def test_the_log_has_an_object_an_epoch(finished):
    """With the keys that other programs rely on; time only moves on."""
    rows = read_log(finished[0])
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    promised = {"epoch", "train_loss", "train_seconds", "dev_ccc_activation", "dev_ccc_valence", "seconds"}
    assert all(promised <= row.keys() for row in rows)
    for row in rows:
        assert row["dev_ccc"] == pytest.approx((row["dev_ccc_activation"] + row["dev_ccc_valence"]) / 2)
        assert 0 < row["train_loss"] < 2
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert 0 < sum(row["train_seconds"] for row in rows) < seconds[-1]


def test_the_result_has_the_promised_keys_and_agrees_with_the_log(finished):
    """Scores by target name, cost, counts, versions and the whole configuration."""
    directory, _, _ = finished
    result, rows = json.loads((directory / "result.json").read_text()), read_log(directory)
    promised = "test seconds epochs best_epoch trainable_parameters total_parameters peak_memory_bytes "
    promised += "audio_seconds_per_second device precision versions config"
    assert set(promised.split()) <= result.keys()
    assert list(result["test"]) == ["activation", "valence"]
    for score in result["test"].values():
        low, high = score["ci95"]
        assert -1 <= low <= high <= 1
        assert -1 <= score["ccc"] <= 1
    assert set(result["seconds"]) == {"total", "cache_build", "per_epoch"}
    assert 0 < result["seconds"]["cache_build"] < result["seconds"]["total"]
    best = max(rows, key=lambda row: row["dev_ccc"])
    assert (result["epochs"], result["best_epoch"], result["dev_ccc"]) == (4, best["epoch"], best["dev_ccc"])
    head = 64 * 256 + 256 + 256 * 2 + 2
    assert result["trainable_parameters"] == head + 3 * 2 * 4 * (64 + 64)  # layers, q and v, rank, in and out
    assert result["config"] == run.plain(load_config(directory / "config.yaml"))
    assert result["versions"]["torch"] == torch.__version__
    assert result["precision"] == "fp32"
    assert result["peak_memory_bytes"] > 1e7


def test_the_result_is_the_ccc_of_the_predictions_and_the_manifests_labels(finished, tiny_manifest):
    """Recomputed from `predictions_test.csv` alone, in the corpus scale, by target name."""
    rows, manifest = read_csv(finished[0] / "predictions_test.csv"), read_csv(tiny_manifest)
    assert list(rows[0]) == ["file", "speaker", "activation", "valence", "activation_label", "valence_label"]
    tested = [row for row in manifest if row["split"] == "test"]
    assert [Path(row["file"]).name for row in rows] == [row["path"] for row in tested]
    assert [row["speaker"] for row in rows] == [row["speaker"] for row in tested]
    result = json.loads((finished[0] / "result.json").read_text())
    for target in ("activation", "valence"):
        labels = [float(row[target]) for row in tested]
        assert [float(row[f"{target}_label"]) for row in rows] == labels
        predictions = torch.tensor([[float(row[target])] for row in rows], dtype=torch.double)
        score = metrics.ccc(predictions, torch.tensor(labels, dtype=torch.double)[:, None]).item()
        assert result["test"][target]["ccc"] == pytest.approx(score, abs=1e-3)


def test_a_run_comes_back_from_disk_with_identical_predictions(finished):
    """The trained head and the LoRA matrices: `predict` of every test file is its row, to 1e-3 in the corpus scale."""
    directory, _, _ = finished
    model = run.load_run(directory)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    for row in read_csv(directory / "predictions_test.csv"):
        waveform, rate = soundfile.read(row["file"], dtype="float32")
        predicted = model.predict(torch.from_numpy(waveform), rate)
        assert list(predicted) == ["activation", "valence"]
        assert predicted == pytest.approx({target: float(row[target]) for target in predicted}, abs=1e-3)


def test_checkpoints_hold_what_trained_and_nothing_that_runs(finished, tiny_checkpoint):
    """LoRA and head, a fraction of the backbone's size, read with `weights_only`; B is no longer zero."""
    directory, _, _ = finished
    for name in ("best.pt", "last.pt"):
        content = torch.load(directory / name, weights_only=True)
        assert content["backbone"] == {"source": str(tiny_checkpoint), "sha256": content["backbone"]["sha256"]}
        parts = {key.rsplit(".", 1)[-1] if key.startswith("backbone.") else "head" for key in content["trained"]}
        assert parts == {"A", "B", "head"}
        updates = [value for key, value in content["trained"].items() if key.endswith(".B")]
        assert len(updates) == 6
        assert all(update.abs().max() > 0 for update in updates)
    result = json.loads((directory / "result.json").read_text())
    assert (directory / "best.pt").stat().st_size < 4 * result["trainable_parameters"] + 20_000
    assert torch.load(directory / "best.pt", weights_only=True)["epoch"] == result["best_epoch"]


def test_the_same_command_again_reports_the_finished_run(finished, monkeypatch, capsys):
    """The same report, no file touched, no model built."""
    directory, done, arguments = finished
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}
    monkeypatch.setattr(run, "build_model", lambda *_: pytest.fail("a finished run builds no model"))
    assert command_line(monkeypatch, *arguments) is None
    printed = capsys.readouterr().out
    assert printed.startswith("test CCC")
    assert done.stdout.endswith(printed)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()} == before


def test_another_configuration_in_the_same_directory_is_an_error(finished, monkeypatch):
    """It names the keys and both values, and leaves the run as it is."""
    directory, _, arguments = finished
    before = {path: path.read_bytes() for path in directory.iterdir()}
    code = command_line(monkeypatch, *arguments, "lora_rank=8", "seed=1")
    assert code == (f"error: {directory} holds another run (seed 0, now 1; lora_rank 4, now 8); choose another name=")
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


# ---------------------------------------------------------------- stopped and continued


def stop(monkeypatch, call: int, config: Config) -> None:
    """Run `config` until it is interrupted in the step with this number."""
    real, calls = run.step, []

    def step(*arguments, **how):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "step", step)
        train.train(config)


def assert_same_run(one: Path, other: Path) -> None:
    """Everything but wall time is equal: checkpoints with every state, log, predictions, scores."""
    for name in ("best.pt", "last.pt"):
        first, second = (torch.load(path / name, weights_only=True) for path in (one, other))
        for key in first.keys() - {"state", "config"}:
            assert same(first[key], second[key]), (name, key)
    logs = [[{k: v for k, v in row.items() if k not in WALL_TIME} for row in read_log(path)] for path in (one, other)]
    assert logs[0] == logs[1]
    assert (one / "predictions_test.csv").read_bytes() == (other / "predictions_test.csv").read_bytes()
    results = [json.loads((path / "result.json").read_text()) for path in (one, other)]
    for key in ("test", "epochs", "best_epoch", "dev_ccc", "trainable_parameters", "total_parameters"):
        assert results[0][key] == results[1][key]


RESUMED = {
    "uncached": METHODS["full"],
    "cached": {**METHODS["last 2"], "cache": True},
    "LoRA, cached": {**METHODS["LoRA"], "cache": True},
    "heads, cached": {**METHODS["heads"], "cache": True},
    "attentive heads, cached": {**METHODS["attentive heads"], "cache": True},
    "fp16": {**METHODS["LoRA"], "precision": "fp16", "micro_batch_size": 2},
}


@pytest.mark.parametrize("keys", RESUMED.values(), ids=RESUMED)
def test_a_run_stopped_twice_is_the_run_that_was_not(settings, tmp_path, monkeypatch, keys):
    """In the middle of the first and of the third epoch of four: every tensor, the log and the scores are equal."""
    whole, parts = (
        settings(name=name, cache_dir=str(tmp_path / name), epochs=4, patience=4, **keys) for name in ("one", "two")
    )
    train.train(whole)
    stop(monkeypatch, 2, parts)
    assert not (directory_of(parts) / "last.pt").exists()
    stop(monkeypatch, 2 * STEPS + 2, parts)
    assert [row["epoch"] for row in read_log(directory_of(parts))] == [1, 2]
    train.train(parts)
    assert_same_run(directory_of(whole), directory_of(parts))


KILLED = """
import os, signal, sys
import torch
import train

torch.set_num_threads(1)
real, seen = os.replace, []

def replace(source, target):
    seen.append(os.path.basename(target))
    if seen.count("last.pt") == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)

os.replace = replace
train.main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no such signal")
def test_a_run_killed_while_it_saves_continues_as_if_it_had_not_been(settings, tmp_path, monkeypatch, capsys):
    """SIGKILL with the second epoch's last.pt written and not yet in place; what was left behind is cleared away."""
    keys = {**METHODS["LoRA"], "cache": True}
    whole, killed = (settings(name=name, cache_dir=str(tmp_path / name), **keys) for name in ("one", "two"))
    path = write_config(tmp_path, **run.plain(killed))
    (tmp_path / "killed.py").write_text(KILLED)
    done = python(tmp_path / "killed.py", path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    directory = directory_of(killed)
    assert torch.load(directory / "last.pt", weights_only=True)["state"]["epoch"] == 1
    assert len(list(directory.glob(".last.pt.*.tmp"))) == 1
    assert command_line(monkeypatch, path) is None
    assert "resuming after epoch 1 and 0 steps of the next\n" in capsys.readouterr().out
    assert not list(directory.glob(".*"))
    train.train(whole)
    assert_same_run(directory_of(whole), directory)


def test_an_interrupt_ends_with_what_to_do_and_no_traceback(settings, tmp_path, monkeypatch):
    """Ctrl-C is not an error of the program."""
    path = write_config(tmp_path, **run.plain(settings()))
    wrapped = RuntimeError("Error calling __set_name__ on a class that was being imported")
    wrapped.__cause__ = KeyboardInterrupt()  # as Python until 3.11 does
    for interrupt in (KeyboardInterrupt(), wrapped):
        monkeypatch.setattr(data, "check_audio", lambda _, error=interrupt: (_ for _ in ()).throw(error))
        assert command_line(monkeypatch, path) == "\nstopped; the same command continues from what was last saved"
    monkeypatch.setattr(data, "check_audio", lambda _: (_ for _ in ()).throw(RuntimeError("a fault of the program")))
    with pytest.raises(RuntimeError, match="a fault of the program"):
        command_line(monkeypatch, path)


STOPPED = {  # moments: a function of train.py that a run calls between its signals, and the number of the call
    "in the first step": ("step", 1),
    "in mid-epoch": ("step", STEPS + 2),
    "in the last step of an epoch": ("step", 2 * STEPS),
    "while it evaluates": ("evaluate", 2),
    "while it saves": ("trained_state", 3),
}


@pytest.mark.parametrize("name", [number.name for number in hardware.STOP_SIGNALS])
@pytest.mark.parametrize("moment", STOPPED.values(), ids=STOPPED)
def test_a_signal_lets_the_step_end_and_the_run_goes_on_from_there(settings, uninterrupted, monkeypatch, name, moment):
    """Ctrl-C and SIGTERM: no step is lost or repeated, and the whole is bit by bit the run that was not stopped."""
    keys = {**METHODS["LoRA"], "precision": "fp16", "cache": True, "epochs": 4, "patience": 4}
    whole, parts = uninterrupted(**keys), settings(**keys)
    home = run if hasattr(run, moment[0]) else train
    steps, calls, real_step, real = [], [], run.step, getattr(home, moment[0])

    def step(*arguments, **how):
        steps.append(None)
        return real_step(*arguments, **how)

    def signalled(*arguments, **how):
        calls.append(None)
        if len(calls) == moment[1]:
            signal.raise_signal(signal.Signals[name])
        return (step if moment[0] == "step" else real)(*arguments, **how)

    before = [signal.getsignal(number) for number in hardware.STOP_SIGNALS]
    monkeypatch.setattr(run, "step", step)
    monkeypatch.setattr(home, moment[0], signalled)
    with pytest.raises(hardware.Stopped):
        train.train(parts)
    assert [signal.getsignal(number) for number in hardware.STOP_SIGNALS] == before
    taken = len(steps)
    state = torch.load(directory_of(parts) / "last.pt", weights_only=True)["state"]
    assert STEPS * state["epoch"] + len(state["losses"]) == taken < 4 * STEPS
    train.train(parts)
    assert len(steps) == 4 * STEPS
    assert_same_run(whole, directory_of(parts))


def test_a_second_signal_does_not_wait_and_what_was_saved_stays(settings, uninterrupted, monkeypatch):
    """More than a second later. In the middle of a step nothing can be saved: the last finished epoch counts."""
    real, calls = run.step, []

    def step(*arguments, **how):
        calls.append(None)
        if len(calls) == STEPS + 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # at once: torchrun repeats it
            time.sleep(1.1)
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **how)

    whole, parts = uninterrupted(), settings()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(run, "step", step)
        train.train(parts)
    assert not isinstance(caught.value, hardware.Stopped)
    state = torch.load(directory_of(parts) / "last.pt", weights_only=True)["state"]
    assert (state["epoch"], state["losses"]) == (1, [])
    train.train(parts)
    assert_same_run(whole, directory_of(parts))


def test_a_signal_that_is_repeated_at_once_is_one():
    """torchrun repeats a Ctrl-C to its processes: they save all the same."""
    with pytest.raises(hardware.Stopped), hardware.watched_signals() as watch:
        for number in watch(range(3)):
            assert number == 0
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


def test_a_signal_while_the_best_model_is_tested_leaves_the_last_save_alone(settings, monkeypatch):
    """The model then holds the best epoch's parameters, which belong to no optimizer state of the last epoch."""
    whole, parts = settings(name="one"), settings(name="two")
    script(monkeypatch, 0.5, 0.2, 0.1)
    train.train(whole)
    script(monkeypatch, 0.5, 0.2, 0.1)
    real, calls = run.evaluate, []

    def evaluate(*arguments):
        calls.append(None)
        if len(calls) == 4:  # after three epochs
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(hardware.Stopped):
        patch.setattr(run, "evaluate", evaluate)
        train.train(parts)
    saved, best = (torch.load(directory_of(parts) / name, weights_only=True) for name in ("last.pt", "best.pt"))
    assert not same(saved["trained"], best["trained"])
    train.train(parts)
    assert_same_run(directory_of(whole), directory_of(parts))


def test_a_signal_ends_the_command_with_a_message(settings, tmp_path, monkeypatch, capsys):
    """SIGTERM before the first step and in one: a status that is not 0, no traceback; then the command continues."""
    path = write_config(tmp_path, **run.plain(settings()))
    before = {number: signal.getsignal(number) for number in hardware.STOP_SIGNALS}
    ends = []
    for function in ("describe_corpus", "set_rates"):  # called before the loop, and in it
        real = getattr(run, function)
        monkeypatch.setattr(run, function, lambda *given, real=real: (signal.raise_signal(15), real(*given))[1])
        monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
        with pytest.raises(SystemExit) as end:
            train.main()
        monkeypatch.setattr(run, function, real)
        ends.append(end.value.code)
    assert ends == [
        "\nstopped; the same command continues from what was last saved",
        "\nstopped and saved after the last step; the same command continues there",
    ]
    capsys.readouterr()
    assert command_line(monkeypatch, path) is None
    assert "resuming after epoch 0 and 1 steps of the next\n" in capsys.readouterr().out
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_killed_between_its_last_epoch_and_the_test_is_tested(settings, monkeypatch):
    """All epochs are done and logged: no step is taken again."""
    config = settings()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "write_predictions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train.train(config)
    assert len(read_log(directory_of(config))) == 3
    monkeypatch.setattr(run, "step", lambda *_: pytest.fail("nothing is left to train"))
    assert train.train(config)["epochs"] == 3


def test_a_run_does_not_continue_on_another_backbone(settings, tmp_path, tiny_checkpoint, monkeypatch):
    """What trained belongs to the weights below it: others under the same name are refused."""
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_checkpoint, backbone)
    config = settings(backbone=str(backbone), lora_rank=2)
    stop(monkeypatch, STEPS + 1, config)
    content = bytearray((backbone / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (backbone / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt: was trained on other weights of .*backbone than are found now"):
        train.train(config)


CHANGES = {
    "label": lambda lines: [*lines[:-1], lines[-1].rpartition(",")[0] + ",1.5"],
    "utterance": lambda lines: lines[:-1],
    "split": lambda lines: [*lines[:-1], lines[-1].replace(",test,", ",dev,").replace(",test-", ",dev-")],
    "order": lambda lines: [lines[0], *reversed(lines[1:])],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_run_does_not_continue_on_another_corpus(settings, tmp_path, tiny_manifest, monkeypatch, change):
    """Batches and development scores would be of something else; the same files elsewhere are the same corpus."""
    manifest = Path(shutil.copytree(tiny_manifest.parent, tmp_path / "corpus")) / "manifest.csv"
    config = settings(manifest=str(manifest), epochs=2)
    stop(monkeypatch, STEPS + 1, config)
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(ValueError, match=r"last\.pt: was trained on other utterances, labels or lengths than the"):
        train.train(config)
    (manifest.parent / "moved").mkdir()
    for path in manifest.parent.glob("*.wav"):
        path.rename(manifest.parent / "moved" / path.name)
    manifest.write_text("\n".join([lines[0], *("moved/" + line for line in lines[1:])]) + "\n")
    assert train.train(config)["epochs"] == 2


def test_a_run_does_not_continue_in_another_precision(settings, monkeypatch):
    """`precision: auto` is bf16 on one GPU and fp16 on another."""
    config, real = settings(epochs=2), hardware.pick_precision
    stop(monkeypatch, STEPS + 1, config)
    monkeypatch.setattr(hardware, "pick_precision", lambda *_: "bf16")
    with pytest.raises(ValueError, match=r"last\.pt: was trained in fp32, but this device takes bf16; go on with"):
        train.train(config)
    monkeypatch.setattr(hardware, "pick_precision", real)
    assert train.train(config)["epochs"] == 2


# ---------------------------------------------------------------- which epoch counts


def script(monkeypatch, *scores: float) -> None:
    """Let the development set score these, one an epoch."""
    real, left = train.ccc, list(scores)

    def ccc(prediction: Tensor, target: Tensor) -> Tensor:
        return real(prediction, target) if prediction.shape[1] == 1 else torch.tensor([left.pop(0)] * 2)

    monkeypatch.setattr(train, "ccc", ccc)


def test_best_only_ever_improves_and_the_run_stops_when_it_does_not(settings, monkeypatch):
    """A worse epoch and an equal one leave `best.pt` alone; `patience` epochs without a better one end the run."""
    script(monkeypatch, 0.2, 0.5, 0.3, 0.5, 0.1, 0.9)
    config, real, saved = settings(epochs=10, patience=3), hardware.save, []

    def save(path: Path, value: dict) -> None:
        saved.append((path.name, value["state"]["epoch"] if path.name == "last.pt" else value["epoch"]))
        real(path, value)

    monkeypatch.setattr(hardware, "save", save)
    result = train.train(config)
    assert [epoch for name, epoch in saved if name == "best.next.pt"] == [1, 2]
    assert [epoch for name, epoch in saved if name == "last.pt"] == [1, 2, 3, 4, 5]
    assert (result["epochs"], result["best_epoch"], result["dev_ccc"]) == (5, 2, 0.5)
    directory = directory_of(config)
    best, last = (torch.load(directory / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert best["epoch"] == 2
    assert not same(best["trained"], last["trained"])


def test_the_best_epoch_is_the_one_that_is_tested(settings, monkeypatch):
    """Not the last: a run that ends with its best epoch and one that goes on after it predict the same."""
    script(monkeypatch, 0.5, 0.2, 0.1)
    train.train(settings(name="long", warmup=1000))  # so that both have the same rates
    script(monkeypatch, 0.5)
    train.train(settings(name="short", warmup=1000, epochs=1))
    long, short = (directory_of(settings(name=name)) / "predictions_test.csv" for name in ("long", "short"))
    assert long.read_bytes() == short.read_bytes()


# ---------------------------------------------------------------- one step


def build(settings, **keys) -> EmotionModel:
    """A model as configured; LoRA's B is filled, since A has no gradient while it is zero."""
    model, _ = run.build_model(settings(**keys), (1.0, 7.0))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def take_step(model: EmotionModel, optimizer=None, scaler=None, seed: int = 0, **how) -> tuple[Tensor, Tensor, dict]:
    """One step on nine utterances: loss, predictions, and the gradients that the optimizer got."""
    depth = freeze.prefix_depth(model)
    x, lengths = model.encode([speech_like(1600 + 700 * number, number) for number in range(9)], depth)
    labels = torch.rand(9, 2, generator=torch.Generator().manual_seed(1))
    freeze.train_mode(model, depth)
    optimizer = optimizer or run.make_optimizer(model, 1e-3, 1e-2, 0.01)
    gradients: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def keep(optimizer: torch.optim.Optimizer, *_) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.update({names[id(p)]: p.grad.clone() for p in parameters if p.grad is not None})

    hook = optimizer.register_step_pre_hook(keep)
    torch.manual_seed(seed)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    loss, predictions = run.step(model, x, lengths, labels, depth=depth, optimizer=optimizer, scaler=scaler, **how)
    hook.remove()
    return loss, predictions, gradients


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))


def frozen_state(model: EmotionModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_every_trainable_parameter_gets_a_gradient_and_changes_and_no_frozen_one_does(settings, method):
    """By name, in the first step; and afterwards no gradient is left to add to."""
    keys = {key: value for key, value in METHODS[method].items() if key != "layer_drop"}
    model = build(settings, **keys)
    before, frozen = freeze.trained_state(model), frozen_state(model)
    before = {name: value.clone() for name, value in before.items()}
    _, _, gradients = take_step(model)
    assert gradients.keys() == before.keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert [name for name, value in freeze.trained_state(model).items() if torch.equal(value, before[name])] == []
    assert same(frozen_state(model), frozen)
    assert len(frozen) > 0
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []


@pytest.mark.parametrize("method", ["full", "LoRA", "heads"])
def test_micro_batches_have_the_gradients_of_the_whole_batch(settings, method):
    """CCC is no mean over utterances, and still: loss to 1e-6, every gradient to 1e-5, whatever the cut."""
    keys = {"hidden_dropout": 0.0, **({"trainable_layers": "all"} if method == "full" else {})}
    keys |= {"lora_rank": 4} if method == "LoRA" else {}
    loss, predictions, gradients = take_step(build(settings, **keys), clip=1e9)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2
    for size in (1, 2, 4, 9, 20):
        again = take_step(build(settings, **keys), clip=1e9, micro_batch_size=size)
        assert again[0].item() == pytest.approx(loss.item(), abs=1e-6)
        assert torch.allclose(again[1], predictions, atol=1e-5)
        assert again[2].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(again[2][name], gradient, atol=1e-5, rtol=1e-4), name


def test_a_run_in_micro_batches_is_the_run_without_and_never_holds_more(settings, monkeypatch):
    """Nor the prefix nor the evaluation: encoder and layers see three utterances at once at most, to the end."""
    keys = {"trainable_layers": 2, "hidden_dropout": 0.0, "batch_size": 12, "epochs": 2}
    whole = train.train(settings(name="whole", **keys))
    seen, encode, layer = [], FeatureEncoder.forward, Layer.forward

    def record(function: Callable, count: Callable) -> Callable:
        return lambda self, x, *rest: (seen.append(count(x, *rest)), function(self, x, *rest))[1]

    monkeypatch.setattr(FeatureEncoder, "forward", record(encode, len))
    fillers = 1  # the utterance of zeros that fills up a batch
    monkeypatch.setattr(Layer, "forward", record(layer, lambda x, lengths, *bias: len(lengths) - fillers))
    parts = train.train(settings(name="parts", micro_batch_size=3, **keys))
    assert max(seen) == 3
    for target, score in whole["test"].items():
        assert parts["test"][target]["ccc"] == pytest.approx(score["ccc"], abs=1e-4)


def test_micro_batches_recompute_with_the_same_dropout(settings):
    """The gradient belongs to the loss that was reported, not to another draw: a small step against it lowers it."""
    model = build(settings, trainable_layers=2, hidden_dropout=0.3)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    loss, _, gradients = take_step(model, optimizer, clip=1e9, micro_batch_size=3)
    after, _, _ = take_step(model, torch.optim.SGD(parameters, lr=0), clip=1e9, micro_batch_size=3)
    assert (loss - after).item() == pytest.approx(1e-3 * norm(gradients) ** 2, rel=0.1)


@pytest.mark.parametrize("keys", [{"trainable_layers": "all"}, {"lora_rank": 4}], ids=["full", "LoRA"])
def test_gradient_checkpointing_changes_no_gradient(settings, keys):
    """Dropout included: the same draws are made again."""
    loss, _, gradients = take_step(build(settings, hidden_dropout=0.2, **keys))
    again, _, others = take_step(build(settings, hidden_dropout=0.2, gradient_checkpointing=True, **keys))
    assert torch.equal(loss, again)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], atol=1e-7), name


def test_the_whole_gradient_is_clipped_to_its_norm(settings):
    """All gradients by one factor; those within the norm not at all."""
    _, _, free = take_step(build(settings, trainable_layers=2), clip=1e9)
    _, _, clipped = take_step(build(settings, trainable_layers=2), clip=0.01)
    assert norm(free) > 0.05
    assert norm(clipped) == pytest.approx(0.01, rel=1e-3)
    for name, gradient in free.items():
        assert torch.allclose(clipped[name], gradient * 0.01 / norm(free), rtol=1e-3, atol=1e-9), name
    _, _, loose = take_step(build(settings, trainable_layers=2), clip=2 * norm(free))
    assert same(loose, free)


def test_weight_decay_shrinks_matrices_alone_each_at_its_own_rate(settings):
    """Without a gradient AdamW only decays: by lr times weight_decay, norms and biases not at all."""
    model = build(settings, trainable_layers=1)
    optimizer = run.make_optimizer(model, lr=0.1, head_lr=0.5, weight_decay=0.01)
    before = {name: value.clone() for name, value in freeze.trained_state(model).items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, value in freeze.trained_state(model).items():
        rate = 0.5 if name.startswith("head.") else 0.1
        assert torch.allclose(value, before[name] * (1 - rate * 0.01 * (value.ndim > 1)), rtol=1e-6, atol=0), name


def test_the_rates_rise_over_the_warm_up_and_fall_to_the_end(settings, monkeypatch):
    """Step n of `warmup` steps has n / warmup of lr and of head_lr, across epochs; the steps after it ever less."""
    real, rates = run.step, []

    def step(*arguments, optimizer, **how):
        rates.append({group["lr"] for group in optimizer.param_groups})
        return real(*arguments, optimizer=optimizer, **how)

    monkeypatch.setattr(run, "step", step)
    train.train(settings(trainable_layers=1, warmup=5, lr=1e-3, head_lr=1e-2))
    factors = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [sorted(found) for found in rates] == [pytest.approx([1e-3 * f, 1e-2 * f]) for f in factors]
    rates.clear()
    train.train(settings(name="cold", trainable_layers=1, warmup=0, lr=1e-3, head_lr=1e-2, epochs=1))
    assert [sorted(found) for found in rates] == [pytest.approx([1e-3 * f, 1e-2 * f]) for f in (1, 2 / 3, 1 / 3)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=["bf16", "fp16"])
def test_mixed_precision_is_the_same_step_to_its_rounding(settings, dtype, tolerance):
    """Loss in fp32 and near the fp32 step's; parameters and gradients stay fp32, unscaled."""
    expected, _, reference = take_step(build(settings, trainable_layers=2, hidden_dropout=0.0), clip=1e9)
    model = build(settings, trainable_layers=2, hidden_dropout=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=1024.0)
    loss, _, gradients = take_step(model, scaler=scaler, dtype=dtype, clip=1e9)
    assert loss.dtype == torch.float32
    assert 0 < abs(loss - expected).item() < tolerance
    assert norm({name: gradients[name] - reference[name] for name in reference}) < 4 * tolerance * norm(reference)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_a_step_whose_scaled_gradients_overflow_is_skipped(settings):
    """fp16: nothing changes but the scale, which is halved; the next step counts."""
    model = build(settings, trainable_layers=1)
    optimizer = run.make_optimizer(model, 1e-3, 1e-2, 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-110)
    before = {name: value.clone() for name, value in freeze.trained_state(model).items()}
    loss, _, _ = take_step(model, optimizer, scaler, dtype=torch.float16)
    assert loss.isfinite()
    assert same(freeze.trained_state(model), before)
    assert scaler.get_scale() == 2.0**16
    take_step(model, optimizer, scaler, dtype=torch.float16)
    assert not same(freeze.trained_state(model), before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_mixed_precision_is_near_the_one_in_fp32(settings, precision):
    """From the loss of the first epoch, with a cache of 16 bit, to a scaler's state in the checkpoint."""
    keys = {"trainable_layers": 2, "hidden_dropout": 0.0, "cache": True, "epochs": 2}
    train.train(settings(name="fp32", precision="fp32", **keys))
    config = settings(name="mixed", precision=precision, **keys)
    assert train.train(config)["precision"] == precision
    expected, found = (read_log(directory_of(c))[0]["train_loss"] for c in (settings(name="fp32"), config))
    assert found == pytest.approx(expected, abs=0.03)
    scaler = torch.load(directory_of(config) / "last.pt", weights_only=True)["scaler"]
    assert ("scale" in scaler) == (precision == "fp16")


# ---------------------------------------------------------------- with and without the cache


@pytest.mark.parametrize("method", METHODS)
def test_training_on_the_cache_has_the_losses_of_training_without(settings, method):
    """Stored in fp32, over three epochs: loss to 1e-5, development CCC and test scores to 1e-4."""
    plain, cached = (
        settings(name="plain", **METHODS[method]),
        settings(name="cached", cache=True, cache_dtype="float32", **METHODS[method]),
    )
    results = [train.train(config) for config in (plain, cached)]
    logs = [read_log(directory_of(config)) for config in (plain, cached)]
    for expected, found in zip(*logs, strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-5)
        assert found["dev_ccc"] == pytest.approx(expected["dev_ccc"], abs=1e-4)
    for target in ("activation", "valence"):
        expected, found = (result["test"][target]["ccc"] for result in results)
        assert found == pytest.approx(expected, abs=1e-4)
    assert results[0]["seconds"]["cache_build"] == 0 < results[1]["seconds"]["cache_build"]


@pytest.mark.parametrize("method", METHODS)
def test_with_a_whole_cache_the_prefix_is_not_in_memory_and_no_audio_is_read(settings, monkeypatch, method):
    """After the epoch that fills it, and in another run from the start: all of it is on the meta device."""
    real, gone = run.step, []

    def step(model, *arguments, depth, **how):
        prefix = [p.is_meta for module in model.backbone.before(depth) for p in module.parameters()]
        assert len(set(prefix)) == 1
        assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
        gone.append(prefix[0])
        return real(model, *arguments, depth=depth, **how)

    monkeypatch.setattr(run, "step", step)
    keys = {"cache": True, "epochs": 2, **METHODS[method]}
    train.train(settings(name="fills", **keys))
    assert gone == [False] * STEPS + [True] * STEPS
    gone.clear()
    monkeypatch.setattr(data, "read_audio", lambda path: pytest.fail(f"{path} is in the cache"))
    result = train.train(settings(name="reads", seed=1, **keys))
    assert gone == [True] * 2 * STEPS
    assert result["seconds"]["cache_build"] == 0


def test_training_in_place_leaves_the_checkpoint_file_alone(settings, tiny_checkpoint):
    """Weights are mapped from the file: a step must never reach it."""
    before = (tiny_checkpoint / "model.safetensors").read_bytes()
    train.train(settings(trainable_layers="all", lr=1e-2, epochs=1))
    assert (tiny_checkpoint / "model.safetensors").read_bytes() == before


def test_the_progress_bar_tells_loss_ccc_speed_and_time_left(settings, monkeypatch):
    """On a terminal; the CCC from the second epoch on."""
    shown = io.StringIO()
    monkeypatch.setattr(
        train, "tqdm", lambda **how: tqdm(**{**how, "disable": False, "mininterval": 0, "file": shown, "ncols": 150})
    )
    train.train(settings(epochs=2))
    lines = shown.getvalue().split("\r")
    assert any("epoch 1" in line and "loss 0." in line and "s of audio/s" in line for line in lines)
    assert not any("dev CCC" in line for line in lines if line.startswith("epoch 1"))
    assert any(line.startswith("epoch 2") and "dev CCC" in line and "<00:" in line for line in lines)
    assert f"{2 * STEPS}/{2 * STEPS}" in lines[-1]


# ---------------------------------------------------------------- what goes wrong on the way


@pytest.mark.parametrize(
    "trouble",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/0")],
    ids=["disk full", "PyTorch's own error"],
)
@pytest.mark.parametrize("name", ["best.next.pt", "last.pt"])
def test_a_failing_save_leaves_the_old_checkpoint_whole(settings, tmp_path, monkeypatch, name, trouble):
    """Half written, in the second epoch: one message, no debris, and afterwards the run is as if it had not been."""
    script(monkeypatch, 0.1, 0.2, 0.3)
    whole, config = settings(name="one", lora_rank=2), settings(name="two", lora_rank=2)
    train.train(whole)
    directory, real, saves = directory_of(config), torch.save, []

    def save(value: dict, file: Path) -> None:
        saves.append(name in str(file))
        if saves.count(True) == 2:
            real(value, file)
            os.truncate(file, os.path.getsize(file) // 2)
            raise trouble
        real(value, file)

    script(monkeypatch, 0.1, 0.2)
    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(torch, "save", save)
        train.train(config)
    expected = f"{directory / name}: cannot be written ({trouble}); what was there is unharmed"
    assert str(error.value) == expected + ("; is the disk full?" if isinstance(trouble, RuntimeError) else "")
    assert torch.load(directory / "last.pt", weights_only=True)["state"]["epoch"] == 1
    assert torch.load(directory / "best.pt", weights_only=True)["epoch"] == 1  # the two always belong together
    assert not list(directory.glob(".*"))
    script(monkeypatch, 0.2, 0.3)
    train.train(config)
    assert_same_run(directory_of(whole), directory)


def test_a_full_disk_is_one_message_through_the_command_line(settings, tmp_path, monkeypatch, capsys):
    """Exit status not 0, the file is named, no traceback."""
    path = write_config(tmp_path, **run.plain(settings()))
    monkeypatch.setattr(
        torch, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    code = command_line(monkeypatch, path)
    best = directory_of(settings()) / "best.next.pt"
    assert code.startswith(f"error: {best}: cannot be written ([Errno {errno.ENOSPC}] No space left on device)")
    assert capsys.readouterr().err == ""


DIVERGED = {
    "in mid-epoch": (
        STEPS + 1,
        r"epoch 2, step 2: loss or gradient is not finite, .* set precision: fp32, .*\(4\):\n.*wav",
    ),
    "by the last step of an epoch": (
        2 * STEPS,
        r"epoch 2: dev CCC \[nan, nan\] is not finite, and the epoch is not saved",
    ),
}


@pytest.mark.parametrize(("call", "message"), DIVERGED.values(), ids=DIVERGED)
def test_a_run_that_diverges_says_so_and_keeps_the_epochs_before(settings, monkeypatch, call, message):
    """Also where no loss shows it: the last step of an epoch may ruin the parameters after its loss."""
    real, calls = run.step, []

    def step(model, *arguments, **how):
        calls.append(None)
        loss, predictions = real(model, *arguments, **how)
        if len(calls) == call:
            model.head[-1].weight.data.fill_(math.nan)
        return loss, predictions

    config = settings(trainable_layers=1)
    monkeypatch.setattr(run, "step", step)
    with pytest.raises(ValueError, match=message):
        train.train(config)
    for name in ("best.pt", "last.pt"):
        content = torch.load(directory_of(config) / name, weights_only=True)
        assert all(value.isfinite().all() for value in content["trained"].values())
    assert [row["epoch"] for row in read_log(directory_of(config))] == [1]


def test_a_rate_that_is_too_high_ends_in_one_message(settings, tmp_path, monkeypatch):
    """For real, and before anything is saved."""
    path = write_config(tmp_path, **run.plain(settings(head_lr=1e38, warmup=0)))
    code = command_line(monkeypatch, path)
    assert code.startswith("error: epoch 1, step 2: loss or gradient is not finite, and nothing since the last save")
    assert not (directory_of(settings()) / "last.pt").exists()


# ---------------------------------------------------------------- bad input

BAD_INPUT = {
    "mistyped key": (["epoch=3"], r"experiment\.yaml: unknown key 'epoch', did you mean 'epochs'\?$"),
    "wrong type": (["epochs=many"], r"experiment\.yaml: epochs: expected int, found 'many'$"),
    "no value": (["epochs"], r"epochs: expected key=value, as in seed=1$"),
    "missing manifest": (["manifest=none.csv"], r"none\.csv: no such manifest; check the key `manifest`$"),
    "unknown corpus": (["corpus=manifst"], r"corpus: 'manifst' is unknown, .*did you mean 'manifest'\?$"),
    "no label range": (["label_range=null"], r"label_range: corpus 'manifest' has none .*\nlabel_range: \[1, 7\]"),
    "labels outside": (["label_range=[1,2]"], r"(?s)the corpus cannot be used \(\d+\):\n .*activation is .*outside"),
    "missing target": (["targets=[dominance]"], r"manifest\.csv: no column dominance; found \['path'"),
    "absent device": (["device=cuda:99"], r"device: cuda:99 is not there for PyTorch .*; this machine has .*cpu$"),
    "no device": (["device=gpu"], r"device: 'gpu' is not a device; expected auto, cpu, cuda, cuda:1 or mps$"),
    "LoRA target": (["lora_rank=2", "lora_targets=[q,x]"], r"lora_targets: no x; expected some of q, k, v, o, fc1, "),
    "LoRA layer": (["lora_rank=2", "lora_layers=[7]"], r"lora_layers: no layer 7; expected numbers from 0 to 2$"),
    "layer": (["trainable_layers=4"], r"trainable_layers: the model has 3 layers, found 4$"),
    "both": (
        ["trainable_layers=1", "lora_rank=2", "lora_layers=2"],
        r"lora_layers: layer 2 is in trainable_layers too",
    ),
    "backbone": (["backbone=/no/such/checkpoint"], r"backbone: /no/such/checkpoint is neither a file, a directory nor"),
    "empty backbone": (["backbone=EMPTY"], r"EMPTY: expected model\.safetensors, .*; found nothing$"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_clear_message(settings, tmp_path, monkeypatch, capsys, overrides, message):
    """On the command line: one line that names the key or file and what to do; nothing was trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    keys = run.plain(settings())
    keys |= {"lora_targets": ["q", "v"]}
    code = command_line(monkeypatch, write_config(tmp_path, **keys), *overrides)
    assert isinstance(code, str)  # so the interpreter prints it to stderr and exits with status 1
    assert code.count("error: ") == 1
    assert code.startswith("error: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(code.removeprefix("error: "))
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


def test_a_mistake_can_be_mended_under_the_same_name(settings, tmp_path, monkeypatch):
    """A directory where nothing was trained holds no run yet: it takes the corrected configuration."""
    path = write_config(tmp_path, **run.plain(settings(epochs=1)))
    assert "lora_layers" in command_line(monkeypatch, path, "lora_rank=2", "lora_layers=9")
    assert command_line(monkeypatch, path, "lora_rank=2", "lora_layers=2") is None
    assert load_config(directory_of(settings()) / "config.yaml").lora_layers == 2


def test_every_bad_audio_file_is_listed_in_one_go(settings, tmp_path, tiny_manifest, monkeypatch):
    """Before anything is trained: an empty one, one with NaN, one too short and a missing one, each by name."""
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_manifest.parent, corpus)
    (corpus / "train3.wav").write_bytes(b"")
    soundfile.write(corpus / "dev1.wav", np.full(8000, np.nan, np.float32), 16_000, subtype="FLOAT")
    soundfile.write(corpus / "train5.wav", np.zeros(399), 16_000)
    (corpus / "test0.wav").unlink()
    config = settings(manifest=str(corpus / "manifest.csv"))
    code = command_line(monkeypatch, write_config(tmp_path, **run.plain(config)))
    assert code.startswith("error: bad audio files (4):\n")
    for name, what in (("train3", "empty file"), ("dev1", "holds NaN"), ("train5", "too short"), ("test0", "no such")):
        assert f"\n  {corpus / name}.wav: {what}" in code


def test_a_damaged_checkpoint_of_a_run_is_named(settings, monkeypatch):
    """Cut short, or a file of something else: never a traceback, and never read without `weights_only`."""
    config = settings()
    stop(monkeypatch, STEPS + 1, config)
    path = directory_of(config) / "last.pt"
    content = path.read_bytes()
    for damaged, message in ((content[: len(content) // 2], "is not a whole checkpoint"), (b"", "is not a whole")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"last\.pt: {message}"):
            train.train(config)
    torch.save({"model": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"last\.pt: is no checkpoint of train\.py"):
        train.train(config)


# ---------------------------------------------------------------- without a network


def test_without_a_network_a_real_corpus_is_an_error_that_names_the_ways_out(settings, tmp_path):
    """As a real process: status 1, one message on stderr, no traceback, and no random weights in its place."""
    path = write_config(tmp_path, **run.plain(settings(backbone="facebook/wav2vec2-base")))
    done = python("train.py", path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: backbone: facebook/wav2vec2-base is neither a path here nor in the Hugging Face cache"
    )
    assert line.endswith("give `backbone` a directory or file with the weights, or connect to the network once")
    assert not list(tmp_path.rglob("*.pt"))


def test_without_a_network_the_demo_goes_on_with_the_small_backbone(settings, tmp_path, monkeypatch, capsys):
    """Which the repository holds, and says so; `small` names it from any folder; its state is that of its file."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    found, identity = run.find_backbone(Config(corpus="demo", backbone="facebook/wav2vec2-base"))
    err = capsys.readouterr().err
    assert "note: backbone: facebook/wav2vec2-base is neither a path here" in err
    assert err.endswith("note: the demo goes on with the small backbone of this repository\n")
    assert identity["source"] == "small" and (found.config.width, found.config.layers) == (192, 12)
    named, same_identity = run.find_backbone(Config(corpus="manifest", manifest="a.csv", backbone="small"))
    assert same_identity == identity
    waveform = speech_like(8000)
    for one, other in zip(found.hidden_states([waveform]), named.hidden_states([waveform]), strict=True):
        assert torch.equal(one[0], other[0]) and one[0].isfinite().all()


# ---------------------------------------------------------------- seeds


def test_seeds_differ_in_batches_and_initialisation_and_not_in_data(settings, monkeypatch):
    """Every parameter that is drawn; and the test set has the same utterances, in order, with their labels."""
    seen: dict[int, list] = {0: [], 1: []}
    real = data.batches

    def batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        seen[seed].append(real(count, batch_size, seed, epoch))
        return seen[seed][-1]

    monkeypatch.setattr(data, "batches", batches)
    columns = []
    for seed in seen:
        config = settings(seed=seed, name=f"seed{seed}", lora_rank=2, pooling="attentive", epochs=2)
        train.train(config)
        rows = read_csv(directory_of(config) / "predictions_test.csv")
        columns.append([[row[key] for key in row if key not in config.targets] for row in rows])
    assert columns[0] == columns[1]
    assert all(one != other for one, other in zip(seen[0], seen[1], strict=True))
    assert seen[0][1] != seen[0][2]  # nor are two epochs the same
    models = [run.build_model(settings(seed=seed, lora_rank=2), (1.0, 7.0))[0] for seed in (0, 1, 0)]
    states = [freeze.trained_state(model) for model in models]
    assert same(states[0], states[2])
    drawn = [name for name in states[0] if name.endswith((".A", "weight"))]
    assert len(drawn) == 3 * 2 + 2
    assert [name for name in drawn if torch.equal(states[0][name], states[1][name])] == []


def test_the_result_tells_the_corpus_the_cache_and_the_memory_of_every_process(settings, monkeypatch):
    """What a comparison shows beside the scores; a resumed run remembers the peak of the process before."""
    peaks = iter([3_000_000, 1_000_000, 2_000_000])
    monkeypatch.setattr(hardware, "peak_memory", lambda device: next(peaks))
    result = train.train(settings(cache=True, epochs=2))
    corpus = result["corpus"]
    assert (corpus["name"], corpus["train"]["utterances"], corpus["dev"]["speakers"]) == ("manifest", 12, 2)
    assert 12 * 0.3 / 3600 < corpus["train"]["hours"] < 12 * 0.6 / 3600
    assert result["peak_memory_bytes"] == 3_000_000
    assert result["cache_bytes"] == 20 * 64 * 2  # a row of 64 in fp16 for each utterance
