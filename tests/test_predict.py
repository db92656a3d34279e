"""What `predict.py` promises: a row for all that can be read, in the label's scale, and a word about the rest."""

import csv
import io
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import speech_like, tiny_settings

import data
import freeze
import lora
import predict
import run
import train
import weights
from config import Config
from model import EmotionModel

ROOT = Path(__file__).parents[1]
HEADER = ["file", "start", "end", "activation", "valence"]


@pytest.fixture(autouse=True)
def one_thread():
    """Such small matrices are not worth two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_checkpoint, tiny_manifest) -> Path:
    """The directory of a finished LoRA run, with a backbone of its own."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_checkpoint, folder / "backbone")
    keys = tiny_settings(folder, folder / "backbone", tiny_manifest, lora_rank=4, lr=1e-2, warmup=0, epochs=2)
    train.train(Config(name="run", **keys))
    return folder / "runs" / "run"


@pytest.fixture
def recordings(tmp_path) -> Path:
    """A folder with audio of several kinds, and below it another; and a file that is none."""
    folder = tmp_path / "recordings"
    (folder / "more").mkdir(parents=True)
    soundfile.write(folder / "a.wav", speech_like(8000, 1).numpy() / 4, 16_000)
    stereo = speech_like(2 * 22_050, 2).view(-1, 2).numpy() / 4
    soundfile.write(folder / "b.flac", stereo, 44_100)
    soundfile.write(folder / "more" / "C.WAV", speech_like(4000, 3).numpy() / 4, 8_000, format="WAV")
    (folder / "notes.txt").write_text("no audio")
    return folder


