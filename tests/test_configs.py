"""Every YAML in configs/ trains end to end, on a tiny model, with the prefix and the cache that its comment tells."""

import csv
import json
from pathlib import Path

import pytest
from conftest import tiny_settings

import data
import freeze
import run
import train
from config import load_config
from lora import adapters
from machine import fast

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LAYERS = 3  # of the tiny model, of which the configs' last three layers become the last two
FIT = {"partial3": ["trainable_layers=2"], "lora_last3": ["lora_layers=2"]}
EXPECTED = {  # depth of the prefix, whether it is cached, names of the parts that train beside the head
    "full": (-1, False, "projection position norm layers.0 layers.1 layers.2"),
    "full_amp": (-1, False, "projection position norm layers.0 layers.1 layers.2"),
    "full_microbatches": (-1, False, "projection position norm layers.0 layers.1 layers.2"),
    "full_checkpointing": (-1, False, "projection position norm layers.0 layers.1 layers.2"),
    "partial3": (1, False, "layers.1 layers.2"),
    "partial3_amp": (1, False, "layers.1 layers.2"),
    "partial3_cached": (1, True, "layers.1 layers.2"),
    "lora_r8": (0, True, "layers.0 layers.1 layers.2"),
    "lora_last3_cached": (1, True, "layers.1 layers.2"),
    "heads_only": (LAYERS + 1, True, ""),
    "logmel": (1, True, ""),
}


def test_each_config_has_an_expectation_here():
    """A config that is added says here what its prefix is."""
    assert {path.stem for path in CONFIGS} == EXPECTED.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_end_to_end(path, tmp_path, tiny_checkpoint, tiny_manifest, monkeypatch):
    """What trains, where the prefix ends, what is cached, the precision, and that the run comes back from disk."""
    depth, cached, parts = EXPECTED[path.stem]
    keys = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, epochs=1)
    keys |= {"micro_batch_size": 3} if path.stem == "full_microbatches" else {}  # of four
    keys = {key: value for key, value in keys.items() if path.stem != "logmel" or key != "backbone"}
    overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    overrides += next((fit for start, fit in FIT.items() if path.stem.startswith(start)), [])
    if path.stem.endswith("_amp"):  # which `auto` is on a GPU
        overrides.append("precision=bf16")
    config = load_config(path, overrides)
    models, checkpointed = [], []
    real_build, real_checkpoint = run.build_model, fast.checkpoint

    def build(*arguments):
        models.append(real_build(*arguments))
        return models[-1]

    def checkpoint(function, *arguments, **how):
        checkpointed.append(type(function).__name__)
        return real_checkpoint(function, *arguments, **how)

    monkeypatch.setattr(run, "build_model", build)
    monkeypatch.setattr(fast, "checkpoint", checkpoint)
    result = train.train(config)

    model = models[0][0]
    assert freeze.prefix_depth(model) == depth
    names = {name.removeprefix("backbone.") for name in freeze.trained_state(model)}
    beside = {name for name in names if not name.startswith("head.")}
    found = {".".join(name.split(".")[:2]) if name.startswith("layers") else name.split(".")[0] for name in beside}
    assert found == set(parts.split())
    assert len(names - beside) == 4
    with_lora = path.stem.startswith("lora")
    assert all(name.endswith((".A", ".B")) == with_lora for name in beside)
    assert {adapter.A.shape[0] for *_, adapter in adapters(model)} == ({8} if with_lora else set())
    expected = {"full_checkpointing": ["Layer"] * LAYERS * 3, "full_microbatches": ["EmotionModel"] * 2 * 3}
    assert checkpointed == expected.get(path.stem, [])
    assert result["precision"] == ("bf16" if path.stem.endswith("_amp") else "fp32")
    assert (result["epochs"], result["total_parameters"]) == (1, freeze.count(model)[0])

    caches = [json.loads(file.read_text()) for file in tmp_path.glob("cache/*/cache.json")]
    assert [(kind["depth"], kind["dtype"]) for kind in caches] == ([(depth, "float16")] if cached else [])
    rows = sum(len(file.read_text().splitlines()) for file in tmp_path.glob("cache/*/*.index"))
    assert rows == (20 if cached else 0)  # every utterance of every split, once

    monkeypatch.undo()
    tolerance = 2e-2 if cached else 6e-2 if path.stem.endswith("_amp") else 1e-3  # corpus scale, 1 to 7
    loaded = run.load_run(Path(config.output_dir) / path.stem)
    with open(Path(config.output_dir) / path.stem / "predictions_test.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            predicted = loaded.predict(data.read_audio(row["file"]), data.SAMPLE_RATE)
            assert predicted == pytest.approx({target: float(row[target]) for target in predicted}, abs=tolerance)
