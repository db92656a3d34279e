"""Several processes train as one: gradients, losses, predictions and caches are those of a process alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_settings
from processes import python
from test_train import WALL_TIME, read_csv, read_log
from torch import Tensor, nn

import run
import train
from config import Config
from machine import hardware, parallel
from tools import caches

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"),
]

ROOT = Path(__file__).parents[1]
SIZES = (2, 3)
PLAIN = {"hidden_dropout": 0.0, "batch_size": 5, "epochs": 3}  # 12 utterances: the last batch has 2, fewer than 3
RUNS = {
    "full": {**PLAIN, "trainable_layers": "all", "micro_batch_size": 1},
    "last 2": {**PLAIN, "trainable_layers": 2},
    "LoRA": {**PLAIN, "lora_rank": 4},
    "LoRA, cached": {**PLAIN, "lora_rank": 4, "cache": True, "cache_dtype": "float32"},
    "heads, cached": {**PLAIN, "cache": True},
    "fp16": {**PLAIN, "lora_rank": 4, "precision": "fp16"},
}
DRIVER = """
import json, os, socket, sys
os.environ["TORCHELASTIC_RUN_ID"] = "test"  # as torchrun does
for name, module in list(sys.modules.items()):  # ours look for it when they are imported: by the server, without
    file = str(getattr(module, "__file__", ""))
    if file.startswith(os.getcwd()) and not file.startswith(sys.prefix):  # an environment may lie in the clone
        del sys.modules[name]
from pathlib import Path
import torch
from machine import hardware, parallel
import run, train
from config import Config
from tools import caches
from test_parallel import keep_gradients

torch.set_num_threads(1)
sizes, jobs, to_build = json.loads(sys.argv[1])


