"""What `formats.adapter` promises: an adapter of PEFT is merged exactly, or refused by name."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import speech_like
from random_weights import random_backbone
from safetensors.torch import load_file, save_file

import lora
import run
import weights
from config import Config
from formats import adapter
from model import Wav2Vec2Config

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = "base_model_name_or_path"


def make_adapter(transformers, checkpoint: Path, folder: Path, wrap: str = "Model", **settings):
    """An adapter that PEFT itself saved, its model, and B no longer zero."""
    peft = pytest.importorskip("peft")
    base = getattr(transformers, f"Wav2Vec2{wrap}").from_pretrained(checkpoint)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **settings}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("wrap", "settings"),
    [
        ("Model", {"r": 4, "lora_alpha": 8}),
        ("Model", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
        ("Model", {"r": 3, "lora_alpha": 1, "target_modules": r".*(_proj|_dense|n.projection)", "lora_dropout": 0.1}),
        ("Model", {"r": 2, "target_modules": ["k_proj", "output_dense"], "layers_to_transform": [1]}),
        ("ForCTC", {"r": 2}),
    ],
    ids=["plain", "rslora", "all_linear", "one_layer", "with_a_head"],
)
def test_an_adapter_made_by_peft_is_merged(transformers, tiny_checkpoint, tmp_path, wrap, settings):
    """Hidden states within 1e-5 of PEFT's own, which are far from the base model's."""
    torch.manual_seed(0)
    theirs = make_adapter(transformers, tiny_checkpoint, tmp_path, wrap, **settings)
    backbone = run.find_backbone(Config(backbone=str(tiny_checkpoint), adapter=str(tmp_path)))[0]
    waveform = speech_like(7331)
    with torch.no_grad():
        output = theirs.base_model.model.base_model if wrap == "ForCTC" else theirs
        expected = output(waveform[None]).last_hidden_state[0]
    ours = backbone.hidden_states([waveform])[-1][0]
    before = weights.load_backbone(tiny_checkpoint).hidden_states([waveform])[-1][0]
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert (ours - before).abs().max() > 0.01


def head_adapter(transformers, checkpoint: Path, folder: Path, **settings) -> torch.nn.Module:
    """An adapter of PEFT around a classifier, everything that it trained changed, as it saves that."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = transformers.Wav2Vec2ForSequenceClassification.from_pretrained(checkpoint)
    base.classifier.reset_parameters()
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("settings", "head"),
    [
        ({"modules_to_save": ["projector", "classifier"]}, "classifier, projector"),
        ({"task_type": "SEQ_CLS"}, "classifier"),
        ({"target_modules": "all-linear"}, "classifier, projector"),
        ({"bias": "all"}, "classifier, projector"),
        ({"bias": "lora_only", "target_modules": ["k_proj", "output_dense"]}, None),
        ({"lora_bias": True}, None),
        ({"rank_pattern": {"q_proj": 2, "layers.1.attention.v_proj": 7}}, None),
        ({"alpha_pattern": {r"layers\.[02]\..*": 5, "v_proj": 1}}, None),
    ],
    ids=lambda value: next(iter(value), None) if isinstance(value, dict) else "",
)
def test_what_peft_adds_to_the_weights_is_merged_and_a_head_left_out(
    transformers, tiny_checkpoint, tmp_path, capsys, settings, head
):
    """Hidden states within 1e-5 of PEFT's own; the head, its LoRA and its biases are named in a note."""
    theirs = head_adapter(transformers, tiny_checkpoint, tmp_path, **settings).base_model.model.wav2vec2
    backbone = weights.load_backbone(tiny_checkpoint)
    waveform = speech_like(7331)
    before = backbone.hidden_states([waveform])[-1][0]
    adapter.merge_adapter(backbone, tmp_path)
    with torch.no_grad():
        expected = theirs(waveform[None]).last_hidden_state[0]
    ours = backbone.hidden_states([waveform])[-1][0]
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert (ours - before).abs().max() > 0.01
    said = f"note: {tmp_path}: what was trained beside the backbone is left out: {head}\n" if head else ""
    assert capsys.readouterr().err == said


