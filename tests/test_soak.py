"""A long cached run holds no more memory and no more files at its end than at its beginning."""

import json
import os
import statistics
import sys

import pytest
from conftest import tiny_settings

import train
from config import Config

pytestmark = pytest.mark.usefixtures("one_thread")

GROWTH = 8 << 20  # bytes that resident memory may gain over all epochs after the warm-up


def resident_memory() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "keys",
    [{"lora_rank": 4, "lora_dropout": 0.1, "batch_size": 12}, {"trainable_layers": 2, "cache_dtype": "int8"}],
    ids=["LoRA, a batch an epoch", "two layers, three batches"],
)
def test_memory_and_open_files_stay_flat(request, tmp_path, monkeypatch, tiny_checkpoint, tiny_manifest, keys):
    """Over `--soak` epochs, after a tenth of them and five; a few in the everyday suite, 200 on request."""
    epochs = request.config.getoption("--soak")
    memory, files, save = [], [], train.hardware.save

    def observe(path: object, value: dict) -> None:
        save(path, value)
        memory.append(resident_memory())
        files.append(len(os.listdir("/proc/self/fd")))

    monkeypatch.setattr(
        train.hardware, "save", lambda path, value: (observe if path.name == "last.pt" else save)(path, value)
    )
    settings = {"cache": True, "name": "soak", "epochs": epochs, "patience": epochs, **keys}
    result = train.train(Config(**tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, **settings)))
    assert len(files) == result["epochs"] == epochs
    log = (tmp_path / "runs" / "soak" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    for epoch in sorted({epochs // 10, epochs // 2, epochs} - {0}):  # shown by pytest -s
        seconds = [json.loads(row)["train_seconds"] for row in log[max(epoch - 50, 0) : epoch]]
        median = statistics.median(seconds)
        print(f"epoch {epoch}: {memory[epoch - 1] / 1e6:.1f} MB, {files[epoch - 1]} files, {median:.4f} s an epoch")
    warm = min(epochs // 10 + 5, epochs - 1)
    assert set(files[warm:]) == {files[warm]}
    assert max(memory[warm:]) - memory[warm] < GROWTH
