"""What an earlier version wrote still works: `tests/before` holds a finished and a stopped run of it."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_settings

import data
import run
import train
from config import Config

BEFORE = Path(__file__).parent / "before"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def old(tmp_path, tiny_checkpoint, tiny_manifest) -> Path:
    """The old runs in a folder of their own, with the places of this machine in their configurations."""
    for name in ("done", "stopped"):
        directory = tmp_path / "runs" / name
        shutil.copytree(BEFORE / name, directory)
        path = directory / "config.yaml"
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings |= tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest)
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path / "runs"


def config_of(directory: Path) -> Config:
    settings = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    return Config(**settings)


def test_a_finished_run_is_reported_and_predicts(old, tiny_checkpoint, tiny_manifest):
    """The predictions that it wrote, to their printed digits."""
    assert train.train(config_of(old / "done")) == json.loads((BEFORE / "done" / "result.json").read_text())
    model = run.load_run(old / "done", backbone=str(tiny_checkpoint))
    with open(BEFORE / "done" / "predictions_test.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            predicted = model.predict(data.read_audio(tiny_manifest.parent / Path(row["file"]).name), 16_000)
            assert predicted == pytest.approx({target: float(row[target]) for target in predicted}, abs=0.05)  # fp16


def test_a_stopped_run_continues(old):
    """From its second epoch to the end, near where the old version would have ended."""
    result = train.train(config_of(old / "stopped"))
    assert result["epochs"] == 3
    log = (old / "stopped" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(log[0]) == json.loads((BEFORE / "stopped" / "log.jsonl").read_text().splitlines()[0])
    whole = [json.loads(line)["train_loss"] for line in (BEFORE / "done" / "log.jsonl").read_text().splitlines()]
    assert [json.loads(line)["train_loss"] for line in log] == pytest.approx(whole, abs=0.05)
    assert torch.load(old / "stopped" / "best.pt", weights_only=True)["epoch"] == result["best_epoch"]
