"""What `bench` promises: it counts what PyTorch counts, the peers are what they are called, and one command does it."""

import argparse
import importlib.util
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import forget_plots
from processes import python, server_with
from torch.utils.flop_counter import FlopCounterMode

import bench
import model as model_module
import run
from config import load_config
from freeze import count, prefix_depth, train_mode
from machine import fast, gpu
from model import EmotionModel, Wav2Vec2, Wav2Vec2Config
from report import speed

ROOT = Path(__file__).parents[1]
TURN = int(5.7 * 16_000)  # samples
HAS_PEER = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))


def path_of(name: str) -> Path:
    return ROOT / "configs" / f"{name}.yaml"


def base_model(name: str, **settings) -> EmotionModel:
    """A config's model of the base shape, without memory."""
    with torch.device("meta"):
        return run.assemble(load_config(path_of(name)), Wav2Vec2(Wav2Vec2Config(**settings)), (1, 7))


# ---------------------------------------------------------------- operations


@pytest.mark.parametrize(
    ("name", "phase", "cached", "expected"),
    [
        ("full", "step", False, 33.4),
        ("full", "infer", False, 14.42),
        ("full", "build", False, 4.91),
        ("partial3", "step", False, 18.7),
        ("partial3", "step", True, 6.57),
        ("partial3", "build", False, 12.2),
        ("lora_r8", "step", False, 23.7),
        ("lora_r8", "step", True, 18.4),
        ("lora_last3_cached", "step", True, 4.48),
        ("heads_only", "step", False, 14.42),
        ("heads_only", "step", True, 0),
    ],
)
def test_operations_of_the_methods_on_wav2vec2_base(name, phase, cached, expected):
    """GFLOP per second of audio for a turn of 5.7 s, from sums made by hand."""
    found = speed.operations(base_model(name), [TURN], cached)[phase] / 5.7e9
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("name", ["full", "partial3", "lora_r8", "lora_last3_cached"])
def test_operations_of_a_step_are_those_that_pytorch_counts(name, pre_norm, monkeypatch):
    """Forward and backward of what trains, two turns packed, on tensors without memory."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # it knows no such device

    def each(attend, q, k, v, lengths, dropout, *bias):
        parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*qkv, fast.Frames([len(qkv[0])]), dropout, *bias) for qkv in parts])

    def convolve(self, x, lengths):
        return x + torch.cat([self.conv(part.T)[:, : len(part)].T for part in x.split(list(lengths))])

    # off the CPU a batch is padded for these two, and padding would be counted
    monkeypatch.setattr(gpu, "attend", partial(each, gpu.attend))
    monkeypatch.setattr(model_module.PositionalConvolution, "forward", convolve)
    # one group: PyTorch counts a grouped convolution's weight gradient as if it had one
    model = base_model(name, position_groups=1, pre_norm=pre_norm)
    samples = [400 + 359 * 320, 400 + 151 * 320]  # 360 and 152 frames: 512 is a size that is not filled up
    depth, frames = prefix_depth(model), [(count - 400) // 320 + 1 for count in samples]
    train_mode(model, depth)
    x = torch.empty(sum(frames), 512 if depth < 0 else 768, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.backbone(x, frames, depth).sum().backward()
    expected = counter.get_total_flops()
    assert speed.operations(model, samples, cached=True)["step"] == pytest.approx(expected, rel=0.005)


def test_operations_of_the_whole_forward_pass_are_those_of_transformers(transformers):
    """The base model on one turn, convolutions included."""
    with torch.device("meta"):
        theirs = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(attn_implementation="eager")).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(torch.empty(1, TURN, device="meta"))
    expected = counter.get_total_flops()
    assert speed.operations(base_model("full"), [TURN])["infer"] == pytest.approx(expected, rel=0.005)


def test_operations_add_up():
    """Turns add; a step without a cache is one with it and the build; attention alone is quadratic."""
    model = base_model("partial3")
    one, other, both = (speed.operations(model, samples) for samples in ([40_000], [90_000], [40_000, 90_000]))
    assert both == {phase: one[phase] + other[phase] for phase in one}
    assert one["step"] == one["build"] + speed.operations(model, [40_000], cached=True)["step"]
    assert speed.operations(model, [800_000])["infer"] > 2.1 * speed.operations(model, [400_000])["infer"]


# ---------------------------------------------------------------- turns and groups


def test_turns_are_as_long_as_those_of_the_corpus_and_repeat():
    """2.75 to 11 s, 5.7 s on average, the same for the same seed; or of one length."""
    seconds = [len(turn) / 16_000 for turn in speed.make_turns(500)]
    assert min(seconds) >= 2.749 and max(seconds) <= 11
    assert np.mean(seconds) == pytest.approx(5.7, rel=0.04)
    assert max(seconds) > 10 and min(seconds) < 3
    one, same, other = (speed.make_turns(3, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert len(one[0]) != len(other[0])
    assert {len(turn) for turn in speed.make_turns(4, "equal")} == {TURN}


def test_what_trains_the_same_is_measured_in_turn():
    """Every config once, with both peers of what it trains, and our full finetuning in every group."""
    configs = [load_config(path) for path in bench.CONFIGS]
    groups = bench.make_groups(configs, with_peer=True, with_naive=True)
    by_name = {tuple(method.name for method in group) for group in groups}
    peers = ("transformers: partial3", "naive transformers: partial3")
    assert ("full", "partial3", "partial3_cached", *peers) in by_name
    lora = "transformers + PEFT: lora_last3"
    assert ("full", "lora_last3_cached", lora, f"naive {lora}") in by_name
    ours = [method.name for group in groups for method in group if method.side == "ours"]
    assert sorted(ours) == [path.stem for path in bench.CONFIGS]
    references = [method.config for group in groups for method in group if method.side == "reference"]
    assert references == [load_config(path_of("full"))] * (len(groups) - 1)


# ---------------------------------------------------------------- the peers


def peer_config(name: str, backbone: Path):
    return replace(load_config(path_of(name)), backbone=str(backbone), precision="fp32", device="cpu")


@pytest.mark.skipif(not HAS_PEER, reason="needs transformers and peft")
@pytest.mark.parametrize("name", ["full", "partial3", "lora_last3_cached", "heads_only"])
def test_the_peer_leaves_the_feature_encoder_alone_and_the_naive_peer_does_not(transformers, tiny_checkpoint, name):
    """A gradient reaches the CNN's first layer in the naive peer, whatever trains, and never in the other."""
    config = peer_config(name, tiny_checkpoint)
    for naive in (False, True):
        model, base = bench.peer_model(config, naive)
        arrived, needed = [], []

        def look(module, inputs, output, arrived=arrived, needed=needed):
            needed.append(output.requires_grad)
            if output.requires_grad:
                output.register_hook(lambda grad: arrived.append(True))

        base.feature_extractor.conv_layers[0].register_forward_hook(look)
        output = model.train()(torch.randn(2, 8000), attention_mask=torch.ones(2, 8000, dtype=torch.long))
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.sum().backward()
        assert needed == [naive]
        assert arrived == [True] * naive


