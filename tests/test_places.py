"""Where is not what: a run, a comparison and a result belong to the content of corpus and backbone, not to a place."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import tiny_settings
from test_emotale import make as make_emotale
from test_metrics import clustered
from test_results import fabricate
from test_train import STEPS, stop

import compare
import data
import metrics
import run
import train
import weights
from config import Config
from formats import adapter
from machine import hardware
from report import results

pytestmark = pytest.mark.usefixtures("one_thread")

Settings = Callable[..., dict]


@pytest.fixture
def settings(tmp_path, tiny_checkpoint, tiny_manifest) -> Settings:
    """A function from keys to those of a small experiment, whose corpus and backbone lie in the folder of the test."""
    shutil.copytree(tiny_checkpoint, tmp_path / "backbone")
    shutil.copytree(tiny_manifest.parent, tmp_path / "corpus")
    places = {"backbone": str(tmp_path / "backbone"), "manifest": str(tmp_path / "corpus" / "manifest.csv")}
    return lambda **keys: tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, **places, name="a", epochs=2, **keys)


def move(key: str, way: str, keys: dict, folder: Path) -> dict:
    """The keys after what one of them names was moved or copied, or is now named by a link or a relative path."""
    path = Path(keys[key])
    if way == "relative":
        return {**keys, key: os.path.relpath(path)}
    named = path.parent if key == "manifest" else path
    there = folder / "elsewhere" / named.name
    there.parent.mkdir()
    if way == "linked":
        there.symlink_to(named, target_is_directory=True)
    else:
        shutil.move(named, there) if way == "moved" else shutil.copytree(named, there)
    return {**keys, key: str(there / path.name if key == "manifest" else there)}


WAYS = [("manifest", way) for way in ("relative", "linked", "moved")]
WAYS += [("backbone", way) for way in ("relative", "linked", "moved")]
WAYS += [("output_dir", "moved"), ("output_dir", "linked"), ("name", "renamed"), ("device", "cpu:0")]
WAYS += [("cache_dir", "copied")]


def changed_place(key: str, way: str, keys: dict, folder: Path) -> Config:
    if key == "name":
        (folder / "runs" / "a").rename(folder / "runs" / "b")
        return Config(**{**keys, "name": "b"})
    if key == "device":
        return Config(**{**keys, "device": way})
    return Config(**move(key, way, keys, folder))


@pytest.mark.parametrize(("key", "way"), WAYS)
def test_a_stopped_run_goes_on_and_a_finished_one_is_read_from_another_place(
    settings, tmp_path, monkeypatch, capsys, key, way
):
    """It resumes where it was, and its result is then read as it is, without a step."""
    monkeypatch.chdir(tmp_path)
    keys = settings(cache=True)
    stop(monkeypatch, STEPS + 1, Config(**keys))
    elsewhere = changed_place(key, way, keys, tmp_path)
    result = train.train(elsewhere)
    assert "resuming after epoch 1" in capsys.readouterr().out
    monkeypatch.setattr(run, "step", lambda *_: pytest.fail("nothing is left to train"))
    assert train.train(elsewhere) == result
    assert train.train(replace(elsewhere, device="cuda:99")) == result  # which this machine need not have


def test_a_finished_run_is_read_after_all_of_it_was_moved(settings, tmp_path, monkeypatch):
    """Corpus, backbone and run at once; and where the old places are gone, by the old command."""
    keys = settings()
    result = train.train(Config(**keys))
    (tmp_path / "new").mkdir()
    for name in ("corpus", "backbone", "runs"):
        shutil.move(tmp_path / name, tmp_path / "new" / name)
    texts = {key: value for key, value in keys.items() if isinstance(value, str)}
    new = {key: value.replace(str(tmp_path), str(tmp_path / "new")) for key, value in texts.items()}
    assert train.train(Config(**{**keys, **new})) == result
    assert train.train(Config(**{**keys, "output_dir": new["output_dir"]})) == result


def test_a_corpus_with_a_folder_and_an_adapter_may_move(tmp_path, tiny_checkpoint, monkeypatch):
    """`data_root` and `adapter`; another adapter is another backbone."""
    tree, adapters = make_emotale(tmp_path / "EmoTale", sound=True), tmp_path / "adapters"
    backbone = weights.load_backbone(tiny_checkpoint)
    run.inject(backbone, 2, 4.0, ["q"])
    for number in (1, 2):
        (adapters / str(number)).mkdir(parents=True)
        for module in backbone.modules():
            if hasattr(module, "B"):
                module.B.data.fill_(number / 100)
        adapter.save_adapter(backbone, adapters / str(number), "a/b")
    keys = {"corpus": "emotale", "data_root": str(tree), "fold": 1, "backbone": str(tiny_checkpoint), "name": "a"}
    keys |= {"adapter": str(adapters / "1"), "output_dir": str(tmp_path / "runs"), "epochs": 1, "device": "cpu"}
    result = train.train(Config(**keys))
    shutil.copytree(adapters / "1", tmp_path / "copy")
    shutil.move(tree, tmp_path / "moved")
    keys |= {"adapter": str(tmp_path / "copy"), "data_root": str(tmp_path / "moved")}
    assert train.train(Config(**keys)) == result
    with pytest.raises(ValueError, match=r"runs/a: was trained on other weights of .* than are found now"):
        train.train(Config(**{**keys, "adapter": str(adapters / "2")}))


def change_label(folder: Path) -> None:
    path = folder / "corpus" / "manifest.csv"
    path.write_text(path.read_text().rstrip().rpartition(",")[0] + ",1.5\n")


def change_weights(folder: Path) -> None:
    path = folder / "backbone" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


CHANGES = {
    "corpus": (change_label, "manifest", "was trained on other utterances, labels or lengths than the corpus has now"),
    "backbone": (change_weights, "backbone", "was trained on other weights of .* than are found now"),
}


@pytest.mark.parametrize("steps", [STEPS + 1, None], ids=["stopped", "finished"])
@pytest.mark.parametrize("way", ["in place", "copied"])
@pytest.mark.parametrize(("change", "key", "message"), CHANGES.values(), ids=CHANGES)
def test_another_content_is_refused_wherever_it_is(settings, tmp_path, monkeypatch, steps, way, change, key, message):
    """A stopped run does not go on, and a finished one is not read as if it were of this corpus and backbone."""
    keys = settings()
    stop(monkeypatch, steps, Config(**keys)) if steps else train.train(Config(**keys))
    change(tmp_path)
    keys = move(key, way, keys, tmp_path) if way == "copied" else keys
    with pytest.raises(ValueError, match=message):
        train.train(Config(**keys))


def test_a_place_where_nothing_is_is_an_error_of_its_own(settings):
    """Whoever names another place means what is there."""
    keys = settings()
    train.train(Config(**keys))
    for key, message in (("manifest", "no such manifest"), ("backbone", "is neither a file, a directory nor a hub id")):
        with pytest.raises(FileNotFoundError, match=message):
            train.train(Config(**{**keys, key: "/no/such/place"}))


def test_a_run_goes_on_in_the_precision_that_it_had_on_another_device(settings, monkeypatch):
    """`precision: auto` is bf16 on a GPU; the CPU goes on in it."""
    config = Config(**settings(lora_rank=2))
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "pick_precision", lambda name, device: "bf16" if name == "auto" else name)
        stop(monkeypatch, STEPS + 1, config)
    assert train.train(config)["precision"] == "bf16"


def test_a_comparison_goes_on_with_what_has_moved_and_refuses_what_has_changed(settings, tmp_path, monkeypatch):
    """A finished run counts from another place; not on another backbone or corpus."""
    monkeypatch.chdir(tmp_path)
    keys, started = settings(), []
    train.train(Config(**{**keys, "name": "heads-seed0", "output_dir": "out"}))
    shutil.move("out", "moved")
    shutil.copytree("backbone", "copy")
    shutil.copytree("corpus", "other")
    keys = {key: value for key, value in keys.items() if key not in ("name", "output_dir", "manifest", "backbone")}
    Path("heads.yaml").write_text(yaml.safe_dump(keys))
    monkeypatch.setattr(compare, "logged", lambda words, log: started.append(words))

    def main(backbone: str, manifest: str) -> object:
        words = [f"backbone={backbone}", f"manifest={manifest}", "--seeds", "1", "--out", "moved"]
        monkeypatch.setattr(sys, "argv", ["compare.py", "heads.yaml", *words])
        with pytest.raises((SystemExit, ValueError)) as end:
            compare.main()
        return end.value.code if isinstance(end.value, SystemExit) else str(end.value)

    assert main("copy", "other/manifest.csv") == 0
    assert started == []
    change_weights(tmp_path)
    assert "heads-seed0: was trained on other weights of backbone than are found now" in main(
        "backbone", "other/manifest.csv"
    )
    change_label(tmp_path)
    assert "was tested on other utterances or labels" in main("copy", "corpus/manifest.csv")


# ---------------------------------------------------------------- speakers that are nobody


def test_unknown_speakers_are_drawn_each_by_itself():
    """Not as one speaker who said it all; with fewer than two that are known there is no interval over speakers."""
    assert len(set(data.speaker_groups(["a", "Unknown", "a", "b", "", "unknown "]))) == 5
    assert data.speaker_groups(["a", "b", "a"]) == ["a", "b", "a"]
    assert set(data.speaker_groups(["a", "Unknown", "Unknown"])) == {""}
    prediction, label, speakers = clustered(np.random.default_rng(0), 8, 10)
    names = [f"s{speaker}" for speaker in speakers]
    whole = metrics.bootstrap_ci(prediction, label, data.speaker_groups(names))
    assert whole == metrics.bootstrap_ci(prediction, label, names)
    some = ["Unknown" if name in ("s6", "s7") else name for name in names]
    single = [f"s{number + 10}" if name == "Unknown" else name for number, name in enumerate(some)]
    one, other = (metrics.interval(metrics.bootstrap(prediction[None], label, data.speaker_groups(given))[:, 0], 26)
                  for given in (some, single))  # fmt: skip
    assert one == pytest.approx(other, abs=0.02)  # as 26 speakers, of whom 20 are drawn in another order
    assert metrics.bootstrap_ci(prediction, label, data.speaker_groups(["Unknown"] * 80)) is None


def test_a_result_and_a_table_count_unknown_speakers_as_the_check_does(settings, tmp_path):
    """Nobody is no speaker of the corpus, and an interval is that of the others and of single utterances."""
    keys = settings()
    manifest = Path(keys["manifest"])
    manifest.write_text(manifest.read_text().replace("test-0", "Unknown").replace("dev-0", "unknown"))
    result = train.train(Config(**keys))
    assert [result["corpus"][split]["speakers"] for split in ("train", "dev", "test")] == [4, 1, 1]
    assert [score["ci95"] for score in result["test"].values()] == [None, None]
    for seed in range(2):
        path = fabricate(tmp_path / "out", "m", seed) / "predictions_test.csv"
        path.write_text(path.read_text().replace(",s0,", ",Unknown,").replace(",s1,", ",Unknown,"))
    runs = results.read_runs(results.Job(tmp_path / "out", "m", seed) for seed in range(2))
    draws = results.Draws(runs, 0, "activation")
    assert draws.speakers == 6 + 10
    text = results.markdown(runs, results.analyse(runs, ["activation"], {}), ["activation"], [], 0, {})
    assert "bootstrap over the 6 speakers tested" in text