def command_line(monkeypatch, *arguments: object) -> object:
    """`python predict.py ...` in this process: what it exits with, None at its end."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "predict.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


def rows_of(text: str) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text))
    rows = list(reader)
    assert reader.fieldnames == HEADER
    return rows


def values(row: dict[str, str]) -> dict[str, float]:
    return {target: float(row[target]) for target in HEADER[3:]}


# ---------------------------------------------------------------- rows


def test_files_and_folders_become_rows_and_what_cannot_be_read_is_named_at_the_end(trained, recordings):
    """As a real process: every other row is there, status 1, no traceback; each row is the model's own prediction."""
    (recordings / "bad.wav").write_bytes(b"RIFF")
    silent = recordings / "more" / "nan.wav"
    soundfile.write(silent, np.full(8000, np.nan, np.float32), 16_000, subtype="FLOAT")
    out = recordings / "out.csv"
    extra = recordings / "more" / "C.WAV"
    arguments = [trained, recordings, "missing.wav", extra, "--out", out, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "predict.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stdout == ""
    first, *named = done.stderr.splitlines()
    assert first == "error: 3 of 7 files have no prediction:"
    assert [line.split(": ")[0] for line in named] == [str(recordings / "bad.wav"), str(silent), "missing.wav"]
    rows = rows_of(out.read_text(encoding="utf-8"))
    read = [recordings / "a.wav", recordings / "b.flac", extra, extra]
    assert [row["file"] for row in rows] == [str(path) for path in read]
    model = run.load_run(trained)
    for row, path, seconds in zip(rows, read, (0.5, 0.5, 0.5, 0.5), strict=True):
        assert (float(row["start"]), float(row["end"])) == (0, seconds)
        assert values(row) == pytest.approx(model.predict(data.read_audio(path), 16_000), abs=1e-3)
    assert values(rows[0]) != values(rows[1])


def test_printed_rows_are_the_written_ones(trained, recordings, tmp_path, monkeypatch, capsys):
    """Without --out they go to stdout, nothing else does, and stdout stays open; status 0."""
    out = tmp_path / "out.csv"
    assert command_line(monkeypatch, trained, recordings, "--out", out) is None
    assert capsys.readouterr() == ("", "")
    assert command_line(monkeypatch, trained, recordings) is None
    printed, errors = capsys.readouterr()
    assert printed.encode() == out.read_bytes()
    assert errors == ""
    assert len(rows_of(printed)) == 3


def test_predictions_are_in_the_scale_of_the_labels(trained, recordings, monkeypatch, capsys):
    """0 and 1 of the head are the ends of `label_range`."""
    real = run.load_run

    def constant(*arguments) -> EmotionModel:
        model = real(*arguments)
        torch.nn.init.zeros_(model.head[-1].weight)
        model.head[-1].bias.data = torch.tensor([0.0, 0.75])
        return model

    monkeypatch.setattr(run, "load_run", constant)
    assert command_line(monkeypatch, trained, recordings / "a.wav") is None
    (row,) = rows_of(capsys.readouterr().out)
    assert values(row) == {"activation": 1.0, "valence": 5.5}


@pytest.mark.parametrize(("seconds", "window", "count"), [(2.45, 1.0, 3), (2.0, 1.0, 2), (1.0, 1.0, 1), (0.9, 20, 1)])
def test_windows_cover_a_file_without_gap_or_overlap(seconds, window, count):
    """Equal to a sample, at most `window` long; put together again they are the file."""
    waveform = torch.arange(round(seconds * 16_000)).float()
    pieces = predict.cut(waveform, window)
    assert len(pieces) == count
    assert torch.equal(torch.cat([samples for *_, samples in pieces]), waveform)
    assert [start for start, _, _ in pieces[1:]] == [end for _, end, _ in pieces[:-1]]
    assert (pieces[0][0], pieces[-1][1]) == (0, pytest.approx(seconds))
    lengths = [len(samples) for *_, samples in pieces]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= window * 16_000
    for start, end, samples in pieces:
        assert (end - start) * 16_000 == pytest.approx(len(samples))


def test_no_window_is_too_short_for_the_model():
    """Whatever the length of the file, with the shortest window that is allowed."""
    for samples in (400, 1600, 1601, 3201, 4799, 16_001):
        assert min(len(piece) for *_, piece in predict.cut(torch.zeros(samples), 0.1)) >= data.MIN_SAMPLES


def test_a_long_file_gets_a_row_for_each_window(trained, tmp_path, monkeypatch, capsys):
    """More windows than are in memory at once; each row is the prediction for its own stretch."""
    waveform = speech_like(10 * 8000 + 4000).numpy() / 4
    soundfile.write(tmp_path / "long.wav", waveform, 16_000, subtype="FLOAT")
    assert command_line(monkeypatch, trained, tmp_path / "long.wav", "--window", "0.5") is None
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 11 > predict.TOGETHER
    edges = [float(row["start"]) for row in rows] + [float(rows[-1]["end"])]
    assert edges[1:] == [float(row["end"]) for row in rows]
    assert (edges[0], edges[-1]) == (0, 5.25)
    model = run.load_run(trained)
    for row, (_, _, samples) in zip(rows, predict.cut(torch.from_numpy(waveform).float(), 0.5), strict=True):
        assert values(row) == pytest.approx(model.predict(samples, 16_000), abs=1e-3)


def test_a_file_that_fails_half_way_has_no_row_at_all(trained, recordings, monkeypatch, capsys):
    """Not the windows before the trouble: a file is there or it is named."""
    real, calls = EmotionModel.encode, []

    def encode(self, *arguments):
        calls.append(None)
        if len(calls) == 2:
            raise ValueError("a.wav: trouble in its second group of windows")
        return real(self, *arguments)

    soundfile.write(recordings / "a.wav", speech_like(16_000).numpy() / 4, 16_000)
    monkeypatch.setattr(EmotionModel, "encode", encode)
    code = command_line(monkeypatch, trained, recordings / "a.wav", recordings / "b.flac", "--window", "0.1")
    assert code == "error: 1 of 2 files have no prediction:\na.wav: trouble in its second group of windows"
    assert {row["file"] for row in rows_of(capsys.readouterr().out)} == {str(recordings / "b.flac")}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file system takes no such name")
def test_a_name_that_is_not_utf8_stops_no_other(trained, recordings, monkeypatch, capsys):
    """libsndfile cannot open it: it is named, and the rest is done."""
    path = os.fsdecode(os.fsencode(recordings) + b"/\xff.wav")
    shutil.copy(recordings / "a.wav", path)
    code = command_line(monkeypatch, trained, recordings)
    assert code.startswith(f"error: 1 of 4 files have no prediction:\n{path}: ")
    assert len(rows_of(capsys.readouterr().out)) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="there it is the console's encoding that decides")
def test_a_name_that_stdout_cannot_carry_is_written_another_way(trained, recordings, monkeypatch):
    """A row is not lost to a narrow encoding; commas and quotes are as CSV has them."""
    path = recordings / 'é, "b".wav'
    shutil.copy(recordings / "a.wav", path)
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert command_line(monkeypatch, trained, path) is None
    (row,) = rows_of(narrow.buffer.getvalue().decode("ascii"))
    assert row["file"] == str(path).replace("é", "\\xe9")


# ---------------------------------------------------------------- the model


def test_merging_lora_changes_no_prediction(trained, recordings):
    """The merged model that is used and the one that was trained, to 1e-5 of the label's range."""
    merged = run.load_run(trained)
    best = torch.load(trained / "best.pt", weights_only=True)
    unmerged, _ = run.build_model(Config(**best["config"]), (1.0, 7.0))
    untrained = unmerged.predict(data.read_audio(recordings / "a.wav"), 16_000)
    freeze.load_trained(unmerged, best["trained"])
    assert len(list(lora.adapters(unmerged))) == 6
    assert not list(lora.adapters(merged))
    for name in ("a.wav", "b.flac"):
        waveform = data.read_audio(recordings / name)
        assert merged.predict(waveform, 16_000) == pytest.approx(unmerged.predict(waveform, 16_000), abs=6e-5)
    trained_prediction = merged.predict(data.read_audio(recordings / "a.wav"), 16_000)
    assert trained_prediction != pytest.approx(untrained, abs=1e-2)  # else the comparison would say nothing


