"""What `formats.emotion` promises: the outputs of the published recipe under their names, and no other head's."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import published_recipe, speech_like
from safetensors.torch import load_file
from test_weights import assert_same, write
from torch import Tensor

import weights
from formats.emotion import load_emotion_model
from model import EmotionModel


@torch.no_grad()
def assert_published(theirs: torch.nn.Module, ours: EmotionModel, samples: Iterable[int]) -> float:
    """Outputs by name within 1e-4 of those of the published recipe, for waveforms normalised as it does; the worst."""
    worst = 0.0
    for waveform in map(speech_like, samples):
        normalised = (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-7).sqrt()
        expected = dict(zip(("activation", "dominance", "valence"), theirs(normalised[None])[0].tolist(), strict=True))
        found = ours.predict(waveform, 16_000)
        assert found == pytest.approx(expected, rel=0, abs=1e-4)
        worst = max(worst, *(abs(found[name] - expected[name]) for name in expected))
    return worst


def test_the_published_emotion_model_has_the_outputs_of_its_recipe(published_model):
    """Its head, its mean over frames, its names; labels from 0 to 1; whatever the batch."""
    folder, theirs = published_model
    ours = load_emotion_model(folder)
    assert (ours.targets, ours.label_range) == (("activation", "dominance", "valence"), (0, 1))
    assert not ours.training
    assert_published(theirs, ours, (400, 7331, 48_000))
    waveforms = [speech_like(n) for n in (7331, 400, 4000)]
    alone = torch.cat([ours.infer([waveform]) for waveform in waveforms])
    assert torch.allclose(ours.infer(waveforms), alone, rtol=0, atol=1e-5)
    assert (alone[0] - alone[1]).abs().min() > 1e-3  # else the comparison would say little


def rewrite(folder: Path, published: Path, tensors: dict[str, Tensor] | None = None, **settings) -> Path:
    """A copy of the published directory with other settings and tensors; None: without."""
    stored = load_file(published / "model.safetensors") | (tensors or {})
    stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
    config = json.loads((published / "config.json").read_text()) | settings
    return write(folder, stored, {key: value for key, value in config.items() if value is not None})


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (["valence", "Arousal", "dominance"], ("valence", "activation", "dominance")),
        (["activation", "valence", "dominance"], ("activation", "valence", "dominance")),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ("activation", "dominance", "valence")),
        (None, ("activation", "dominance", "valence")),
    ],
)
def test_outputs_go_by_the_names_in_the_settings(published_model, tmp_path, capsys, names, targets):
    """In whatever order; the published one, with a note, where transformers filled in its own or there are none."""
    labels = names and {str(i): name for i, name in enumerate(names)}
    ours = load_emotion_model(rewrite(tmp_path, published_model[0], id2label=labels))
    assert ours.targets == targets
    said = "no settings name its 3 outputs; assumed activation, dominance, valence. To set them, put id2label"
    assert (said in capsys.readouterr().err) is (names is None or "LABEL_0" in names)
    waveform = speech_like(4000)
    assert list(ours.predict(waveform, 16_000).values()) == pytest.approx(ours.infer([waveform])[0].tolist())


DENSE, OUT = "classifier.dense", "classifier.out_proj"


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (
            {},
            {"id2label": {"0": "anger", "1": "joy", "2": "valence"}},
            "outputs are anger, joy, valence; expected",
        ),
        (
            {},
            {"id2label": {"0": "arousal", "1": "activation", "2": "valence"}},
            "arousal, activation, valence; exp",
        ),
        ({}, {"id2label": {"0": "arousal", "1": "valence"}}, "its 3 outputs are arousal, valence; expected"),
        (
            {f"{OUT}.weight": torch.ones(2, 64), f"{OUT}.bias": torch.ones(2)},
            {"id2label": None},
            "its 2 outputs are activation, dominance, valence; expected",
        ),
        ({}, {"pooling_mode": "max"}, "pooling_mode is 'max' in its settings; only 'mean' is known here"),
        ({f"{OUT}.weight": None}, {}, f"has no emotion head; expected {DENSE} and {OUT} beside the backbone"),
        ({"classifier.dense2.bias": torch.ones(9)}, {}, r"classifier\.dense2\.bias has no known place in its head"),
        ({f"{DENSE}.bias": None}, {}, rf"{DENSE}\.bias is missing"),
        ({f"{DENSE}.weight": torch.ones(64, 63)}, {}, rf"{DENSE}\.weight is \(64, 63\), expected \(64, 64\)"),
        ({f"{OUT}.weight": torch.ones(3, 63)}, {}, rf"{OUT}\.weight is \(3, 63\), expected \(3, 64\)"),
    ],
)
def test_another_head_is_refused(published_model, tmp_path, tensors, settings, message):
    """Categories, other targets, another pooling, half a head: never numbers under a wrong name."""
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        load_emotion_model(rewrite(tmp_path, published_model[0], tensors, **settings))


def test_the_published_model_is_a_backbone_without_its_head(published_model, tmp_path):
    """`classifier.dense`, `classifier.out_proj` beside a prefixed backbone, `vocab_size` null."""
    folder, theirs = published_model
    assert json.loads((folder / "config.json").read_text())["vocab_size"] is None
    theirs.wav2vec2.save_pretrained(tmp_path)
    assert_same(weights.load_backbone(folder), weights.load_backbone(tmp_path))


def test_the_published_emotion_model_at_its_size_has_the_outputs_of_its_recipe(full_size, transformers):
    """... with random weights; the largest difference is printed."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 12, "intermediate_size": 4096}
    theirs = published_recipe(transformers, **sizes)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        theirs.save_pretrained(folder)
        worst = assert_published(theirs, load_emotion_model(folder), (400, 7331, 48_000))
    print(f"emotion model: outputs differ by {worst:.1e}")
