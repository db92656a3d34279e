"""What `layers.py` promises: CKA as defined, changes as computed by hand, and a run's own layers told apart."""

import csv
import math
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import forget_plots, tiny_settings
from torch import Tensor, nn

import data
import run
import train
from config import Config, make_config
from machine import hardware
from model import normalize
from tools import layers

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_checkpoint, tiny_large_checkpoint, tiny_manifest):
    """The directory of a finished run with these keys; each is trained once."""
    folder, finished = tmp_path_factory.mktemp("trained"), {}

    def directory(large: bool = False, **keys) -> Path:
        name = f"{large}-{keys}"
        if name not in finished:
            backbone = tiny_large_checkpoint if large else tiny_checkpoint
            settings = tiny_settings(folder, backbone, tiny_manifest, warmup=0, lr=1e-3, epochs=1, **keys)
            train.train(Config(name=str(len(finished)), **settings))
            finished[name] = folder / "runs" / str(len(finished))
        return finished[name]

    return directory


def command_line(monkeypatch, *arguments: object) -> object:
    """`python -m tools.layers ...` in this process: what it exits with, None at its end."""
    monkeypatch.setattr(sys, "argv", ["layers.py", *map(str, arguments), "--device", "cpu"])
    try:
        runpy.run_path(str(ROOT / "tools" / "layers.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


def read_rows(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "layers.csv", newline="", encoding="utf-8") as file:
        return {row["part"]: row for row in csv.DictReader(file)}


def column(rows: dict[str, dict[str, str]], name: str) -> list[float]:
    """Of the hidden states, or of the layers."""
    parts = [row for part, row in rows.items() if part.startswith(("layer", "input")) and row[name]]
    return [float(row[name]) for row in parts]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka(x: Tensor, y: Tensor, batch: int = 1_000_000) -> float:
    streamed = layers.LinearCKA()
    for a, b in zip(x.split(batch), y.split(batch), strict=True):
        streamed.add(a, b)
    return streamed.value()


def direct_cka(x: Tensor, y: Tensor) -> float:
    """By the Gram matrices of centred frames, as Kornblith et al. define it, all at once in float64."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return ((k * l).sum() / (k.norm() * l.norm())).item()


# ---------------------------------------------------------------- CKA


@pytest.mark.parametrize("batch", [7, 100, 1000])
@pytest.mark.parametrize("offset", [0, 1e5])
def test_streaming_cka_is_that_of_all_frames_at_once(batch, offset):
    """Whatever the batches, the last one smaller, and with offsets that are far larger than what varies."""
    x = noise(300, 20)
    y = x @ noise(20, 12, seed=1) + noise(300, 12, seed=2) + offset * noise(12, seed=3)
    assert cka(x, y, batch) == pytest.approx(direct_cka(x, y), abs=1e-6)
    assert 0.1 < cka(x, y, batch) < 0.9


def test_offsets_cost_fp32_no_digits():
    """Products of the channels as they are would have lost all of them: 1e4 squared is past 2^24."""
    x = (noise(400, 16) + 1e4).float()
    y = (noise(400, 16) @ noise(16, 16, seed=1) + noise(400, 16, seed=2) - 1e4).float()
    assert cka(x, y, 50) == pytest.approx(direct_cka(x, y), abs=1e-5)


def test_cka_knows_neither_rotation_nor_scale_nor_offset():
    x, y = noise(200, 10), noise(200, 10) ** 3 + noise(200, 10, seed=1)
    rotation = torch.linalg.qr(noise(10, 10, seed=2)).Q
    assert cka(3 * x @ rotation - 5, y) == pytest.approx(cka(x, y), abs=1e-9)
    assert cka(x, -0.1 * y @ rotation) == pytest.approx(cka(x, y), abs=1e-9)
    assert cka(x, x @ noise(10, 10, seed=3)) < 0.95  # but other linear maps, unlike what CCA does


def test_cka_of_itself_is_1_and_of_independent_noise_near_0():
    """As much as the docstring says: D / (D + N)."""
    x, y = noise(5000, 10), noise(5000, 10, seed=1)
    assert cka(x, x, 64) == pytest.approx(1, abs=1e-12)
    assert cka(x, y) == pytest.approx(10 / 5010, rel=0.5)
    assert cka(x[:20], y[:20]) == pytest.approx(10 / 30, rel=0.5)


# ---------------------------------------------------------------- weights


def test_relative_change_is_over_all_parameters_together():
    """3-4-5: a weight of norm 4 and a bias of norm 3, of which the bias alone moves, by 2."""
    before, after = nn.ModuleDict({"a": nn.Linear(1, 1)}), nn.ModuleDict({"a": nn.Linear(1, 1)})
    for module, bias in ((before, 3.0), (after, 5.0)):
        nn.init.constant_(module["a"].weight, 4)
        nn.init.constant_(module["a"].bias, bias)
    assert layers.relative_change(before, after, ["a"]) == pytest.approx(2 / 5)
    assert layers.relative_change(before, before, ["a"]) == 0


# ---------------------------------------------------------------- runs


def direct(directory: Path) -> list[float]:
    """CKA of every hidden state on the test set by two whole passes of both models."""
    config = make_config(run.load_checkpoint(directory / "best.pt")["config"], "test")
    paths = [u.path for u in run.load_utterances(config)[0] if u.split == "test"]
    waveforms = [normalize(data.read_audio(path)) for path in paths]
    models = run.find_backbone(config)[0], run.load_run(directory).backbone
    states = zip(*(model.hidden_states(waveforms) for model in models), strict=True)
    return [direct_cka(torch.cat(before), torch.cat(after)) for before, after in states]


@pytest.mark.parametrize(
    ("keys", "first", "changed"),
    [
        ({"trainable_layers": 1}, 3, [2]),
        ({"trainable_layers": [1]}, 2, [1]),
        ({"trainable_layers": "all"}, 0, [0, 1, 2]),
        ({"lora_rank": 4, "lora_layers": [1, 2]}, 2, [1, 2]),
        ({"trainable_layers": 1, "large": True}, 3, [2]),
    ],
    ids=str,
)
def test_what_lies_below_all_that_trained_is_the_same(trained, monkeypatch, tmp_path, keys, first, changed):
    """Exactly 1 below hidden state `first` and 0 where nothing trained; above it the similarity of two whole passes."""
    directory = trained(**keys)
    assert command_line(monkeypatch, directory, "--out", tmp_path) is None
    rows = read_rows(tmp_path)
    similarity = column(rows, "similarity")
    assert similarity[:first] == [1] * first
    assert all(value < 1 for value in similarity[first:])
    assert similarity == pytest.approx(direct(directory), abs=1e-6)
    assert [i for i, value in enumerate(column(rows, "change")) if value > 0] == changed
    assert {path.name for path in tmp_path.iterdir()} == {f"layers.{suffix}" for suffix in ("md", "csv", "png", "pdf")}


def test_a_layer_and_its_parts_change_as_its_weights_do(trained, monkeypatch, tmp_path):
    """By hand from the checkpoint and what was loaded before it; the squares of the parts add up to the layer's."""
    directory = trained(trainable_layers=1)
    command_line(monkeypatch, directory, "--out", tmp_path)
    found = {key: float(value) for key, value in read_rows(tmp_path)["layer 2"].items() if key not in ("part", "note")}
    checkpoint = run.load_checkpoint(directory / "best.pt")
    before = dict(run.find_backbone(make_config(checkpoint["config"], "test"))[0].named_parameters())
    parts = {"change": "layers.2.", "attention": "layers.2.attention.", "feed-forward": "layers.2.feed_forward."}
    for column_name, start in parts.items():
        pairs = [
            (value, before[name.removeprefix("backbone.")])
            for name, value in checkpoint["trained"].items()
            if name.startswith(f"backbone.{start}")
        ]
        moved = sum((new - old.detach()).double().square().sum() for new, old in pairs)
        size = sum(old.detach().double().square().sum() for _, old in pairs)
        assert found[column_name] == pytest.approx(math.sqrt(moved / size), rel=1e-6)


def test_lora_changes_the_weights_that_it_was_merged_into(trained, monkeypatch, tmp_path):
    """q and v: the rest of its layer stays."""
    command_line(monkeypatch, trained(lora_rank=4, lora_layers=[1, 2]), "--out", tmp_path)
    rows = read_rows(tmp_path)
    for part in ("layer 1", "layer 2"):
        assert float(rows[part]["attention"]) > float(rows[part]["change"]) > 0
        assert float(rows[part]["feed-forward"]) == float(rows[part]["norms"]) == 0


def test_what_trained_outside_the_layers_has_rows_of_its_own(trained, monkeypatch, tmp_path):
    """Projection, positional convolution and norm of a full run, the norm of a pre-norm model, else nothing."""
    outside = {}
    runs = {"full": {"trainable_layers": "all"}, "last": {"trainable_layers": 1}}
    for name, keys in {**runs, "large": {"trainable_layers": 1, "large": True}}.items():
        command_line(monkeypatch, trained(**keys), "--out", tmp_path / name)
        rows = read_rows(tmp_path / name)
        outside[name] = [part for part in rows if not part.startswith(("layer", "input"))]
        assert all(float(rows[part]["change"]) > 0 for part in outside[name])
    expected = {"full": ["projection", "positional convolution", "norm"], "last": [], "large": ["norm"]}
    assert outside == expected


def test_heads_only_changed_nothing(trained, monkeypatch, capsys):
    """And no audio is computed; into the run's own directory, with what is written printed."""
    directory = trained()
    monkeypatch.setattr(data, "read_audio", lambda path: pytest.fail("not needed"))
    assert command_line(monkeypatch, directory) is None
    printed = capsys.readouterr().out
    assert (directory / "layers.md").read_text(encoding="utf-8") in printed
    rows = read_rows(directory)
    assert column(rows, "similarity") == [1] * 4
    assert column(rows, "change") == [0] * 3


def test_the_split_and_the_number_of_utterances_are_those_asked_for(trained, monkeypatch, tmp_path, capsys):
    """From all over the split, none twice."""
    utterances = [data.Utterance(str(n), "dev" if n % 2 else "test", "", {}) for n in range(20)]
    assert [u.path for u in layers.choose(utterances, "dev", 4)] == ["1", "5", "11", "15"]
    assert [u.path for u in layers.choose(utterances, "test", 200)] == [str(n) for n in range(0, 20, 2)]
    directory = trained(trainable_layers=1)
    command_line(monkeypatch, directory, "--out", tmp_path, "--split", "dev", "--utterances", 3)
    assert "of 3 utterances of dev" in capsys.readouterr().out


def test_a_demo_run_says_that_it_is_one(tmp_path, monkeypatch, capsys, tiny_checkpoint, tiny_manifest):
    """In the table, in the CSV and on the terminal."""
    corpus = data.read_manifest(tiny_manifest)
    monkeypatch.setattr(data, "load_corpus", lambda **_: corpus)
    keys = {"backbone": str(tiny_checkpoint), "trainable_layers": 1, "epochs": 1, "device": "cpu"}
    train.train(Config(name="demo", output_dir=str(tmp_path), **keys))
    assert command_line(monkeypatch, tmp_path / "demo") is None
    assert capsys.readouterr().out.count(run.DEMO_NOTE) == 2  # by the run and by the command
    assert (tmp_path / "demo" / "layers.md").read_text(encoding="utf-8").startswith(run.DEMO_NOTE + "\n")
    assert {row["note"] for row in read_rows(tmp_path / "demo").values()} == {run.DEMO_NOTE}


def test_no_note_on_a_corpus_of_ones_own(trained, monkeypatch, tmp_path, capsys):
    command_line(monkeypatch, trained(trainable_layers=1), "--out", tmp_path)
    assert "demo" not in capsys.readouterr().out
    assert {row["note"] for row in read_rows(tmp_path).values()} == {""}


def test_without_matplotlib_there_are_tables(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    forget_plots(monkeypatch)
    assert command_line(monkeypatch, trained(trainable_layers=1), "--out", tmp_path) is None
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"layers.md", "layers.csv"}


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], f"{Path('nowhere') / 'best.pt'}: no such file; expected a run's directory"),
        (["RUN", "--out", __file__], __file__),
    ],
)
def test_errors_are_one_line(trained, monkeypatch, arguments, message):
    directory = trained(trainable_layers=1)
    said = command_line(monkeypatch, *[directory if word == "RUN" else word for word in arguments])
    assert said.startswith("error: ")
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--split", "train", "invalid choice: 'train'"),
        ("--utterances", 1, "--utterances: expected at least 2, found 1"),
    ],
)
def test_options_that_cannot_be_are_refused(monkeypatch, capsys, option, value, message):
    """As everywhere, with the usage: before anything is read."""
    assert command_line(monkeypatch, "RUN", option, value) == 2
    assert message in capsys.readouterr().err