def test_an_adapter_of_a_wrapped_backbone_is_merged(transformers, tiny_checkpoint, tmp_path):
    """... whatever the wrapper calls it; one for two encoders is refused."""
    theirs = make_adapter(transformers, tiny_checkpoint, tmp_path / "plain", r=2)
    tensors = load_file(tmp_path / "plain" / adapter.FILES[1])
    renamed = {key.replace("model.model.", "model.model.speech.encoder.", 1): x for key, x in tensors.items()}
    folder = written(tmp_path / "wrapped", renamed, lora_alpha=8)
    ours = weights.load_backbone(tiny_checkpoint)
    adapter.merge_adapter(ours, folder)
    waveform = speech_like(4000)
    with torch.no_grad():
        expected = theirs(waveform[None]).last_hidden_state[0]
    assert torch.allclose(ours.hidden_states([waveform])[-1][0], expected, rtol=1e-5, atol=1e-5)
    folder = written(tmp_path / "two", renamed | {k.replace("speech.", "text."): x + 0 for k, x in renamed.items()})
    with pytest.raises(ValueError, match=r"is for 2 encoders, under 'speech\.encoder\.' and 'text\.encoder\.'"):
        adapter.merge_adapter(ours, folder)


def test_a_weight_that_peft_saved_whole_is_refused_by_name(transformers, tiny_checkpoint, tmp_path):
    """`modules_to_save` of a part of the backbone is no sum of weights."""
    make_adapter(transformers, tiny_checkpoint, tmp_path, r=2, modules_to_save=["feature_projection"])
    with pytest.raises(ValueError, match=r"feature_projection\.\S+\.weight would replace a weight of the backbone"):
        adapter.merge_adapter(weights.load_backbone(tiny_checkpoint), tmp_path)


def written(folder: Path, tensors: dict | None = None, **settings) -> Path:
    """An adapter directory by hand: rank 2 on q of layer 0."""
    folder.mkdir(exist_ok=True)
    (folder / adapter.FILES[0]).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | settings))
    module = "base_model.model.encoder.layers.0.attention.q_proj"
    default = {f"{module}.lora_A.weight": torch.ones(2, 64), f"{module}.lora_B.weight": torch.ones(64, 2)}
    save_file(default if tensors is None else tensors, folder / adapter.FILES[1])
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
        ({"use_dora": True}, "use_dora is True; only plain LoRA"),
        ({"rank_pattern": {"q_proj": 4}}, r"q_proj has {'A': \(2, 64\).* expected {'A': \(4, 64\)"),
        ({"rank_pattern": {"q_proj": "4"}}, "expected r and lora_alpha as numbers, found '4' and 4"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern is \['q_proj'\], expected an object"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"of_the_future": 1}, "of_the_future is 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model"),
        ({"r": "2"}, "expected r and lora_alpha as numbers, found '2' and 4"),
        ({"r": 0}, "expected r and lora_alpha as numbers, found 0 and 4"),
        ({"r": 3}, "q_proj has .* expected "),
        (
            {BASE: "facebook/wav2vec2-large"},
            "made for facebook/wav2vec2-large, and the backbone is facebook/wav2vec2-b",
        ),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(tiny_checkpoint, tmp_path, settings, message):
    backbone = weights.load_backbone(tiny_checkpoint)
    before = {name: parameter.clone() for name, parameter in backbone.named_parameters()}
    with pytest.raises(ValueError, match=message):
        adapter.merge_adapter(backbone, written(tmp_path, **settings), "facebook/wav2vec2-base")
    assert all(torch.equal(parameter, before[name]) for name, parameter in backbone.named_parameters())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"encoder.layers.3.attention.q_proj": (64, 64)}, "layers.3.attention.q_proj is no part of this backbone"),
        ({"encoder.layers.0.attention.q_proj": (96, 96)}, r"q_proj has .*\(2, 96\).* expected .*\(2, 64\)"),
        ({"classifier": (64, 64)}, "classifier is no part of this backbone"),
        ({"model.decoder.q_proj": (64, 64)}, "model.decoder.q_proj is no part of this backbone"),
        ({"encoder.layers.0.layer_norm": (64, 64)}, "layer_norm has .* expected a linear layer"),
        ({"encoder.pos_conv_embed.conv": (64, 64)}, "expected a linear layer"),
        ({}, "it holds no tensors"),
    ],
)
def test_adapters_of_other_models_are_refused_by_module(tiny_checkpoint, tmp_path, tensors, message):
    found = {}
    for module, (outputs, inputs) in tensors.items():
        found[f"base_model.model.{module}.lora_A.weight"] = torch.ones(2, inputs)
        found[f"base_model.model.{module}.lora_B.weight"] = torch.ones(outputs, 2)
    with pytest.raises(ValueError, match=message):
        adapter.merge_adapter(weights.load_backbone(tiny_checkpoint), written(tmp_path, found))