@pytest.mark.skipif(not HAS_PEER, reason="needs transformers and peft")
@pytest.mark.parametrize("name", ["full", "partial3", "lora_r8", "lora_last3_cached", "heads_only"])
def test_the_peer_trains_what_ours_trains(transformers, tiny_checkpoint, name):
    """As many parameters of the backbone, but for the norm (128 taps) that it keeps apart in the positional weight."""
    config = peer_config(name, tiny_checkpoint)
    model, _ = bench.peer_model(config)
    ours = run.assemble(config, run.weights.load_backbone(tiny_checkpoint), (1, 7))
    found = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found == count(ours.backbone)[1] + 128 * (name == "full")


@pytest.mark.skipif(not HAS_PEER, reason="needs transformers and peft")
def test_the_peer_predicts_what_ours_predicts(transformers, tiny_large_checkpoint, tmp_path):
    """The same files, padded there and packed here, and the same head; of the kind that padding does not change."""
    config = peer_config("partial3", tiny_large_checkpoint)
    paths = [str(tmp_path / f"{number}.wav") for number in range(2)]
    for path, turn in zip(paths, speed.make_turns(2), strict=True):
        soundfile.write(path, turn[:20_000] if path == paths[0] else turn[:32_000], 16_000)
    model = run.assemble(config, run.weights.load_backbone(tiny_large_checkpoint), (1, 7))
    actions, parameters = bench.peer(config, "infer", False, paths)
    with torch.no_grad():
        for theirs, ours in zip(parameters[-4:], model.head.parameters(), strict=True):
            theirs.copy_(ours)
    expected = model(*model.encode([run.data.read_audio(path) for path in paths], -1))
    assert torch.allclose(actions["infer"](), expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- showing


def record(name: str, side: str, seconds: float, **more) -> dict:
    """What a measurement leaves of a method."""
    timed = {"seconds": seconds, "seconds_min": 0.9 * seconds, "seconds_max": 1.2 * seconds, "share": 0.5}
    timed |= {"peak_memory_bytes": int(seconds * 1e9), "bound_seconds": 0.5 * seconds}
    figures = {"step": timed, "read": None, "build": None, "infer": timed, "epochs_seconds": 10 * seconds}
    figures |= {"first_step_seconds": 9.0, "startup_seconds": 4.0, "trainable_parameters": 2_500_000}
    return {"name": name, "side": side, "config": name, "floor_bytes": 10**8, **figures, **more}


def hand_made() -> dict:
    quick = {"build": record("", "ours", 3.0)["step"], "read": record("", "ours", 0.004)["step"]}
    groups = [
        [record("full", "ours", 8.0), record("peer: full", "peer", 16.0)],
        [
            record("full", "reference", 10.0),
            record("cached", "ours", 2.0, epochs_seconds=23.0, **quick),
            record("peer: cached", "peer", 12.0),
            record("naive: cached", "naive", 24.0, infer=None),
        ],
    ]
    options = {"precision": "fp32", "turns": 8, "lengths": "mixed", "rounds": 3, "epochs": 10, "peer": True}
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
    return {"machine": "a machine", "options": options, "versions": versions, "warm_up": 2, "matmul_flops": 3e11} | {
        "audio_seconds": 40.0,
        "padded_seconds": 70.0,
        "groups": groups,
    }


def test_a_factor_is_against_what_was_measured_in_turn(tmp_path):
    """`--table` alone: full as of the row's own group, the peer as of the same; each method in each table once."""
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(hand_made()), encoding="utf-8")
    done = python(ROOT / "bench.py", "--table", path)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert text == speed.tables(hand_made()) + "\n"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    steps, others = lines[:7], lines[7:]
    assert len(others) == 7 and all(len(line) == 9 for line in lines)
    assert [line[0] for line in steps[2:]] == ["full", "peer: full", "cached", "peer: cached", "naive: cached"]
    assert steps[4] == ["cached", "2 (1.8 to 2.4)", "20.0", "5.00x", "6.00x", "50%", "2.00 GB", "0.17", "2.50 M"]
    assert steps[6][3:5] == ["0.42x", "0.50x"]
    assert others[4] == ["cached", "9.0 s (4.0)", "3 s", "4.0 ms", "2070 s", "5.22x", "20.0", "6.00x", "2.00 GB"]
    assert others[6][6:] == ["", "", ""]


