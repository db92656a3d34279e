"""What `export` promises: transformers, PEFT and onnxruntime compute from its files what our model does."""

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import perturb, speech_like, tiny_config, tiny_settings, write_tiny_checkpoint
from huggingface_hub import constants
from processes import python
from safetensors.torch import load_file, save_file

import data
import export
import run
import train
import weights
from config import Config
from formats import adapter, card, onnx
from machine import hardware
from model import EmotionModel

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
BASE = "base_model_name_or_path"
LENGTHS = (400, 1041, 7331, 16_000)  # samples
VARIANTS = {  # every pooling and head, each kind of backbone, and what can train
    "lora": ("base", {"lora_rank": 4, "lora_layers": [0, 2], "lora_targets": ["q", "o", "fc1", "fc2"]}),
    "linear_head": ("large", {"lora_rank": 2, "head_width": 0, "pooling": "mean_std"}),
    "layers": ("large", {"pooling": "layers"}),
    "attentive": ("base", {"trainable_layers": 1, "pooling": "attentive"}),
    "everything": ("hubert", {"trainable_layers": "all", "targets": ["valence"]}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_manifest) -> dict[str, Path]:
    """The directory of a finished run of each variant, what trained in it perturbed so that nothing is at its start."""
    folder = tmp_path_factory.mktemp("exported")
    for kind in ("base", "large", "hubert"):
        (folder / kind).mkdir()
        write_tiny_checkpoint(folder / kind, large=kind == "large")
    settings = tiny_config() | {"model_type": "hubert", "architectures": ["HubertModel"]}
    (folder / "hubert" / "config.json").write_text(json.dumps(settings))
    directories = {}
    for name, (kind, keys) in VARIANTS.items():
        settings = tiny_settings(folder, folder / kind, tiny_manifest, epochs=1, **keys)
        train.train(Config(name=name, **settings))
        directories[name] = folder / "runs" / name
        best = run.load_checkpoint(directories[name] / "best.pt")
        model = perturb(run.load_run(directories[name], merged=False))
        for key, parameter in model.named_parameters():
            if key in best["trained"]:
                best["trained"][key] = 0.05 * torch.randn(parameter.shape) if key.endswith(".B") else parameter.detach()
        hardware.save(directories[name] / "best.pt", best)
    return directories


def predicted(folder: Path, monkeypatch, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, float]]:
    """What the code of a model card computes, run where the card lies."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    return [names["predict"](speech_like(length).numpy()) for length in lengths]


def assert_predicts_as(model: EmotionModel, predictions: list[dict], lengths: tuple[int, ...] = LENGTHS) -> None:
    for length, prediction in zip(lengths, predictions, strict=True):
        expected = model.predict(speech_like(length), 16_000)
        assert prediction.keys() == expected.keys()
        for target, value in expected.items():
            assert abs(prediction[target] - value) < 1e-4, (length, target)


@torch.no_grad()
def assert_hidden_states(theirs: torch.nn.Module, model: EmotionModel) -> None:
    """Every hidden state within 1e-5 of ours, relative to their size, at several lengths."""
    for length in LENGTHS:
        waveform = speech_like(length)
        output = theirs(waveform[None], output_hidden_states=True)
        expected = [*output.hidden_states[:-1], output.last_hidden_state]
        for depth, (ours, other) in enumerate(zip(model.backbone.hidden_states([waveform]), expected, strict=True)):
            assert torch.allclose(ours[0], other[0], rtol=1e-5, atol=1e-5), (length, depth)


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_loads_the_backbone_and_the_card_computes_the_predictions(
    transformers, runs, tmp_path, monkeypatch, name
):
    """LoRA merged; no weight missing or left over; the model class is that of the checkpoint that it began with."""
    out = export.export(runs[name], tmp_path / "out", "transformers")
    model = run.load_run(runs[name])
    kind = "HubertModel" if VARIANTS[name][0] == "hubert" else "Wav2Vec2Model"
    theirs, loaded = getattr(transformers, kind).from_pretrained(out, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    assert json.loads((out / "config.json").read_text())["architectures"] == [kind]
    assert_hidden_states(theirs.eval(), model)
    assert_predicts_as(model, predicted(out, monkeypatch))


def test_an_export_is_a_backbone_for_us_too(runs, tmp_path):
    """To train on from, or to predict on."""
    out = export.export(runs["lora"], tmp_path / "out", "transformers")
    ours, again = run.load_run(runs["lora"]).backbone, weights.load_backbone(out)
    for (name, a), (_, b) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6), name


def test_head_names_its_targets_and_their_range(runs, tmp_path):
    """In the header of the file, for programs that read no cards."""
    from safetensors import safe_open

    out = export.export(runs["attentive"], tmp_path / "out", "transformers")
    with safe_open(out / "head.safetensors", "pt") as file:
        about = file.metadata()
        names = set(file.keys())
    assert json.loads(about["targets"]) == ["activation", "valence"]
    assert json.loads(about["label_range"]) == [1, 7]
    assert about["pooling"] == "attentive"
    assert names == {"hidden.weight", "hidden.bias", "output.weight", "output.bias", "score.weight"}


def test_a_run_whose_backbone_has_moved_is_exported_from_where_it_is_now(runs, tmp_path, monkeypatch):
    """`--backbone`: asked for by the message, checked by its SHA-256, and the base that a PEFT adapter names."""
    shutil.copytree(runs["lora"], tmp_path / "run")
    best = run.load_checkpoint(tmp_path / "run" / "best.pt")
    best["config"]["backbone"] = str(tmp_path / "gone")
    hardware.save(tmp_path / "run" / "best.pt", best)
    message = command_line(monkeypatch, tmp_path / "run", tmp_path / "out")
    assert "gone is neither" in message and message.endswith("say so with --backbone")
    moved = shutil.copytree(runs["lora"].parents[1] / "base", tmp_path / "moved")
    for form in ("peft", "transformers"):
        out = tmp_path / form
        assert command_line(monkeypatch, tmp_path / "run", out, "--backbone", moved, "--format", form) is None
    assert json.loads((tmp_path / "peft" / adapter.FILES[0]).read_text())[BASE] == str(moved)
    expected = run.load_run(runs["lora"])
    assert_predicts_as(expected, predicted(tmp_path / "transformers", monkeypatch))
    assert_predicts_as(expected, predicted(tmp_path / "peft", monkeypatch))
    with pytest.raises(ValueError, match=r"trained on other weights of .*large .* say with --backbone where"):
        run.load_run(tmp_path / "run", backbone=str(runs["lora"].parents[1] / "large"))


# ---------------------------------------------------------------- PEFT, out and in


@pytest.mark.parametrize("name", ["lora", "linear_head"])
def test_peft_puts_the_adapter_onto_the_base_model(transformers, runs, tmp_path, monkeypatch, name):
    """Hidden states of ours, of which the base model alone is far away; the card computes the predictions."""
    peft = pytest.importorskip("peft")
    out = export.export(runs[name], tmp_path / "out", "peft")
    model = run.load_run(runs[name])
    base = transformers.Wav2Vec2Model.from_pretrained(json.loads((out / adapter.FILES[0]).read_text())[BASE]).eval()
    with torch.no_grad():
        alone = base(speech_like(7331)[None]).last_hidden_state[0]
    assert (alone - model.backbone.hidden_states([speech_like(7331)])[-1][0]).abs().max() > 0.01
    theirs = peft.PeftModel.from_pretrained(base, out).eval()
    assert_hidden_states(theirs, model)
    assert_predicts_as(model, predicted(out, monkeypatch))
    assert (out / "adapter_model.safetensors").stat().st_size < 200_000


def test_our_adapter_is_merged_as_our_run_is(runs, tmp_path, tiny_manifest):
    """`adapter: DIR` gives the weights that merging the run gives, bit for bit."""
    out = export.export(runs["lora"], tmp_path / "out", "peft")
    config = Config(backbone=str(runs["lora"].parents[1] / "base"), adapter=str(out))
    backbone, identity = run.find_backbone(config)
    merged = run.load_run(runs["lora"]).backbone
    for (name, a), (_, b) in zip(backbone.named_parameters(), merged.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    plain = run.find_backbone(Config(backbone=config.backbone))[1]
    assert identity["sha256"] != plain["sha256"]
    assert str(out) in identity["source"]


def test_training_goes_on_from_an_adapter_and_knows_it(runs, tmp_path, tiny_manifest):
    """The cache and best.pt belong to the merged backbone; another adapter in its place is refused."""
    out = export.export(runs["lora"], tmp_path / "adapter", "peft")
    base = runs["lora"].parents[1] / "base"
    keys = tiny_settings(tmp_path, base, tiny_manifest, epochs=1, adapter=str(out), cache=True)
    train.train(Config(name="heads", **keys))
    train.train(Config(name="plain", **keys | {"adapter": None}))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    run.load_run(tmp_path / "runs" / "heads")
    tensors = load_file(out / adapter.FILES[1])
    save_file({key: 2 * tensor for key, tensor in tensors.items()}, out / adapter.FILES[1])
    with pytest.raises(ValueError, match=r"trained on other weights of .* with "):
        run.load_run(tmp_path / "runs" / "heads")


@pytest.mark.parametrize(
    ("name", "reason"), [("layers", "it has no LoRA"), ("attentive", "it has no LoRA"), ("mixed", "layers .* besides")]
)
def test_only_a_run_that_trains_lora_alone_becomes_an_adapter(runs, tmp_path, tiny_manifest, name, reason):
    directory = runs.get(name)
    if name == "mixed":
        base = runs["lora"].parents[1] / "base"
        keys = tiny_settings(tmp_path, base, tiny_manifest, epochs=1, trainable_layers=1, lora_rank=2)
        train.train(Config(name="mixed", **keys))
        directory = tmp_path / "runs" / "mixed"
    with pytest.raises(ValueError, match=f"cannot be a PEFT adapter: {reason}.*--format transformers"):
        export.export(directory, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_a_demo_that_went_on_with_small_is_exported_as_what_it_is(tmp_path, tiny_manifest, monkeypatch):
    """Without the network that it lacked; the card has the licence of `small`, and PEFT cannot name it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    corpus = data.read_manifest(tiny_manifest)
    monkeypatch.setattr(data, "load_corpus", lambda **_: corpus)
    train.train(Config(name="demo", output_dir=str(tmp_path), lora_rank=2, epochs=1, device="cpu", batch_size=4))
    card = (export.export(tmp_path / "demo", tmp_path / "out", "transformers") / "README.md").read_text("utf-8")
    assert "license: cc-by-nc-sa-4.0" in card and "facebook" not in card
    with pytest.raises(ValueError, match="cannot be a PEFT adapter: its backbone is the small one"):
        export.export(tmp_path / "demo", tmp_path / "adapter", "peft")


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize("name", ["lora", "linear_head", "layers", "attentive"])
def test_onnxruntime_computes_the_predictions_at_any_length(runs, tmp_path, monkeypatch, name):
    """From one file, by target name, by the code of the card."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = export.export(runs[name], tmp_path / "out", "onnx")
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "model.onnx"]
    lengths = (*LENGTHS, 401, 719, 720, 160_000)
    assert_predicts_as(run.load_run(runs[name]), predicted(out, monkeypatch, lengths), lengths)


def test_weights_beyond_what_one_file_holds_lie_beside_it(runs, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx, "ONE_FILE", 1000)
    out = export.export(runs["lora"], tmp_path / "out", "onnx")
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "model.onnx", "model.onnx.data"]
    assert_predicts_as(run.load_run(runs["lora"]), predicted(out, monkeypatch))


def test_what_the_graph_does_not_compute_is_not_written(runs, tmp_path, monkeypatch):
    """Each export compares the graph with the model: here it pools the wrong hidden state."""
    monkeypatch.setattr(onnx.Graph, "pool", lambda _, states: states[0].mean(0))
    with pytest.raises(ValueError, match=r"predictions are .* off; use --format transformers"):
        export.export(runs["lora"], tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(runs, tmp_path, monkeypatch):
    """And nothing is left behind."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxscript"] + ["onnxscript"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript \(.*\); pip install onnx onnxscript"):
        export.export(runs["lora"], tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the card


def front_matter(out: Path) -> dict:
    return yaml.safe_load((out / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_the_card_tells_scores_data_method_and_limits(runs, tmp_path):
    """From `result.json`, and no folder of this machine."""
    out = export.export(runs["lora"], tmp_path / "out", "transformers")
    text = (out / "README.md").read_text(encoding="utf-8")
    result = json.loads((runs["lora"] / "result.json").read_text())
    for target, score in result["test"].items():
        assert f"| {target} | {score['ccc']:.3f} | {score['ci95'][0]:.3f} to {score['ci95'][1]:.3f} |" in text
    assert "4 utterances of 2 speakers" in text
    assert "LoRA of rank 4 on q, o, fc1, fc2 and the head" in text
    assert f"{result['trainable_parameters']:,} of {result['total_parameters']:,} parameters" in text
    assert "lora_rank: 4" in text and "manifest.csv" in text and "from 1 to 7" in text
    assert "Intended use and limits" in text and "Regulation 2024/1689" in text
    assert result["versions"]["torch"] in text
    assert str(runs["lora"].parents[1]) not in text
    assert not re.search(r"\$|\{\{|\{%|\n\n\n\n", text)
    assert run.DEMO_NOTE not in text
    assert front_matter(out)["library_name"] == "transformers"
    assert front_matter(out)["license"] == "other"
    assert "base_model" not in front_matter(out)


def test_a_demo_says_beside_its_scores_that_it_is_one(runs, tmp_path):
    directory = tmp_path / "demo"
    shutil.copytree(runs["layers"], directory)
    result = json.loads((directory / "result.json").read_text())
    (directory / "result.json").write_text(json.dumps(result | {"note": run.DEMO_NOTE}))
    text = (export.export(directory, tmp_path / "out", "transformers") / "README.md").read_text(encoding="utf-8")
    head, scores = text.split("## Scores")
    assert run.DEMO_NOTE in head
    assert run.DEMO_NOTE in scores.split("## Data")[0]


def card_of(runs, source: str, **changes) -> str:
    """The card of a run as if it had begun with another backbone and been exported for PEFT."""
    config = run.plain(run.load_best(runs["linear_head"])[1]) | {"backbone": source, **changes}
    result = json.loads((runs["linear_head"] / "result.json").read_text())
    return card.card(result, config, {}, source, "peft", ["valence"], (1, 7))


@pytest.mark.parametrize(
    ("layers", "rank", "words"),
    [
        ("all", 0, "Trained: all of the backbone but its feature encoder and the head;"),
        ([2, 3], 0, "Trained: transformer layers 2, 3 and the head;"),
        (2, 4, "Trained: the last 2 transformer layers and LoRA of rank 4 on q, v and the head;"),
        ([], 0, "Trained: the head;"),
    ],
)
def test_the_card_says_what_trained(runs, layers, rank, words):
    trained = {"trainable_layers": layers, "lora_rank": rank, "lora_targets": ["q", "v"]}
    assert words in card_of(runs, "some/base", **trained)


@pytest.mark.parametrize(
    ("source", "identifier", "words"),
    [
        ("facebook/wav2vec2-base", "apache-2.0", "Apache License 2.0"),
        ("audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim", "cc-by-nc-sa-4.0", "not for commercial use"),
        ("small", "cc-by-nc-sa-4.0", "not for commercial use"),
        ("someone/wav2vec2", "other", "see the backbone's own"),
    ],
)
def test_the_licence_is_that_of_the_backbone(runs, source, identifier, words):
    text = card_of(runs, source)
    assert words in text.split("## Backbone and licence")[1].split("##")[0]
    about = yaml.safe_load(text.split("---\n")[1])
    assert about.get("base_model") == (source if "/" in source else None)
    assert about["license"] == identifier


# ---------------------------------------------------------------- refusals, and nothing by halves


def test_the_card_keeps_the_revision_of_the_backbone(runs):
    """The front matter names the repository alone, as the hub wants it; the code loads the very revision."""
    text = card_of(runs, "some/base@v1")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "some/base"
    assert 'AutoModel.from_pretrained("some/base", revision="v1")' in text


def command_line(monkeypatch, *arguments: object) -> object:
    """`python export.py ...` in this process: what it exits with, None at its end."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "export.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


def test_the_command_line_lists_what_it_wrote(runs, tmp_path, monkeypatch, capsys):
    """Into an empty directory that is there already, too."""
    (tmp_path / "out").mkdir()
    assert command_line(monkeypatch, runs["lora"], tmp_path / "out", "--format", "peft") is None
    printed = capsys.readouterr().out
    for name in (*adapter.FILES, "head.safetensors", "preprocessor_config.json", "README.md"):
        assert f"{tmp_path / 'out' / name}  " in printed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_there_is_not_overwritten(runs, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "mine.txt"):
        assert "is there already" in command_line(monkeypatch, runs["lora"], out)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_no_run_an_unfinished_one_and_logmel_are_refused(runs, tmp_path, monkeypatch, tiny_manifest):
    """Each in one line."""
    assert "no such file; expected a run's directory" in command_line(monkeypatch, tmp_path, tmp_path / "out")
    shutil.copytree(runs["lora"], tmp_path / "half")
    (tmp_path / "half" / "result.json").unlink()
    message = command_line(monkeypatch, tmp_path / "half", tmp_path / "out")
    assert "is not finished; train.py continues it" in message
    assert "\n" not in message
    keys = tiny_settings(tmp_path, "logmel", tiny_manifest, epochs=1, name="baseline")
    train.train(Config(**keys))
    message = command_line(monkeypatch, tmp_path / "runs" / "baseline", tmp_path / "out", "--format", "onnx")
    assert "backbone: logmel" in message
    assert not (tmp_path / "out").exists()


def test_output_into_a_pipe_of_ascii_ends_no_export(runs, tmp_path):
    """What is written is listed, whatever its folder is called."""
    done = python("export.py", runs["lora"], tmp_path / "é", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}{os.sep}\\xe9{os.sep}model.safetensors  " in done.stdout


@pytest.mark.parametrize("form", ["transformers", "peft"])
def test_nothing_half_written_is_left(runs, tmp_path, monkeypatch, form):
    """Whatever fails on the way, here the last file."""

    def fail(*_: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(export, "card", fail)
    with pytest.raises(OSError, match="no space left"):
        export.export(runs["lora"], tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_has_no_place_in_logmel():
    with pytest.raises(ValueError, match="adapter: expected null, as backbone is logmel"):
        Config(backbone="logmel", adapter="somewhere")