def test_half_a_pair_and_strange_tensors_are_refused(tiny_checkpoint, tmp_path):
    backbone = weights.load_backbone(tiny_checkpoint)
    key = "base_model.model.encoder.layers.0.attention.q_proj.lora_A.weight"
    with pytest.raises(ValueError, match=r"q_proj has .* expected "):
        adapter.merge_adapter(backbone, written(tmp_path, {key: torch.ones(2, 64)}))
    strange = {key.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}
    with pytest.raises(ValueError, match="lora_magnitude_vector is no matrix of LoRA"):
        adapter.merge_adapter(backbone, written(tmp_path, strange))


def test_no_adapter_and_a_damaged_one(tiny_checkpoint, tmp_path):
    backbone = weights.load_backbone(tiny_checkpoint)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json; expected a directory as PEFT saves it"):
        adapter.merge_adapter(backbone, tmp_path / "nowhere")
    folder = written(tmp_path)
    (folder / adapter.FILES[1]).write_bytes((folder / adapter.FILES[1]).read_bytes()[:50])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        adapter.merge_adapter(backbone, folder)
    (folder / adapter.FILES[0]).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        adapter.merge_adapter(backbone, folder)


def test_lora_on_the_attention_of_wavlm_is_no_adapter_of_peft(tmp_path):
    """Loaded by PEFT it would change nothing, without a word; on the feed-forward layers it works and is written."""
    config = Wav2Vec2Config(conv_channels=(32,) * 7, width=64, layers=1, heads=4, ffn=128, relative_buckets=32)
    for targets, refused in ((["q", "fc1"], True), (["fc1"], False)):
        backbone = random_backbone(config)
        lora.inject(backbone, 2, 4, targets)
        with pytest.raises(ValueError, match="WavLM's q, k, v or o") if refused else nullcontext():
            adapter.save_adapter(backbone, tmp_path, "microsoft/wavlm-base")
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_an_adapter_names_the_revision_of_its_base_and_fits_any(tiny_checkpoint, tmp_path):
    """As PEFT keeps it, beside the name; merged into the same repository at another revision."""
    backbone = weights.load_backbone(tiny_checkpoint)
    lora.inject(backbone, 2, 4, ["q"])
    adapter.save_adapter(backbone, tmp_path, "some/base@v1")
    settings = json.loads((tmp_path / adapter.FILES[0]).read_text())
    assert (settings[BASE], settings["revision"]) == ("some/base", "v1")
    assert adapter.merge_adapter(weights.load_backbone(tiny_checkpoint), tmp_path, "some/base@v2")
    with pytest.raises(ValueError, match="made for some/base, and the backbone is some/other"):
        adapter.merge_adapter(weights.load_backbone(tiny_checkpoint), tmp_path, "some/other")
