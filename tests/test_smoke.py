"""Twenty seconds: one command trains, the same command again reports, and another one predicts."""

import csv
import json

import pytest
from conftest import tiny_settings
from processes import python


def run(*words: str) -> str:
    """What a command prints; it must end with exit status 0."""
    ended = python(*words)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("method", ["full", "partial3_cached", "lora_r8", "heads_only"])
def test_train_report_predict(method, tmp_path, tiny_checkpoint, tiny_manifest):
    """The commands of the README on a tiny model and twenty recordings."""
    keys = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, epochs=1)
    words = [f"configs/{method}.yaml", *(f"{key}={json.dumps(value)}" for key, value in keys.items())]
    first = run("train.py", *words)
    assert "test CCC  activation" in first and "test CCC  valence" in first
    directory = tmp_path / "runs" / method
    assert json.loads((directory / "result.json").read_text(encoding="utf-8"))["epochs"] == 1
    assert run("train.py", *words).splitlines()[-1] == first.splitlines()[-1]
    run("predict.py", str(directory), str(tiny_manifest.parent), "--out", str(tmp_path / "out.csv"))
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and {"file", "start", "end", "activation", "valence"} <= rows[0].keys()