def test_a_run_on_other_backbone_weights_is_refused(trained, recordings, tmp_path, monkeypatch):
    """One bit of the pretrained file: what trained belongs to exactly those weights."""
    weights = trained.parents[1] / "backbone" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        code = command_line(monkeypatch, trained, recordings, "--out", tmp_path / "out.csv")
    finally:
        weights.write_bytes(before)
    assert code.startswith(f"error: {trained / 'best.pt'}: was trained on other weights of {weights.parent} than")
    assert not (tmp_path / "out.csv").exists()


def test_the_published_emotion_model_predicts_by_name_and_shows_its_licence_once(
    published_model, recordings, tmp_path, monkeypatch, capsys
):
    """From its directory, and from its hub id; the rows are its own outputs, and the licence is not for every file."""
    folder, theirs = published_model
    monkeypatch.setattr(weights, "download", lambda repository: folder)
    printed = []
    for source in (folder, "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim"):
        run.note.cache_clear()
        assert command_line(monkeypatch, source, recordings) is None
        out, errors = capsys.readouterr()
        assert errors == f"note: {run.LICENCE}\n"
        assert "CC BY-NC-SA 4.0" in errors
        printed.append(out)
    assert printed[0] == printed[1]
    header, *rows = csv.reader(io.StringIO(printed[0]))
    assert header == ["file", "start", "end", "activation", "dominance", "valence"]
    assert len(rows) == 3
    for path, _, _, *found in rows:
        waveform = data.read_audio(path)
        normalised = (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-7).sqrt()
        with torch.no_grad():
            expected = theirs(normalised[None])[0].tolist()
        assert [float(value) for value in found] == pytest.approx(expected, abs=2e-4)  # four digits are written


def test_training_starts_from_the_published_model_without_its_head(
    published_model, recordings, tiny_manifest, tmp_path, monkeypatch, capsys
):
    """It is said, with the licence, once; and the run is one to predict with."""
    folder, _ = published_model
    run.note.cache_clear()
    keys = tiny_settings(tmp_path, folder, tiny_manifest, trainable_layers=1, epochs=1)
    train.train(Config(name="run", **keys))
    said = f"note: {folder}: its emotion head is left out; {run.LICENCE}"
    assert command_line(monkeypatch, tmp_path / "runs" / "run", recordings) is None
    out, errors = capsys.readouterr()
    assert errors.splitlines().count(said) == 1
    assert len(rows_of(out[out.index("file,") :])) == 3


# ---------------------------------------------------------------- bad input


class Hostile:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_what_is_no_run_is_one_clear_message(trained, recordings, tmp_path, monkeypatch):
    """An empty directory, a file of something else, a cut one, one that wants to run code: none is believed."""
    model = tmp_path / "model"
    model.mkdir()
    message = f"error: {model / 'best.pt'}: "
    code = command_line(monkeypatch, model, recordings)
    assert code == message + "no such file; expected a run's directory, as train.py writes it"
    torch.save({"weight": torch.zeros(2)}, model / "best.pt")
    assert command_line(monkeypatch, model, recordings) == message + "is no checkpoint of train.py"
    (model / "best.pt").write_bytes((trained / "best.pt").read_bytes()[:5000])
    assert command_line(monkeypatch, model, recordings).startswith(message + "is not a whole checkpoint (")
    torch.save({"trained": Hostile(tmp_path / "ran"), "backbone": {}}, model / "best.pt")
    assert command_line(monkeypatch, model, recordings).startswith(message + "is not a whole checkpoint (")
    assert not (tmp_path / "ran").exists()


def test_bad_arguments_are_one_clear_message(trained, recordings, tmp_path, monkeypatch, capsys):
    """A folder without audio, a window too short for a frame, a device and a place that are not there."""
    empty, out = tmp_path / "empty", tmp_path / "none" / "out.csv"
    empty.mkdir()
    (empty / "notes.txt").write_text("no audio")
    for arguments, expected in (
        ([recordings, empty], f"error: {empty}: no audio file in this folder"),
        ([recordings, "--window", "0.05"], "error: --window: expected at least 0.1 seconds, found 0.05"),
        ([recordings, "--window", "nan"], "error: --window: expected at least 0.1 seconds, found nan"),
        ([recordings, "--device", "tpu"], "error: device: 'tpu' is not a device"),
        ([recordings, "--out", out], f"error: {out}: cannot be written (No such file or directory)"),
    ):
        assert command_line(monkeypatch, trained, *arguments).startswith(expected)
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_not_blamed_on_the_audio(trained, recordings, monkeypatch):
    """The first row that cannot be written ends the work."""
    code = command_line(monkeypatch, trained, recordings, "--out", "/dev/full")
    assert code == "error: /dev/full: cannot be written (No space left on device)"
