"""Distillation's script, on random sound and a random teacher of one head."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "small"))
import distil


def tiny_teacher():
    g = torch.Generator().manual_seed(0)
    tensors = {"position_encodings/encodings": 0.1 * torch.randn(1500, 64, generator=g)}

    def add(name, *shape):
        tensors[name + "/weight"] = torch.randn(*shape, generator=g) / shape[1] ** 0.5
        tensors[name + "/bias"] = torch.zeros(shape[0])

    add("conv1", 64, 80, 3)
    add("conv2", 64, 64, 3)
    for i in range(distil.LAYER):
        for block, into in (("self_attention", 192), ("ffn", 256)):
            name = f"layer_{i}/{block}/"
            tensors[name + "layer_norm/gamma"], tensors[name + "layer_norm/beta"] = torch.ones(64), torch.zeros(64)
            add(name + "linear_0", into, 64)
            add(name + "linear_1", 64, 64 if into == 192 else into)
    return tensors


def sound(count=12):
    rng = np.random.default_rng(0)
    return [rng.normal(0, 2000, rng.integers(13000, 40000)).astype(np.int16) for _ in range(count)]


def train(out, steps):
    return distil.train(sound(), tiny_teacher(), out, steps=steps, batch=8.0, count=8)


def test_three_steps_and_resume(tmp_path):
    assert np.isfinite(train(tmp_path, 2)).all()
    before = torch.load(tmp_path / "checkpoint.pt")
    assert len(train(tmp_path, 3)) == 1  # the third alone
    after = torch.load(tmp_path / "checkpoint.pt")
    assert before["at"][0] == 2 and after["at"][0] == 3 and after["at"][1] > before["at"][1]
    assert train(tmp_path, 3) == []
    files = {file.name for file in (tmp_path / "small").iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"}
    model = distil.Wav2Vec2Model.from_pretrained(tmp_path / "small", dtype=torch.float32)
    for p, average in zip(model.parameters(), after["states"][1].values(), strict=True):
        torch.testing.assert_close(p, average, atol=1e-3, rtol=1e-3)


def test_student_is_transformers_own_model():
    student, x = distil.make_student(), torch.randn(2, 20000)
    model = distil.Wav2Vec2Model(distil.STUDENT)
    model.load_state_dict(student.state_dict())
    ours, theirs = (m(x, output_hidden_states=True).hidden_states for m in (student, model))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_parts_in_the_wrong_order(tmp_path, monkeypatch):
    paths = tmp_path / "model.bin.part1", tmp_path / "model.bin.part2"
    for path in paths:
        path.write_bytes(path.name.encode())
    monkeypatch.setattr(distil, "PARTS", [distil.hashlib.sha256(path.name.encode()).hexdigest() for path in paths])
    with pytest.raises(ValueError, match=r"model\.bin\.part2: not this part of Whisper-base"):
        distil.read_teacher(*reversed(paths))