def work(rank, size, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    parallel.start()
    assert (parallel.rank(), parallel.size()) == (rank, size)
    for keys in jobs:
        keys = {**keys, "name": keys["name"].format(size), "cache_dir": keys["cache_dir"].format(size)}
        config = Config(**keys)
        with keep_gradients() as gradients:
            train.train(config)
        hardware.save(Path(config.output_dir) / config.name / "gradients.pt", gradients)
    caches.build([to_build, f"cache_dir={to_build} {size}"])
    os._exit(0)


for size in sizes:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        children.append(os.fork())
        if not children[-1]:
            work(rank, size, port)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * size
"""


@contextmanager
def keep_gradients() -> Iterator[dict[str, Tensor]]:
    """Of the runs within: the gradients of the first step, by name, as the optimizer gets them."""
    gradients: dict[str, Tensor] = {}
    real = run.make_optimizer

    def make_optimizer(model: nn.Module, *rates: float) -> torch.optim.Optimizer:
        def keep(*_: object) -> None:
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            gradients.update({name: gradient for name, gradient in found.items() if name not in gradients})

        optimizer = real(model, *rates)
        optimizer.register_step_pre_hook(keep)
        return optimizer

    run.make_optimizer = make_optimizer
    yield gradients
    run.make_optimizer = real


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_checkpoint, tiny_manifest) -> Path:
    """A folder with each run three times: alone, in two and in three processes, each with its gradients."""
    folder = tmp_path_factory.mktemp("parallel")
    jobs = [
        tiny_settings(folder, tiny_checkpoint, tiny_manifest, **keys, name=name + " {}") for name, keys in RUNS.items()
    ]
    jobs = [{**keys, "cache_dir": str(folder / "cache {}")} for keys in jobs]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for keys in jobs:
        config = Config(**{**keys, "name": keys["name"].format(1), "cache_dir": str(folder / "cache 1")})
        with keep_gradients() as gradients:
            train.train(config)
        hardware.save(Path(config.output_dir) / config.name / "gradients.pt", gradients)
    torch.set_num_threads(before)
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump({**jobs[3], "name": "built"}))
    caches.build([str(path), f"cache_dir={path} 1"])
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    done = python(driver, json.dumps([SIZES, jobs, str(path)]))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RUNS)
def test_gradients_are_those_of_one_process_with_the_same_batch(runs, name, size):
    """Summed over shares of a batch of five: one has more than another. To 1e-5, in fp32; fp16 rounds to 1e-3."""
    one, several = (torch.load(runs / "runs" / f"{name} {n}" / "gradients.pt", weights_only=True) for n in (1, size))
    assert one.keys() == several.keys() != set()
    assert max(gradient.abs().max() for gradient in one.values()) > 1e-2
    for key, gradient in one.items():
        error = (gradient - several[key]).abs().max().item()
        assert error < (1e-3 if name == "fp16" else 1e-5), (key, error)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in RUNS if name != "fp16"])
def test_losses_scores_and_predictions_are_those_of_one_process(runs, name, size):
    """Over three epochs, whose last batch gives the third process nothing: to 1e-5 of labels from 0 to 1."""
    one, several = (runs / "runs" / f"{name} {n}" for n in (1, size))
    for row, other in zip(read_log(one), read_log(several), strict=True):
        for key in row.keys() - WALL_TIME:
            assert other[key] == pytest.approx(row[key], abs=1e-5), key
    for row, other in zip(*(read_csv(path / "predictions_test.csv") for path in (one, several)), strict=True):
        assert row["file"] == other["file"]
        for target in ("activation", "valence"):
            assert float(other[target]) == pytest.approx(float(row[target]), abs=6e-5 + 1e-4)  # four decimals
    result = json.loads((several / "result.json").read_text())
    assert result["processes"] == size


@pytest.mark.parametrize("size", SIZES)
def test_a_cache_that_several_processes_fill_is_whole_and_each_wrote_its_share(runs, size):
    """After the first epoch nothing is missing or damaged, each process wrote, and hardly anything twice."""
    directories = [path.parent for path in (runs / f"cache {size}").glob("*/cache.json")]
    assert len(directories) == 2  # of LoRA and of the heads
    for directory in directories:
        assert caches.verify(directory) == []
        lines = [path.read_text().splitlines() for path in directory.glob("*.index")]
        assert len(lines) == size
        assert all(lines)
        assert 20 <= sum(map(len, lines)) <= 20 + 2 * size


def entries(directory: Path) -> dict[str, tuple[int, int]]:
    """Checksum and frames of each file in a cache."""
    lines = list(caches.read_index(directory))
    assert len(lines) == 20
    return {path: (crc, frames) for crc, _, _, frames, _, _, path in lines}


@pytest.mark.parametrize("size", SIZES)
def test_a_cache_that_several_processes_build_is_the_cache_of_one(runs, size):
    """`tools.caches build`: bit for bit, nothing twice, and each had a part of the work."""
    one, several = (next(runs.glob(f"build.yaml {n}/*/cache.json")).parent for n in (1, size))
    assert entries(several) == entries(one)
    assert len(list(several.glob("*.index"))) == size
    assert caches.verify(several) == []


# ---------------------------------------------------------------- the command line


def torchrun(size: int, *arguments: object) -> list[str]:
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(size), "--standalone", *map(str, arguments)]


def test_sigterm_saves_and_another_number_of_processes_goes_on(tmp_path, tiny_checkpoint, tiny_manifest):
    """torchrun hands a cluster's SIGTERM on. What two began one ends, as if it had been alone and never stopped.

    From the second epoch on their steps take a second, so that the signal comes before the last of them.
    """
    keys = {"hidden_dropout": 0.0, "lora_rank": 4, "epochs": 10, "patience": 10, "lr": 1e-5, "head_lr": 1e-4}
    keys = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, **keys)
    path, log = tmp_path / "experiment.yaml", tmp_path / "runs" / "two" / "log.jsonl"
    path.write_text(yaml.safe_dump(keys))
    (tmp_path / "slow.py").write_text(
        "import os, time\nimport run, train\nreal = run.step\n"
        f"def step(*given, **how):\n    time.sleep(os.path.exists({str(log)!r}))\n    return real(*given, **how)\n"
        "run.step = step\ntrain.main()\n"
    )
    given = [sys.executable, *torchrun(2, tmp_path / "slow.py", path, "name=two")]
    with subprocess.Popen(given, cwd=ROOT, env=environment(), stdout=-1, stderr=-1, text=True) as process:
        end = time.monotonic() + 120
        while not log.is_file() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said, complaints = process.communicate(timeout=60)
    assert said.count("epoch   1") == 1, complaints  # the first process alone prints
    assert "stopped and saved after the last step; the same command continues there" in complaints
    state = torch.load(log.with_name("last.pt"), weights_only=True)["state"]
    assert 3 <= 3 * state["epoch"] + len(state["losses"]) < 30
    two, one = (train.train(Config(**keys, name=name)) for name in ("two", "one"))
    assert (two["processes"], two["epochs"]) == (1, 10)
    for row, other in zip(*(read_log(tmp_path / "runs" / name) for name in ("one", "two")), strict=True):
        assert other["train_loss"] == pytest.approx(row["train_loss"], abs=1e-5)
    assert two["test"]["valence"]["ccc"] == pytest.approx(one["test"]["valence"]["ccc"], abs=1e-4)


def test_the_error_of_one_process_ends_all(tmp_path, tiny_checkpoint, tiny_manifest):
    """The second finds another checkpoint than the first: each says so, and the command fails at once."""
    keys = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest)
    path, broken = tmp_path / "experiment.yaml", tmp_path / "broken.py"
    path.write_text(yaml.safe_dump(keys))
    broken.write_text(
        "import sys\nimport run, train\nfrom machine import parallel\nreal = run.step\n"
        "def step(*given, **how):\n"
        "    if parallel.rank() == 1:\n        sys.exit(f'{parallel.name()}error: the disk is full')\n"
        "    return real(*given, **how)\n"
        "run.step = step\n"
        "try:\n    train.main()\n"
        "except ConnectionError as error:\n    sys.exit(f'{parallel.name()}error: {error}')\n"
    )
    done = python(*torchrun(2, broken, path, "name=two"), **environment())
    assert done.returncode != 0
    assert "process 1 of 2: error: the disk is full" in done.stderr
    assert "process 0 of 2: error: another process of this run has ended, its message tells why" in done.stderr
    assert not (tmp_path / "runs" / "two" / "result.json").exists()


# ---------------------------------------------------------------- who waits for whom


def test_no_process_ends_before_the_first_has_saved(tmp_path, tiny_checkpoint, tiny_manifest, monkeypatch):
    """torchrun stops all where one ends, so all wait for each `last.pt`: at a stop it would be cut off otherwise."""
    events, save, wait, step = [], hardware.save, hardware.parallel.wait, run.step

    def stop_at_once(*given, **how):
        signal.raise_signal(signal.SIGINT)
        return step(*given, **how)

    monkeypatch.setattr(hardware, "save", lambda path, value: (save(path, value), events.append(path.name)))
    monkeypatch.setattr(hardware.parallel, "wait", lambda: (wait(), events.append("wait")))
    monkeypatch.setattr(run, "step", stop_at_once)
    with pytest.raises(hardware.Stopped):
        train.train(Config(**tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, name="a")))
    assert events[-2:] == ["last.pt", "wait"]


@pytest.mark.parametrize("work", ["train", "build"])
def test_the_first_process_alone_writes_the_demo_and_downloads(
    tmp_path, tiny_checkpoint, tiny_manifest, monkeypatch, work
):
    """Two that did so at once would find half of each other's files."""
    keys, alone = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, name="a", epochs=1, cache=True), []

    @contextmanager
    def first_alone():
        alone.append(None)
        yield
        alone.pop()

    def inside(real):
        def function(*given):
            assert alone, real.__name__
            return real(*given)

        return function

    for name in ("load_utterances", "build_model"):
        monkeypatch.setattr(run, name, inside(getattr(run, name)))
    monkeypatch.setattr(hardware.parallel, "first_alone", first_alone)
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(keys))
    train.train(Config(**keys)) if work == "train" else caches.build([str(path)])