def test_a_backbone_that_has_moved_is_found_where_the_option_says(
    tmp_path, monkeypatch, tiny_checkpoint, tiny_manifest
):
    """The same figures as before; without the option the error names it."""
    backbone = Path(shutil.copytree(tiny_checkpoint, tmp_path / "backbone"))
    keys = tiny_settings(tmp_path, backbone, tiny_manifest, trainable_layers=1, epochs=1)
    train.train(Config(name="run", **keys))
    directory = tmp_path / "runs" / "run"
    assert command_line(monkeypatch, directory, "--out", tmp_path / "before") is None
    moved = backbone.rename(tmp_path / "moved")
    assert command_line(monkeypatch, directory).endswith("if the backbone is elsewhere now, say so with --backbone")
    assert command_line(monkeypatch, directory, "--out", tmp_path / "after", "--backbone", moved) is None
    assert read_rows(tmp_path / "after") == read_rows(tmp_path / "before")


def test_missing_audio_is_named(trained, monkeypatch, tmp_path, tiny_manifest, tiny_checkpoint):
    corpus = Path(shutil.copytree(tiny_manifest.parent, tmp_path / "corpus"))
    keys = tiny_settings(tmp_path, tiny_checkpoint, corpus / "manifest.csv", trainable_layers=1, epochs=1)
    train.train(Config(name="run", **keys))
    (corpus / "test2.wav").unlink()
    said = command_line(monkeypatch, tmp_path / "runs" / "run")
    assert f"{corpus / 'test2.wav'}: no such audio file" in said
    assert not (tmp_path / "runs" / "run" / "layers.md").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("config", {"backbone": "logmel", "trainable_layers": 0}, "found backbone logmel"),
        ("backbone", {"sha256": "0"}, "trained on other weights"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(trained, monkeypatch, tmp_path, key, value, message):
    """One without layers, and one of whose backbone there is another now."""
    checkpoint = run.load_checkpoint(trained(trainable_layers=1) / "best.pt")
    checkpoint[key] = {**checkpoint[key], **value}
    hardware.save(tmp_path / "best.pt", checkpoint)
    said = command_line(monkeypatch, tmp_path)
    assert message in said
    assert len(said.splitlines()) == 1