def test_a_picture_is_drawn(tmp_path, monkeypatch):
    """Where matplotlib is there; else a line says that it is not."""
    pytest.importorskip("matplotlib")
    assert speed.draw(hand_made(), tmp_path / "a") == f", {tmp_path / 'a'}.png"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    forget_plots(monkeypatch)
    assert "matplotlib is not installed" in speed.draw(hand_made(), tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no JSON", "is not JSON"),
        ("[1]", "holds a JSON list, expected an object"),
        ("{}", "no `groups`; expected what bench"),
    ],
)
def test_another_file_is_no_result(tmp_path, text, found):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"x\.json: .*{found}"):
        speed.read_result(tmp_path / "x.json")


# ---------------------------------------------------------------- the command


@pytest.mark.usefixtures("one_thread")
def test_the_command_measures_writes_and_prints(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """From processes to tables at a tiny size: every figure is there, and follows from the others.

    The processes are forked from one that has the peers; others, below, start as bench.py has them start.
    """
    out = tmp_path / "bench.json"
    words = [f"--backbone={tiny_checkpoint}", "--turns=2", "--rounds=1", "--epochs=4", "--device=cpu", "--threads=1"]
    words += [f"--configs={path_of('partial3_cached')}", f"--out={out}", *["--naive"] * HAS_PEER]
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    rate = speed.matmul_rate(torch.device("cpu"), torch.float32)  # takes seconds, and is asked for twice
    asked = []
    monkeypatch.setattr(speed, "matmul_rate", lambda *given: asked.append(given) or len(asked) * rate)
    peers = [f"transformers.models.wav2vec2.{name}_wav2vec2" for name in ("modeling", "feature_extraction")]
    with server_with("bench", "conftest", *[*peers, "peft"] * HAS_PEER) as context:
        monkeypatch.setattr(bench.multiprocessing, "get_context", {"spawn": context}.get)
        bench.main()
    printed = capsys.readouterr().out
    assert asked == [(torch.device("cpu"), torch.float32)] * 2
    result = speed.read_result(out)
    assert result["matmul_flops_measured"] == [rate, 2 * rate]
    assert result["matmul_flops"] == 2 * rate > 0
    assert printed.startswith(speed.tables(result))
    assert out.with_suffix(".png").is_file() or "matplotlib is not installed" in printed
    (group,) = result["groups"]
    assert [r["side"] for r in group] == (["ours", "peer", "naive"] if HAS_PEER else ["ours"])
    assert result["options"]["turns"] == 2 and result["versions"]["torch"] == torch.__version__
    assert result["audio_seconds"] == pytest.approx(sum(len(turn) for turn in speed.make_turns(2)) / 16_000)
    cached = group[0]
    assert cached["epochs_seconds"] == pytest.approx(cached["build"]["seconds"] + 4 * cached["step"]["seconds"])
    for r in group:
        assert r["startup_seconds"] == pytest.approx(r["first_step_seconds"] - r["step"]["seconds"])
        assert r["first_step_seconds"] > r["step"]["warm_up_seconds"][0] > 0  # of the step itself
        assert r["floor_bytes"] < r["step"]["peak_memory_bytes"]
        for phase in ("step", "build", "infer"):
            if figures := r[phase]:
                assert len(figures["warm_up_seconds"]) == speed.WARM_UP
                assert 0 < figures["seconds_min"] <= figures["seconds"] <= figures["seconds_max"]
                assert figures["bound_seconds"] == pytest.approx(r["operations"][phase] / result["matmul_flops"])
        assert (r["build"] is None, r["read"] is None) == (r is not cached, r is not cached)
        assert (r["infer"] is None) == (r["side"] == "naive")


def test_a_process_that_fails_is_named_with_its_error(tiny_checkpoint, tmp_path):
    """A config with a layer that the backbone does not have."""
    (tmp_path / "deep.yaml").write_text("trainable_layers: [11]\n", encoding="utf-8")
    config = load_config(tmp_path / "deep.yaml", [f"backbone={tiny_checkpoint}", "device=cpu", "precision=fp32"])
    options = {"turns": 2, "threads": 1, "device": "cpu", "rounds": 1, "folder": str(tmp_path), "linear": "auto"}
    with pytest.raises(ValueError, match=r"^deep failed at 'infer': ValueError: .*no layer 11; expected") as error:
        bench.measure([("infer", bench.Method("ours", config))], argparse.Namespace(**options))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--turns=1"], "argument --turns: expected at least 2, found 1"),
        (["--rounds=0"], "argument --rounds: expected at least 1, found 0"),
        (["--precision=int8"], "invalid choice: 'int8'"),
    ],
)
def test_a_wrong_option_is_an_error_at_once(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit):
        bench.main()
    assert message in capsys.readouterr().err


def test_what_cannot_be_written_or_is_no_config_is_noticed_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench.py", f"--out={tmp_path / 'none' / 'x.json'}"])
    with pytest.raises(FileNotFoundError, match=r"--out: \S+none is no directory"):
        bench.main()
    monkeypatch.setattr(sys, "argv", ["bench.py", "--configs", str(tmp_path / "none.yaml")])
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such config"):
        bench.main()
