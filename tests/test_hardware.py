"""What `machine.hardware` promises: the right device or one clear message, one command a directory, whole files."""

import importlib.util
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_settings
from processes import start

import run
import train
from config import Config
from machine import hardware, parallel

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpus(monkeypatch):
    """A function that pretends GPUs of these compute capabilities, and a PyTorch with code for these architectures."""

    def pretend(*capabilities: tuple[int, int], built: tuple[str, ...] = ("sm_75", "sm_80", "sm_90", "compute_90")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device: capabilities[torch.device(device).index]
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))

    return pretend


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_has_an_index(gpus, name):
    """`set_device` refuses one without, so no command would start on a machine with one GPU."""
    gpus((8, 0))
    assert hardware.pick_device(name) == torch.device("cuda", 0)
    assert hardware.pick_device(name).index == 0


def test_each_process_takes_the_gpu_with_its_number(gpus):
    gpus((8, 0), (8, 0))
    assert [hardware.pick_device("auto", rank).index for rank in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match="device: cuda:2 is not there"):
        hardware.pick_device("auto", 2)


@pytest.mark.parametrize(
    ("capability", "built", "works"),
    [
        ((8, 6), ("sm_80",), True),  # code for 8.0 runs on 8.6
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("sm_80", "compute_80"), True),  # translated
        ((7, 0), ("sm_75", "sm_80"), False),
        ((6, 1), ("sm_75", "compute_90"), False),
    ],
)
def test_a_gpu_without_code_in_this_pytorch_is_named(gpus, capability, built, works):
    gpus(capability, built=built)
    if works:
        assert hardware.pick_device("auto").type == "cuda"
        return
    with pytest.raises(
        ValueError, match=rf"has compute capability {capability[0]}\.{capability[1]}, but PyTorch .*install"
    ):
        hardware.pick_device("auto")


def test_automatic_precision_is_that_of_the_gpu_in_use(gpus):
    """Of an old and a new GPU each has its own; the first is not asked for the second."""
    gpus((7, 0), (8, 0), built=("sm_70", "sm_80"))
    assert [hardware.pick_precision("auto", torch.device("cuda", index)) for index in (0, 1)] == ["fp16", "bf16"]
    assert hardware.pick_precision("auto", torch.device("cpu")) == "fp32"


def test_a_slow_precision_is_allowed_with_a_warning(gpus, capsys):
    gpus((7, 5))
    assert hardware.pick_precision("bf16", torch.device("cuda", 0)) == "bf16"
    assert "only emulates bf16" in capsys.readouterr().err
    assert hardware.pick_precision("fp16", torch.device("cpu")) == "fp16"
    assert "fp16 is slow on most CPUs" in capsys.readouterr().err
    hardware.pick_precision("fp32", torch.device("cpu"))
    assert capsys.readouterr().err == ""


def test_compile_without_a_compiler_is_one_message_at_the_start(gpus, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"compile: found no C\+\+ compiler"):
        hardware.pick_device("cpu", compiled=True)
    gpus((8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="compile: found no Triton"):
        hardware.pick_device("cuda", compiled=True)


def test_a_run_with_a_cache_on_the_gpu_is_refused_on_a_cpu(tmp_path, tiny_checkpoint, tiny_manifest):
    keys = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, name="a", cache=True, cache_tier="gpu")
    with pytest.raises(ValueError, match="cache_tier: found gpu, but the device is the CPU; expected auto or disk"):
        train.train(Config(**keys))
    assert not (tmp_path / "cache").exists()


def test_processes_start_without_nccl(monkeypatch):
    """No build for Windows has it: gloo serves `device=cpu` there."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(parallel.dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(parallel.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(parallel.dist, "init_process_group", asked.append)
    parallel.start()
    assert asked == ["gloo"]


# ---------------------------------------------------------------- one command a directory


HOLD = """
import sys, time
from pathlib import Path
from machine import hardware
with hardware.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_command_is_refused_and_a_killed_one_does_not_block(tmp_path, tiny_checkpoint, tiny_manifest):
    """The message names the process and host of the first; the lock of a killed process is gone with it."""
    config = Config(**tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, name="a", epochs=1))
    directory = tmp_path / "runs" / "a"
    (tmp_path / "hold.py").write_text(HOLD)
    holder, said = start(tmp_path, tmp_path / "hold.py", directory), tmp_path / "stdout"
    try:
        while holder.is_alive() and not (said.exists() and said.read_text() == "held\n"):
            time.sleep(0.01)
        with pytest.raises(ValueError, match=rf"process {holder.pid} on \S+, since .* is at work there"):
            train.train(config)
        assert not (directory / "config.yaml").exists()
    finally:
        holder.kill()
        holder.join()
    assert train.train(config)["epochs"] == 1
    assert train.train(config)["epochs"] == 1  # the lock was given back


def test_the_best_model_always_belongs_to_the_saved_progress(tmp_path, tiny_checkpoint, tiny_manifest, monkeypatch):
    """Killed between the two saves of an epoch, `best.pt` is still the best that `last.pt` knows of."""
    config = Config(**tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, name="a", lora_rank=2))
    directory, real = tmp_path / "runs" / "a", hardware.save
    scores = iter([torch.tensor([0.1, 0.1]), torch.tensor([0.2, 0.2])])
    monkeypatch.setattr(train, "ccc", lambda *_: next(scores))

    def killed(path: Path, value: dict) -> None:
        if path.name == "last.pt" and value["state"]["epoch"] == 2:
            raise KeyboardInterrupt  # the new best has just been written
        real(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hardware, "save", killed)
        train.train(config)
    best, last = (torch.load(directory / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert (best["epoch"], last["state"]["best_epoch"], last["state"]["epoch"]) == (1, 1, 1)
    worse = iter([torch.tensor([0.05, 0.05]), torch.tensor([0.0, 0.0])])  # as a GPU may repeat it: not bit for bit
    monkeypatch.setattr(train, "ccc", lambda *_: next(worse))
    result = train.train(config)
    assert result["best_epoch"] == 1 == torch.load(directory / "best.pt", weights_only=True)["epoch"]
    assert not (directory / run.PENDING).exists()


# ---------------------------------------------------------------- clocks


def test_a_time_too_short_for_the_clock_is_no_division_by_zero():
    assert run.per_second(10.0, 0.0) == 10_000
    assert run.per_second(10.0, 2.0) == 5


def test_a_whole_run_under_a_clock_that_stands_still(tmp_path, tiny_checkpoint, tiny_manifest, monkeypatch):
    """The extreme of a coarse one: every measured time is zero."""
    for name in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(time, name, lambda: 1e9)
    keys = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, name="a", cache=True)
    result = train.train(Config(**keys))
    assert result["seconds"]["total"] == 0 and result["audio_seconds_per_second"] > 0


# ---------------------------------------------------------------- files


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    hardware.write_text(path, "old")

    def half(beside: Path) -> None:
        beside.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match=r"cannot be written .*what was there is unharmed"):
        hardware.replace(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
