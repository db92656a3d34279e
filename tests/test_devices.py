"""Every promise of equality, on the CPU and on whatever accelerator is there: a machine with a GPU tests its GPU.

Tolerances on an accelerator, where sums may be added in another order each time, stand in TOLERANCE.
"""

import json
import socket
from pathlib import Path

import pytest
import torch
from conftest import speech_like, tiny_settings
from processes import python

import run
import train
import weights
from config import Config
from machine import hardware

ROOT = Path(__file__).parents[1]
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4, "mps": 1e-4}
SAMPLES = (400, 7331, 16_000, 719)
METHODS = {
    "full": {"trainable_layers": "all"},
    "last 2": {"trainable_layers": 2},
    "LoRA": {"lora_rank": 4},
    "heads": {"pooling": "mean_std"},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def name_of(device: torch.device) -> str:
    return str(device)


@pytest.fixture
def backbone(tiny_checkpoint, device):
    """The tiny model on the device, fp32 products exact."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return weights.load_backbone(tiny_checkpoint).to(device)


@pytest.fixture
def losses(tmp_path, tiny_checkpoint, tiny_manifest, device):
    """A function that trains on the device and gives the losses of the epochs."""

    def fit(name: str, **keys) -> list[float]:
        keys = {"hidden_dropout": 0.0, "precision": "fp32", **keys}
        settings = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, **keys)
        train.train(Config(**{**settings, "name": name, "device": name_of(device)}))
        lines = (tmp_path / "runs" / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["train_loss"] for line in lines]

    return fit


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, str], list[float]]:
    """By method and device, what `plain` has trained."""
    return {}


@pytest.fixture
def plain(losses, known, device):
    """A function that gives the losses of a method by itself, in fp32 without dropout; each is trained once."""

    def fit(method: str) -> list[float]:
        if (key := (method, name_of(device))) not in known:
            known[key] = losses("plain", **METHODS[method])
        return known[key]

    return fit


def test_every_hidden_state_is_that_of_the_cpu(backbone, tiny_checkpoint, device):
    """And so that of transformers, with which the CPU's are compared elsewhere."""
    waveforms = [speech_like(samples) for samples in SAMPLES]
    expected = weights.load_backbone(tiny_checkpoint).hidden_states(waveforms)
    found = backbone.hidden_states([waveform.to(device) for waveform in waveforms])
    for one, other in zip(expected, found, strict=True):
        for x, y in zip(one, other, strict=True):
            assert torch.allclose(x, y.cpu(), rtol=0, atol=1e-4)


def test_an_utterance_alone_is_the_utterance_in_a_batch(backbone, device):
    waveforms = [speech_like(samples).to(device) for samples in SAMPLES]
    together = backbone.hidden_states(waveforms)
    for i, waveform in enumerate(waveforms):
        for alone, batch in zip(backbone.hidden_states([waveform]), together, strict=True):
            assert torch.allclose(alone[0], batch[i], rtol=0, atol=TOLERANCE[device.type])


@pytest.mark.parametrize("tier", ["disk", "auto"])
@pytest.mark.parametrize("method", METHODS)
def test_cached_training_is_uncached_training(losses, plain, device, method, tier):
    """From the disk, and from the device where a whole cache fits."""
    found = losses("cached", cache=True, cache_dtype="float32", cache_tier=tier, **METHODS[method])
    assert found == pytest.approx(plain(method), abs=TOLERANCE[device.type])


@pytest.mark.parametrize("method", ["full", "last 2", "LoRA"])
@pytest.mark.parametrize(
    "saving", [{"micro_batch_size": 1}, {"gradient_checkpointing": True}], ids=["micro", "checkpoint"]
)
def test_what_saves_memory_does_not_change_the_loss(losses, plain, device, method, saving):
    """Micro-batches and gradient checkpointing, with dropout, whose masks must come back in the recomputation."""
    assert losses("saving", **METHODS[method], **saving) == pytest.approx(plain(method), abs=TOLERANCE[device.type])
    if "gradient_checkpointing" in saving:
        dropped = losses("dropped", **METHODS[method] | {"hidden_dropout": 0.2})
        again = losses("again", **METHODS[method] | {"hidden_dropout": 0.2} | saving)
        assert again == pytest.approx(dropped, abs=TOLERANCE[device.type])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(losses, device, precision, monkeypatch):
    """Bit for bit on a CPU, to the tolerance on an accelerator."""
    keys = {"lora_rank": 4, "hidden_dropout": 0.1, "cache": True, "precision": precision}
    expected = losses("whole", **keys)
    real, calls = run.step, []

    def stop(*arguments, **how):
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "step", stop)
        losses("parts", **keys)
    found = losses("parts", **keys)
    exact = {"abs": 0, "rel": 0} if device.type == "cpu" else {"abs": 100 * TOLERANCE[device.type]}
    assert found == pytest.approx(expected, **exact)


def test_predictions_are_those_of_the_test_and_of_the_cpu(losses, tmp_path, device):
    """`load_run` on the device and on the CPU, and what training wrote."""
    losses("run", trainable_layers=1)
    models = [run.load_run(tmp_path / "runs" / "run", name) for name in (name_of(device), "cpu")]
    waveform = speech_like(8000)
    one, other = (model.predict(waveform, 16_000) for model in models)
    assert one == pytest.approx(other, abs=1e-3)


def test_several_processes_train_as_one(tmp_path, tiny_checkpoint, tiny_manifest, plain, device):
    """Over gloo on the CPU, over NCCL on as many GPUs: the losses of one process."""
    size = 2 if device.type == "cpu" else torch.cuda.device_count() if device.type == "cuda" else 1
    if size < 2:
        pytest.skip("needs two devices")
    expected = plain("last 2")
    settings = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, trainable_layers=2, hidden_dropout=0.0)
    settings |= {"name": "several", "device": device.type, "precision": "fp32"}
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", f"--nproc_per_node={size}", f"--master_port={port}"]
    command += ["train.py", "configs/partial3.yaml", *words]
    ended = python(*command, seconds=240, OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr
    lines = (tmp_path / "runs" / "several" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["train_loss"] for line in lines]
    assert found == pytest.approx(expected, abs=TOLERANCE[device.type])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_is_near_fp32(losses, plain, device, precision):
    """On every device, whatever kernels it has for it: a wrong kernel is off by more than rounding."""
    assert losses("rounded", trainable_layers=2, precision=precision) == pytest.approx(plain("last 2"), abs=0.03)


def test_the_device_that_was_asked_for_is_the_one_in_use(losses, tmp_path, device):
    losses("run", trainable_layers=1, epochs=1)
    result = json.loads((tmp_path / "runs" / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["device"] == hardware.device_name(device)
