"""Numbers that are none, and memory that runs out: what a run says, and what is left of it."""

import math
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_settings
from test_train import STEPS, command_line, directory_of, read_log, write_config

import data
import run
import train
from config import Config, load_config
from machine import gpu
from model import EmotionModel, Layer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(tmp_path, tiny_checkpoint, tiny_manifest):
    """A function from keys to the `Config` of a small experiment."""
    return lambda **keys: Config(**tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, **{"name": "a", **keys}))


def files_of_step(config: Config, epoch: int, step: int) -> list[str]:
    """The names of the files in a batch of training."""
    utterances, _ = run.load_utterances(config)
    training = [utterance.path for utterance in utterances if utterance.split == "train"]
    return [training[i] for i in data.batches(len(training), config.batch_size, config.seed, epoch)[step - 1]]


# ---------------------------------------------------------------- not finite


def spoil(monkeypatch, where: str, call: int, value: float) -> None:
    """In the step with this number let predictions or their gradient be `value`."""
    real, calls = EmotionModel.forward, []

    def forward(self, *arguments):
        predictions = real(self, *arguments)
        if self.training:
            calls.append(None)
            if len(calls) == call and where == "predictions":
                predictions = predictions * value
            elif len(calls) == call:
                predictions.register_hook(lambda gradient: gradient * value)
        return predictions

    monkeypatch.setattr(EmotionModel, "forward", forward)


