"""The core stands alone: its files, copied into an empty folder with one config, train, resume and test."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_settings
from test_architecture import CORE

ROOT = Path(__file__).parents[1]


@pytest.fixture
def core(tmp_path) -> Path:
    """A folder with the files of the core and one config."""
    folder = tmp_path / "core"
    for name in CORE:
        path = Path(*name.split(".")).with_suffix(".py")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    shutil.copy(ROOT / "configs" / "lora_r8.yaml", folder)
    return folder


def train(core: Path, keys: dict, *, fails: bool = False) -> str:
    """What `train.py` prints in that folder, on stdout, or on stderr where it must fail."""
    words = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    command = [sys.executable, "train.py", "lora_r8.yaml", *words]
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(command, cwd=core, capture_output=True, text=True, env=alone)
    assert (ended.returncode != 0) == fails, ended.stderr
    return ended.stderr if fails else ended.stdout


def test_it_trains_resumes_and_tests(core, tmp_path, tiny_checkpoint, tiny_manifest):
    """Stopped after one epoch of three by a smaller `epochs`, the run goes on where `last.pt` left it."""
    keys = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, epochs=2)
    assert "test CCC  valence" in train(core, keys)
    directory = tmp_path / "runs" / "lora_r8"
    first = (directory / "predictions_test.csv").read_bytes()
    (directory / "result.json").unlink()
    (directory / "predictions_test.csv").unlink()
    assert "resuming after epoch 2" in train(core, keys)
    assert (directory / "predictions_test.csv").read_bytes() == first


@pytest.mark.parametrize(
    ("keys", "folder"),
    [
        ({"corpus": "iemocap", "data_root": ".", "fold": 1}, "corpora"),
        ({"corpus": "demo"}, "corpora"),
    ],
)
def test_what_lies_outside_is_named_when_a_config_asks_for_it(keys, folder, core, tmp_path, tiny_checkpoint):
    """One line that names the folder, and no traceback."""
    places = {"output_dir": str(tmp_path / "runs"), "backbone": str(tiny_checkpoint), "device": "cpu"}
    message = train(core, places | keys, fails=True)
    assert "Traceback" not in message
    assert f"{folder}/" in message