def test_an_output_dir_that_is_not_shared_is_noticed_at_once(tmp_path, tiny_checkpoint, tiny_manifest, monkeypatch):
    """Not after all epochs, when another node misses the best checkpoint."""
    monkeypatch.setattr(hardware.parallel, "rank", lambda: 1)
    with pytest.raises(FileNotFoundError, match=r"config\.yaml: not there; output_dir must be on a disk that all"):
        run.open_directory(Config(**tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest)), tmp_path / "a")


def test_a_stop_of_any_process_stops_this_one(monkeypatch):
    """One that went on alone would wait for the others forever."""
    monkeypatch.setattr(hardware.parallel, "any_of", lambda flag: not flag)
    with pytest.raises(hardware.Stopped), hardware.watched_signals() as watch:
        next(watch([0, 1]))


def test_processes_that_would_train_something_else_are_refused(monkeypatch):
    """Nodes with manifests, checkpoints or saves of their own."""

    def all_gather_object(others: list, values: dict) -> None:
        others[:] = [values, values, {**values, "step": 4}]

    monkeypatch.setattr(parallel, "size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    parallel.require_same(corpus="a")
    with pytest.raises(ValueError, match="step: 3 in process 0 and 4 in process 2; all need the same"):
        parallel.require_same(corpus="a", step=3)


def test_the_first_process_alone_writes_and_each_has_random_numbers_of_its_own(tmp_path, monkeypatch):
    """With the same masks of dropout for every share, utterances of a batch would not be independent."""
    drawn = {}
    for rank in (0, 1):
        monkeypatch.setattr(hardware.parallel, "rank", lambda rank=rank: rank)
        hardware.write_text(tmp_path / str(rank), "")
        for _ in range(2):
            run.seed_step(0, 5, torch.device("cpu"))
            drawn.setdefault(rank, []).append(torch.rand(4).tolist())
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert drawn[0][0] == drawn[0][1] != drawn[1][0] == drawn[1][1]


def test_a_parameter_that_only_another_process_used_gets_its_gradient(monkeypatch):
    """As of a layer that layer drop left out here; one that nobody used has none, and is not moved by weight decay."""
    here, there, nowhere = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    here.grad = torch.ones(2, 3)

    def all_reduce(tensor: Tensor) -> None:  # as if another process had 5 for each of `here` and `there`
        tensor += torch.tensor([1, 1, 0]) if tensor.dtype == torch.int32 else torch.full((12,), 5.0)

    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    parallel.add_gradients([here, there, nowhere])
    assert here.grad.tolist() == [[6.0] * 3] * 2
    assert there.grad.tolist() == [[5.0] * 3] * 2
    assert nowhere.grad is None


def test_memory_that_runs_out_inside_an_exchange_is_not_another_process_that_ended():
    """NCCL allocates its buffers itself, and its error is no `OutOfMemoryError`."""
    with pytest.raises(RuntimeError) as short, parallel.connected():
        raise RuntimeError("NCCL error: unhandled cuda error. Last error:\nCuda failure 2 'out of memory'")
    assert hardware.is_out_of_memory(short.value)
    with pytest.raises(ConnectionError, match="another process of this run has ended"), parallel.connected():
        raise RuntimeError("Connection closed by peer")
