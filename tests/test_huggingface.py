"""What `formats.huggingface` promises: a backbone that is written is the one that transformers and we read again."""

import json

import pytest
import torch
from conftest import perturb, speech_like
from random_weights import random_backbone
from test_weights import assert_same

import weights
from formats.huggingface import save_backbone
from lora import inject
from model import Wav2Vec2, Wav2Vec2Config

ARCHITECTURES = {
    "group, post-norm": {},
    "layer, pre-norm, bias": {"conv_norm": "layer", "pre_norm": True, "conv_bias": True},
    "layer, post-norm": {"conv_norm": "layer"},
    "group, pre-norm, bias": {"pre_norm": True, "conv_bias": True},
    "odd sizes": {
        "conv_channels": (8, 16, 24, 32, 40, 48, 56),
        "position_kernel": 15,
        "position_groups": 4,
        "norm_eps": 1e-4,
        "normalize_waveform": False,
    },
    "DistilHuBERT": {"projection_norm": False},
    "WavLM": {"relative_buckets": 320},
    "WavLM large": {"relative_buckets": 64, "relative_distance": 99, "conv_norm": "layer", "pre_norm": True},
}


def small_backbone(**settings) -> Wav2Vec2:
    """Random, small, every parameter with a value of its own."""
    sizes = {"conv_channels": (32,) * 7, "width": 64, "layers": 2, "heads": 4, "ffn": 96}
    return perturb(random_backbone(Wav2Vec2Config(**{**sizes, **settings})))


@torch.no_grad()
@pytest.mark.parametrize("settings", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_backbone_that_is_written_is_the_one_that_is_read(tmp_path, settings):
    """Bitwise, with its architecture, the positional convolution's weight norm folded; a tap of zeros stays zeros."""
    backbone = small_backbone(**settings)
    backbone.position.conv.weight[:, :, 3] = 0
    save_backbone(backbone, tmp_path / "new" / "folder")
    assert_same(weights.load_backbone(tmp_path / "new" / "folder"), backbone)


@torch.no_grad()
@pytest.mark.parametrize("settings", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_transformers_reads_what_is_written(transformers, tmp_path, settings):
    """Without a missing or unexpected key; every hidden state within 1e-4, and its feature extractor normalises so."""
    backbone = small_backbone(**settings)
    save_backbone(backbone, tmp_path)
    name = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    family = "Hubert" if "projection_norm" in settings else "WavLM" if "relative_buckets" in settings else "Wav2Vec2"
    assert name == f"{family}Model"
    theirs, loading = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert {key: names for key, names in loading.items() if names} == {}
    for samples in (400, 7331):
        waveform = speech_like(samples)
        output = theirs.eval()(waveform[None], output_hidden_states=True)
        expected = [*output.hidden_states[:-1], output.last_hidden_state]
        for depth, (a, b) in enumerate(zip(backbone.hidden_states([waveform]), expected, strict=True)):
            assert torch.allclose(a[0], b[0], rtol=0, atol=1e-4), (samples, depth)
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    assert extractor.do_normalize == backbone.config.normalize_waveform


def test_a_backbone_can_replace_the_file_that_it_is_mapped_from(tmp_path):
    """Its weights lie in that file; nothing is left beside it."""
    first, other = small_backbone(), small_backbone(ffn=80)
    save_backbone(first, tmp_path)
    mapped = weights.load_backbone(tmp_path)
    save_backbone(mapped, tmp_path)
    assert_same(weights.load_backbone(tmp_path), first)
    save_backbone(other, tmp_path)
    assert_same(weights.load_backbone(tmp_path), other)
    assert_same(mapped, first)
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_what_is_no_whole_backbone_is_not_written(tmp_path):
    """One with LoRA in it, and one whose prefix was dropped: an error, and no file."""
    backbone = small_backbone()
    backbone.layers[0].to_empty(device="meta")
    with pytest.raises(ValueError, match=r"layers\.0\.\S+ is not in memory"):
        save_backbone(backbone, tmp_path)
    backbone = small_backbone()
    inject(backbone, 2, 2.0, ["q"])
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.q\.A has no place; merge LoRA first"):
        save_backbone(backbone, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_random_weights_are_the_same_for_the_same_seed():
    """The demo without a network is reproducible: a golden sum, and every parameter finite."""
    config = Wav2Vec2Config(conv_channels=(32,) * 7, width=64, layers=2, heads=4, ffn=128)
    one, same, other = (random_backbone(config, seed) for seed in (0, 0, 1))
    assert_same(one, same)
    assert not torch.equal(one.layers[0].attention.q.weight, other.layers[0].attention.q.weight)
    assert all(parameter.isfinite().all() for parameter in one.parameters()) and not one.training
    total = sum(parameter.double().abs().sum().item() for parameter in one.parameters())
    assert total == pytest.approx(5237.5649, rel=1e-6)


@torch.no_grad()
def test_random_weights_keep_the_signal():
    """Features and hidden states of the base shape have a usable scale: nothing vanishes on the way."""
    backbone = random_backbone(Wav2Vec2Config(layers=1))
    features, lengths = backbone.feature_encoder([speech_like(4000)])
    assert 0.05 < features.std() < 20
    assert 0.5 < backbone(features, lengths).std() < 2