@pytest.mark.parametrize("where", ["predictions", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_names_its_files_and_keeps_the_epoch_before(settings, monkeypatch, where, value):
    """Also where the loss is finite and a gradient is not. The same command goes on, and is the run without a fault."""
    keys = {"lora_rank": 2, "epochs": 2}
    whole, config = settings(name="whole", **keys), settings(**keys)
    train.train(whole)
    with monkeypatch.context() as patch:
        spoil(patch, where, STEPS + 2, value)
        with pytest.raises(ValueError, match="epoch 2, step 2: loss or gradient is not finite") as error:
            train.train(config)
    listed = str(error.value).splitlines()[1:]
    assert [line.strip() for line in listed] == files_of_step(config, 2, 2)
    last = torch.load(directory_of(config) / "last.pt", weights_only=True)
    assert (last["state"]["epoch"], last["state"]["losses"]) == (1, [])
    assert all(value.isfinite().all() for value in last["trained"].values())
    assert train.train(config)["test"] == train.train(whole)["test"]


def test_fp16_passes_over_a_gradient_that_overflows_and_stops_at_a_loss_that_does(settings, monkeypatch):
    """The first is what the scale is there for: the step is left out, the scale halved, the run ends well."""
    config = settings(precision="fp16", lora_rank=2)
    with monkeypatch.context() as patch:
        spoil(patch, "gradient", 2, math.inf)
        assert train.train(config)["epochs"] == 3
    scaler = torch.load(directory_of(config) / "last.pt", weights_only=True)["scaler"]
    assert scaler["scale"] == 2.0**15
    spoil(monkeypatch, "predictions", STEPS, math.inf)
    with pytest.raises(ValueError, match="epoch 1, step 3: loss or gradient is not finite"):
        train.train(settings(name="b", precision="fp16", lora_rank=2))


def test_a_signal_after_a_step_that_was_not_finite_saves_nothing(settings, monkeypatch):
    """On a GPU losses are looked at every twenty steps: what a stop would save is looked at before, as here."""
    config, losses = settings(epochs=2), [torch.tensor(0.5), torch.tensor(math.nan)]
    e = SimpleNamespace(progress=train.Progress(epoch=6, losses=losses), batches=[[0], [1, 2]])
    e.scaler, e.prefix = torch.amp.GradScaler("cpu", enabled=False), SimpleNamespace(paths=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"epoch 7, step 2: .*\(2\):\n  b\n  c$"):
        train.check_losses(e)
    for finite in (losses[:1], []):
        e.progress.losses = finite
        train.check_losses(e)
    checks, real_check, real_step = [], train.check_losses, run.step

    def check(*arguments):
        checks.append(None)
        if len(checks) > 1:  # as if the first step were none of those that are looked at
            real_check(*arguments)

    def step(*arguments, **how):
        signal.raise_signal(signal.SIGINT)
        return real_step(*arguments, **how)[0] * math.nan, None

    monkeypatch.setattr(run, "step", step)
    monkeypatch.setattr(train, "check_losses", check)
    with pytest.raises(ValueError, match="epoch 1, step 1: loss or gradient"):
        train.train(config)
    assert not (directory_of(config) / "last.pt").exists()


def spoil_every_gradient(monkeypatch) -> None:
    """Let the gradient of the head be NaN at every step."""
    real = run.build_model

    def build(*arguments):
        model, identity = real(*arguments)
        model.head[-1].weight.register_hook(lambda gradient: gradient * math.nan)
        return model, identity

    monkeypatch.setattr(run, "build_model", build)


def test_fp16_whose_gradient_is_never_finite_stops_with_the_files_named(settings, monkeypatch):
    """Every step is skipped and the scale halved: below 1 it cannot be the scale's fault."""
    config = settings(precision="fp16", lora_rank=2, epochs=20, patience=20)
    spoil_every_gradient(monkeypatch)
    with pytest.raises(ValueError, match=r"epoch 6, step 2: loss or gradient is not finite.*the files of the batch"):
        train.train(config)


def test_fp16_that_took_no_step_at_all_is_no_result(settings, monkeypatch):
    """Too short for the scale to fall below 1."""
    spoil_every_gradient(monkeypatch)
    with pytest.raises(ValueError, match="no gradient of any step was finite, so nothing has been trained"):
        train.train(settings(precision="fp16", lora_rank=2, epochs=1))


def constant(settings, tmp_path, tiny_manifest, **columns: float) -> Config:
    """A small experiment whose training labels are these constants."""
    lines = tiny_manifest.read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    for row in rows:
        row["path"] = str(tiny_manifest.with_name(row["path"]))
        row.update({key: str(value) for key, value in columns.items() if row["split"] == "train"})
    path = tmp_path / "constant.csv"
    path.write_text("\n".join([lines[0], *(",".join(row.values()) for row in rows)]) + "\n")
    return settings(manifest=str(path))


def test_constant_labels_in_a_batch_pull_to_nowhere_and_break_nothing(settings, tmp_path, tiny_manifest, monkeypatch):
    """CCC of a constant is 0, and its loss 1, whatever is predicted; the other target is learnt as ever."""
    monkeypatch.setattr(data, "check_labels", lambda *_: None)  # a whole split of constant labels is refused
    config = constant(settings, tmp_path, tiny_manifest, valence=4.0)
    result = train.train(config)
    assert all(0.5 < row["train_loss"] < 1.5 for row in read_log(directory_of(config)))
    assert all(math.isfinite(score["ccc"]) for score in result["test"].values())
    config = constant(
        lambda **keys: settings(name="both", **keys), tmp_path, tiny_manifest, valence=4.0, activation=1.0
    )
    train.train(config)
    assert [row["train_loss"] for row in read_log(directory_of(config))] == [1.0, 1.0, 1.0]


def test_constant_predictions_are_learnt_away_from(settings, monkeypatch):
    """A head that says the same of everything scores 0, and has a gradient that is finite and not zero."""
    config, real = settings(epochs=2, head_lr=1e-2), run.build_model

    def build(*arguments):
        model, identity = real(*arguments)
        torch.nn.init.zeros_(model.head[-1].weight)
        return model, identity

    monkeypatch.setattr(run, "build_model", build)
    train.train(config)
    first, second = read_log(directory_of(config))
    assert first["train_loss"] <= 1
    assert second["train_loss"] < first["train_loss"]


def test_one_utterance_is_no_training_set(settings, tmp_path, tiny_manifest):
    """The CCC of one is 0/0: refused before anything is trained."""
    lines = tiny_manifest.read_text().splitlines()
    kept = [lines[0], lines[1], *(line for line in lines[2:] if ",train," not in line)]
    path = tiny_manifest.with_name("one.csv")
    path.write_text("\n".join(kept) + "\n")
    with pytest.raises(ValueError, match="split 'train' has no two different labels of activation"):
        train.train(settings(manifest=str(path)))
    path.unlink()


# ---------------------------------------------------------------- out of memory


def limit(monkeypatch, most: int, error: Exception) -> None:
    """Let layers fail on more utterances than this, as they do on a GPU that is too small."""
    real = Layer.forward

    def forward(self, x, frames, *rest):
        if len(frames) - 1 > most:  # one fills up the batch
            raise error
        return real(self, x, frames, *rest)

    monkeypatch.setattr(Layer, "forward", forward)


SHORT = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails"),
    "Apple": RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB)."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("error", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("layers", [0, 2], ids=["in the prefix", "in what trains"])
def test_out_of_memory_names_smaller_settings_and_the_run_goes_on_with_them(
    settings, tmp_path, monkeypatch, error, layers
):
    """Three fit, batches have twelve: with half, and half of that again, the run is the whole one."""
    keys = {"trainable_layers": layers, "batch_size": 12, "epochs": 2, "hidden_dropout": 0.0}
    whole = settings(name="whole", **keys)
    train.train(whole)
    path = write_config(tmp_path, **run.plain(settings(**keys)))
    with monkeypatch.context() as patch:
        limit(patch, 3, error)
        first, second = command_line(patch, path).splitlines()
        assert first == f"error: {str(error).splitlines()[0]}"
        more = ", or gradient_checkpointing=true" if layers else ""
        same = "the loss stays the same, and the same command continues"
        assert second == f"set micro_batch_size=6 (or half of that again){more}: {same}"
        assert command_line(patch, path, "micro_batch_size=6").splitlines()[1].startswith("set micro_batch_size=3 ")
        assert command_line(patch, path, "micro_batch_size=3") is None
    losses = [[row["train_loss"] for row in read_log(directory_of(config))] for config in (whole, settings())]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("where", ["step", "evaluate", "the test", "the optimizer"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_out_of_memory_anywhere_loses_no_epoch_and_no_advice(settings, monkeypatch, where, precision):
    """In the middle of Adam's first step as well, after which its state is half made."""
    keys = {"trainable_layers": 1, "epochs": 2, "precision": precision}
    config, calls = settings(**keys), []
    train.train(settings(name="whole", **keys))
    home, name, call = {
        "step": (run, "step", STEPS + 1),
        "evaluate": (run, "evaluate", 2),
        "the test": (run, "evaluate", 3),
        "the optimizer": (torch, "zeros_like", 3),
    }[where]
    real = getattr(home, name)

    def short(*arguments, **how):
        calls.append(None)
        if len(calls) == call:
            raise SHORT["GPU"]
        return real(*arguments, **how)

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match=r"set micro_batch_size=2 \(or half"):
        patch.setattr(home, name, short)
        train.train(config)
    assert train.train(config)["test"] == train.train(settings(name="whole", **keys))["test"]


ADVISED = {  # a configuration, and the settings that are left to save memory
    "heads": ({"cache": True, "cache_tier": "disk"}, ["micro_batch_size=8"]),
    "heads, one at a time": ({"micro_batch_size": 1}, []),
    "layers": ({"trainable_layers": 2}, ["micro_batch_size=8", "gradient_checkpointing=true"]),
    "LoRA": ({"lora_rank": 2, "gradient_checkpointing": True, "micro_batch_size": 4}, ["micro_batch_size=2"]),
    "a cache on the GPU": ({"cache": True}, ["micro_batch_size=8", "cache_tier=disk"]),
}


@pytest.mark.parametrize(("keys", "expected"), ADVISED.values(), ids=ADVISED)
def test_advice_on_memory_names_what_the_configuration_takes_and_does_not_have(settings, tmp_path, keys, expected):
    """A setting that is refused, or is there already, helps nobody."""
    config = settings(batch_size=16, **keys)
    advice = gpu.memory_advice(run.plain(config), 1)
    words = re.findall(r"\w+=\w+", advice)
    assert words == expected
    for word in words:
        changed = run.plain(load_config(write_config(tmp_path, **run.plain(config)), [word]))
        assert [key for key, value in run.plain(config).items() if value != changed[key]] == [word.partition("=")[0]]
    assert ("the same command continues" in advice) == bool(words)
    assert words or advice.startswith("one utterance at a time does not fit")


@pytest.mark.parametrize(("micro", "half"), [(None, 4), (12, 4), (4, 2)])
def test_advice_on_memory_counts_what_one_process_holds(settings, micro, half):
    """A micro-batch is a part of the process's share, which two processes have of a batch of sixteen."""
    advice = gpu.memory_advice(run.plain(settings(batch_size=16, micro_batch_size=micro)), 2)
    assert advice.startswith(f"set micro_batch_size={half} (or half of that again): ")


def test_any_other_error_is_not_taken_for_one_of_memory(settings, monkeypatch):
    """Nor is it hidden."""
    limit(monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        train.train(settings(trainable_layers=1))
