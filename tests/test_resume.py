"""A run that is killed again and again, at random moments, is the run that was not: bit by bit, on a CPU."""

import json
import signal
from pathlib import Path

import pytest
import yaml
from conftest import tiny_settings
from processes import python
from test_train import METHODS, assert_same_run

ROOT = Path(__file__).parents[1]
RUNS = {
    "uncached": {**METHODS["full"], "epochs": 3},
    "cached": {**METHODS["LoRA"], "cache": True, "precision": "fp16", "epochs": 4, "patience": 2},
}
KILLER = """
import json, os, random, signal, sys, time
import torch
import train

config, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
torch.set_num_threads(1)
stopped = {"SIGKILL": 0, "SIGTERM": 0}


def start(name):  # a fork of this process, which has imported everything and computed nothing
    if child := os.fork():
        return child
    sys.argv = ["train.py", config, f"name={name}", f"cache_dir={config}-{name}"]
    sys.stdout = sys.stderr = open(f"{config}.said", "w")
    try:
        train.main()
    except BaseException as end:
        print(f"{type(end).__name__}: {end}", flush=True)
        os._exit(1)
    os._exit(0)


def said():
    return open(f"{config}.said").read()


def check(succeeded):
    if not succeeded:
        sys.exit(said())


began = time.monotonic()
check(os.waitpid(start("whole"), 0)[1] == 0)
seconds, count, done = time.monotonic() - began, 0, True
while stopped["SIGKILL"] < kills or not done:
    count += done  # a finished run is followed by a new one
    child, asked = start(f"killed{count}"), random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    if stopped["SIGKILL"] < kills:
        time.sleep(random.uniform(0, seconds))
    ended, status = os.waitpid(child, os.WNOHANG if stopped["SIGKILL"] < kills else 0)
    if not ended:
        os.kill(child, asked)
        ended, status = os.waitpid(child, 0)
    done = status == 0
    if not done:
        check(os.WIFSIGNALED(status) or (asked == signal.SIGTERM and "SystemExit: \\nstopped" in said()))
        stopped[asked.name] += 1
print(json.dumps({"runs": count, **stopped}))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has neither SIGKILL nor fork")
@pytest.mark.parametrize("keys", RUNS.values(), ids=RUNS)
def test_a_run_killed_at_random_moments_is_the_run_that_was_not(
    request, tmp_path, tiny_checkpoint, tiny_manifest, keys
):
    """Checkpoints with every state, log, predictions and scores; five kills, or half of `--kills`, among SIGTERMs."""
    config, kills = tmp_path / "experiment.yaml", (request.config.getoption("--kills") + 1) // 2
    config.write_text(yaml.safe_dump(tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, **keys)))
    (tmp_path / "killer.py").write_text(KILLER)
    done = python(tmp_path / "killer.py", config, kills, 0, seconds=60 + 10 * kills)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(report)  # shown by pytest -s
    assert report["SIGKILL"] >= kills
    whole = tmp_path / "runs" / "whole"
    files = {path.name for path in whole.iterdir()}
    for number in range(1, report["runs"] + 1):
        killed = tmp_path / "runs" / f"killed{number}"
        assert_same_run(whole, killed)
        assert {path.name for path in killed.iterdir()} == files
