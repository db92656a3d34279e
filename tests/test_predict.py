"""What `predict.py` promises: a row for all that can be read, in the label's scale, and a word about the rest."""

import csv
import io
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import forget_plots, speech_like, tiny_settings
from processes import python
from test_audio import encode, voice

import data
import freeze
import lora
import predict
import run
import train
from config import Config
from corpora.tree import folders_below
from formats import emotion, hub
from model import EmotionModel
from report import plots

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
HEADER = ["file", "start", "end", "activation", "valence"]


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
    """As a real process: every other row is there, status 1, no traceback; each row is the model's own prediction.

    What is named twice has one row.
    """
    (recordings / "bad.wav").write_bytes(b"RIFF")
    silent = recordings / "more" / "nan.wav"
    soundfile.write(silent, np.full(8000, np.nan, np.float32), 16_000, subtype="FLOAT")
    out = recordings / "out.csv"
    extra = recordings / "more" / "C.WAV"
    arguments = [trained, recordings, "missing.wav", extra, "--out", out, "--device", "cpu"]
    done = python("predict.py", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    first, *named = done.stderr.splitlines()
    assert first == "error: 3 of 6 files have no prediction:"
    assert [line.split(": ")[0] for line in named] == [str(recordings / "bad.wav"), str(silent), "missing.wav"]
    rows = rows_of(out.read_text(encoding="utf-8"))
    read = [recordings / "a.wav", recordings / "b.flac", extra]
    assert [row["file"] for row in rows] == [str(path) for path in read]
    model = run.load_run(trained)
    for row, path, seconds in zip(rows, read, (0.5, 0.5, 0.5), strict=True):
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

    def constant(*arguments, **options) -> EmotionModel:
        model = real(*arguments)
        torch.nn.init.zeros_(model.head[-1].weight)
        model.head[-1].bias.data = torch.tensor([0.0, 0.75])
        return model

    monkeypatch.setattr(run, "load_run", constant)
    assert command_line(monkeypatch, trained, recordings / "a.wav") is None
    (row,) = rows_of(capsys.readouterr().out)
    assert values(row) == {"activation": 1.0, "valence": 5.5}


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("seconds", "window", "count"), [(2.45, 1.0, 3), (2.0, 1.0, 2), (1.0, 1.0, 1), (0.7, 0.7, 1), (0.9, math.inf, 1)]
)
def test_windows_cover_a_file_without_gap_or_overlap(seconds, window, count):
    """Equal to a sample, at most `window` long."""
    spans = list(predict.spans(round(seconds * 16_000), window))
    assert len(spans) == count
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == round(seconds * 16_000)
    lengths = [stop - start for start, stop in spans]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= window * 16_000 + 1e-6


@pytest.mark.parametrize(
    ("samples", "window", "hop", "starts"),
    [
        (16_000, 0.5, 0.25, [0, 4000, 8000]),
        (16_001, 0.5, 0.25, [0, 4000, 8000, 8001]),
        (16_000, 0.4, 0.4, [0, 6400, 9600]),
        (8000, 0.5, 0.1, [0]),
        (5000, 0.5, 0.1, [0]),
        (5000, math.inf, math.inf, [0]),
        (1603, 0.1, 1e-9, [0, 1, 2, 3]),
    ],
)
def test_sliding_windows_by_hand(samples, window, hop, starts):
    """One every `hop`, all of one length, the last one at the end; a file that is shorter is one window."""
    size = min(window * 16_000, samples)
    assert list(predict.spans(samples, window, hop)) == [(start, start + size) for start in starts]


@pytest.mark.parametrize("hop", [None, 0.1, 0.03])
def test_no_window_is_too_short_for_the_model(hop):
    """Whatever the length of the file, with the shortest window that is allowed."""
    for samples in (400, 1600, 1601, 3201, 4799, 16_001):
        assert min(stop - start for start, stop in predict.spans(samples, 0.1, hop)) >= data.MIN_SAMPLES


@pytest.mark.parametrize("hop", [None, 0.2])
def test_a_long_file_gets_a_row_for_each_window(trained, tmp_path, monkeypatch, capsys, hop):
    """More windows than are in memory at once; each row is the prediction for its own stretch."""
    waveform = speech_like(10 * 8000 + 4000).numpy() / 4
    soundfile.write(tmp_path / "long.wav", waveform, 16_000, subtype="FLOAT")
    slide = ["--hop", hop] if hop else []
    assert command_line(monkeypatch, trained, tmp_path / "long.wav", "--window", "0.5", *slide) is None
    rows = rows_of(capsys.readouterr().out)
    spans = list(predict.spans(len(waveform), 0.5, hop))
    assert len(rows) == len(spans) == (25 if hop else 11)
    assert rows[-1]["end"] == "5.25"
    model = run.load_run(trained)
    for row, (start, stop) in zip(rows, spans, strict=True):
        assert (float(row["start"]), float(row["end"])) == pytest.approx((start / 16_000, stop / 16_000), abs=5e-4)
        assert values(row) == pytest.approx(model.predict(torch.tensor(waveform[start:stop]).float(), 16_000), abs=1e-3)


def test_predictions_do_not_depend_on_the_batch(trained, tmp_path):
    """Files of many lengths, cut and whole, together and alone: the same to 1e-5 of the scale, in the same order."""
    for number, samples in enumerate((400, 4000, 16_123, 8001, 30_000)):
        soundfile.write(tmp_path / f"{number}.wav", speech_like(samples, number).numpy() / 4, 16_000)
    model, found = run.load_run(trained), {}
    for batch in (1, 3, 64):
        stream = predict.windows(sorted(tmp_path.glob("*.wav")), 0.7, 0.3, [])
        groups = list(predict.predict(model, stream, batch))
        assert [len(group) for group, _ in groups[:-1]] == [batch] * (len(groups) - 1)
        places = [(window.number, window.start, window.stop) for group, _ in groups for window in group]
        found[batch] = places, torch.tensor([values for _, predictions in groups for values in predictions])
    for places, predictions in (found[3], found[64]):
        assert places == found[1][0]
        assert torch.allclose(predictions, found[1][1], rtol=0, atol=6e-5)
    assert found[1][1].std(0).min() > 1e-2  # else the comparison would say nothing


def test_few_windows_are_in_memory_whatever_the_files(trained, recordings, monkeypatch):
    """A file is read when its first window is due, one batch ahead; its waveform goes with its last window."""
    paths, waveforms, alive, real = [recordings / "a.wav"] * 40, [], [], data.read_audio

    def read(path, silent=None):
        waveform = real(path)
        waveforms.append(weakref.ref(waveform))
        alive.append(sum(each() is not None for each in waveforms))
        return waveform

    monkeypatch.setattr(data, "read_audio", read)
    for group, _ in predict.predict(run.load_run(trained), predict.windows(paths, 0.1, None, []), batch=2):
        del group
    assert len(alive) == 40
    assert max(alive) <= 4


def test_16_bit_moves_predictions_a_little(trained, recordings, monkeypatch, capsys):
    """By less than a twentieth of the scale, and not by nothing, which would be no 16 bit."""
    found = []
    for precision in ("fp32", "bf16"):
        assert command_line(monkeypatch, trained, recordings, "--precision", precision, "--device", "cpu") is None
        rows = rows_of(capsys.readouterr().out)
        found.append(np.array([list(values(row).values()) for row in rows]))
    assert found[0] == pytest.approx(found[1], abs=0.3)
    assert not np.array_equal(*found)


# ---------------------------------------------------------------- inputs and outputs


def test_patterns_and_a_list_on_stdin_name_files(recordings, monkeypatch):
    """A quoted pattern is expanded here, through folders too; a name that looks like one and is there is a file."""
    a, b, c = (recordings / name for name in ("a.wav", "b.flac", "more/C.WAV"))
    strange = recordings / "more" / "x[1].wav"
    shutil.copy(a, strange)
    shutil.copy(a, recordings / "._a.wav")  # as macOS leaves it, though that is no audio
    assert predict.find_audio([str(recordings / "**" / "*.[wf]*")]) == [a, b, strange]
    assert predict.find_audio([str(strange), str(recordings)]) == [strange, a, b, c]
    assert predict.find_audio([str(recordings / "m*")]) == [c, strange]  # a folder is searched
    missing = recordings / "missing.wav"
    text = f"{b}\n\n{missing}\r\n{recordings / 'more'}\n{b}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(text))))
    assert predict.find_audio(["-", str(a)]) == [b, missing, c, strange, a]


def test_one_file_under_two_names_is_predicted_once(recordings, monkeypatch):
    """However its path is written."""
    monkeypatch.chdir(recordings)
    assert predict.find_audio(["b.flac", f".{os.sep}b.flac", str(recordings / "more" / ".." / "b.flac")]) == [
        Path("b.flac")
    ]


def test_rows_as_json_lines(trained, recordings, tmp_path, monkeypatch, capsys):
    """The numbers of the CSV; asked for, or by the suffix of --out."""
    path = recordings / 'é, "b".wav'
    shutil.copy(recordings / "a.wav", path)
    assert command_line(monkeypatch, trained, recordings) is None
    expected = rows_of(capsys.readouterr().out)
    assert command_line(monkeypatch, trained, recordings, "--format", "jsonl") is None
    printed = capsys.readouterr().out
    for name, kind in (("out.jsonl", []), ("out.csv", ["--format", "jsonl"])):
        assert command_line(monkeypatch, trained, recordings, "--out", tmp_path / name, *kind) is None
        assert (tmp_path / name).read_text(encoding="utf-8") == printed
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["file"] for row in rows] == [row["file"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert list(row) == HEADER
        assert [row[column] for column in HEADER[1:]] == [float(other[column]) for column in HEADER[1:]]


def test_ctrl_c_leaves_the_rows_so_far(trained, recordings, tmp_path, monkeypatch):
    """In the second batch: what the first gave is in the file, whole, and the message is one line."""
    real, calls, out = EmotionModel.infer, [], tmp_path / "out.csv"

    def infer(self, waveforms):
        calls.append(None)
        if len(calls) == 2:
            assert len(rows_of(out.read_text(encoding="utf-8"))) == 2  # not only when the file is closed
            raise KeyboardInterrupt
        return real(self, waveforms)

    monkeypatch.setattr(EmotionModel, "infer", infer)
    code = command_line(monkeypatch, trained, recordings, "--out", out, "--batch", "2")
    assert code == "\nstopped; every row that is written is whole"
    assert len(rows_of(out.read_text(encoding="utf-8"))) == 2


def test_a_run_on_the_demo_corpus_says_so(trained, recordings, monkeypatch, capsys):
    """On stderr, so that the rows stay a table."""
    config = (trained / "config.yaml").read_text(encoding="utf-8")
    (trained / "config.yaml").write_text(config.replace("corpus: manifest", "corpus: demo"), encoding="utf-8")
    try:
        assert command_line(monkeypatch, trained, recordings / "a.wav") is None
    finally:
        (trained / "config.yaml").write_text(config, encoding="utf-8")
    printed, errors = capsys.readouterr()
    assert errors == run.DEMO_NOTE + "\n"
    assert len(rows_of(printed)) == 1


# ---------------------------------------------------------------- pictures


def test_every_file_gets_a_picture(trained, recordings, tmp_path, monkeypatch, capsys):
    """Of all its windows, whatever the batch; two files of one name get one each, a file that is none gets none."""
    drawn = []
    monkeypatch.setattr(plots, "timeline", lambda *arguments: drawn.append(arguments))
    again = recordings / "more" / "A.flac"
    soundfile.write(again, speech_like(4000, 3).numpy() / 4, 16_000)
    (recordings / "bad.wav").write_bytes(b"RIFF")
    arguments = [recordings, "--plot", tmp_path / "some" / "pictures", "--window", "0.2", "--batch", "2"]
    assert command_line(monkeypatch, trained, *arguments).startswith("error: 1 of 5 files")
    rows = rows_of(capsys.readouterr().out)
    files = [recordings / "a.wav", recordings / "b.flac", again, recordings / "more" / "C.WAV"]
    assert [arguments[-1] for arguments in drawn] == [
        tmp_path / "some" / "pictures" / n for n in ("a", "b", "A_2", "C")
    ]
    for path, (waveform, windows, targets, label_range, title, note, _) in zip(files, drawn, strict=True):
        spans, predictions = windows[:, :2], windows[:, 2:]
        assert waveform == pytest.approx(data.read_audio(path).numpy())
        own = [row for row in rows if row["file"] == str(path)]
        assert spans == pytest.approx(np.array([[float(row["start"]), float(row["end"])] for row in own]), abs=6e-4)
        assert predictions == pytest.approx(np.array([list(values(row).values()) for row in own]), abs=6e-5)
        assert (targets, label_range, title, note) == (("activation", "valence"), (1.0, 7.0), path.name, "")


def test_a_picture_that_cannot_be_written_is_named(trained, recordings, tmp_path, monkeypatch, capsys):
    """And not taken for the table; the rows are there."""

    def timeline(*arguments) -> None:
        raise OSError("a.png: cannot be written (No space left on device)")

    monkeypatch.setattr(plots, "timeline", timeline)
    code = command_line(monkeypatch, trained, recordings, "--plot", tmp_path / "pictures")
    assert code == "error: a.png: cannot be written (No space left on device)"
    assert len(rows_of(capsys.readouterr().out)) == 3


def test_a_real_picture(trained, recordings, tmp_path, monkeypatch):
    assert command_line(monkeypatch, trained, recordings / "a.wav", "--plot", tmp_path / "pictures") is None
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"a.png", "a.pdf"}


def test_without_matplotlib_there_is_all_but_pictures(trained, recordings, tmp_path, monkeypatch, capsys):
    """And whoever asks for one is told before anything is computed."""
    forget_plots(monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command_line(monkeypatch, trained, recordings / "a.wav") is None
    assert len(rows_of(capsys.readouterr().out)) == 1
    code = command_line(monkeypatch, trained, recordings / "a.wav", "--plot", tmp_path / "pictures")
    assert code == "error: --plot: needs the package matplotlib; pip install matplotlib"
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- files that are named


def test_what_is_wrong_with_a_file_is_said(trained, recordings, monkeypatch, capsys):
    """A video container, a header without a rate, and a file of nothing; a row for what is none of these."""
    header = bytearray((recordings / "a.wav").read_bytes())
    header[24:28] = bytes(4)
    bad = {"rate.wav": header, "clip.mp4": b"\0\0\0 ftypisom" + bytes(100), "nothing.wav": b""}
    for name, content in bad.items():
        (recordings / name).write_bytes(content)
    code = command_line(monkeypatch, trained, *(recordings / name for name in ("b.flac", *bad)))
    assert code.splitlines() == [
        "error: 3 of 4 files have no prediction:",
        f"{recordings / 'rate.wav'}: its header declares a sample rate of 0 Hz; convert it again",
        f"{recordings / 'clip.mp4'}: not audio that can be read (Invalid data found when processing input); "
        "convert it to WAV or FLAC",
        f"{recordings / 'nothing.wav'}: empty file (0 bytes); copy it again or leave it out",
    ]
    assert len(rows_of(capsys.readouterr().out)) == 1


IN_TURN = """
import runpy, sys

given = sys.argv[1:]
for more in ([], ["--out", given.pop()], ["--format", "jsonl"]):
    sys.argv = ["predict.py", *given, *more]
    runpy.run_path("predict.py", run_name="__main__")
    print("\\n---", flush=True)
"""  # one start of Python for three commands


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file system takes no such name")
@pytest.mark.parametrize(
    "environment",
    [{}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"}],
    ids=["utf8", "ascii", "latin1", "C"],
)
def test_a_name_that_is_not_utf8_is_read_and_written_back_as_it_is(trained, recordings, tmp_path, environment):
    """Byte by byte, into a pipe and a CSV; beside it a name that the encoding of the pipe may not have."""
    raw, accent = os.fsencode(recordings) + b"/\xff\xfe.wav", os.fsencode(recordings / "é \u4e2d.wav")
    for name in (raw, accent):
        shutil.copy(os.fsencode(recordings / "a.wav"), name)
    out = tmp_path / "out.csv"
    program = tmp_path / "in_turn.py"
    program.write_text(IN_TURN)
    words = [program, trained, recordings, "--device", "cpu", out]
    if "LC_ALL" in environment:  # decides how Python starts
        places = {"PYTHONPATH": str(ROOT)}
        given = {"cwd": ROOT, "env": os.environ | places | environment, "capture_output": True, "timeout": 120}
        done = subprocess.run([sys.executable, *words], **given)
        said = done.stdout
    else:
        done = python(*words, **environment)
        said = os.fsencode(done.stdout)
    assert done.returncode == 0, done.stderr
    table, nothing, rows, end = said.replace(os.linesep.encode(), b"\n").split(b"\n---\n")
    assert len(table.splitlines()) == 6 and raw + b"," in table
    assert (nothing, end) == (b"", b"")
    lines = out.read_bytes().splitlines()
    assert len(lines) == 6 and {raw, accent} <= {line.split(b",")[0] for line in lines}
    assert {raw, accent} <= {os.fsencode(json.loads(row)["file"]) for row in rows.splitlines()}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file system takes no such name")
def test_a_bad_file_whose_name_is_not_utf8_is_named(trained, recordings):
    """On a terminal of ASCII, too."""
    with open(os.fsencode(recordings) + b"/\xff.wav", "wb") as file:
        file.write(b"no sound")
    done = python("predict.py", trained, recordings, "--device", "cpu", PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 4
    assert "error: 1 of 4 files have no prediction:" in done.stderr and "\\udcff.wav: not audio" in done.stderr


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


def test_a_backbone_that_has_moved_is_found_where_the_option_says(
    trained, recordings, tmp_path, tiny_large_checkpoint, monkeypatch, capsys
):
    """The same rows as before. Without the option the error names it; other weights there are refused."""
    assert command_line(monkeypatch, trained, recordings / "a.wav") is None
    before = capsys.readouterr().out
    backbone, moved = trained.parents[1] / "backbone", tmp_path / "moved"
    backbone.rename(moved)
    try:
        message = command_line(monkeypatch, trained, recordings / "a.wav")
        assert message.endswith("if the backbone is elsewhere now, say so with --backbone")
        assert command_line(monkeypatch, trained, recordings / "a.wav", "--backbone", moved) is None
        assert capsys.readouterr().out == before
        message = command_line(monkeypatch, trained, recordings / "a.wav", "--backbone", tiny_large_checkpoint)
        assert f"was trained on other weights of {tiny_large_checkpoint} than are found now" in message
    finally:
        moved.rename(backbone)


def test_a_published_model_takes_no_other_backbone(published_model, recordings, monkeypatch):
    """An option without effect is refused."""
    message = command_line(monkeypatch, published_model[0], recordings / "a.wav", "--backbone", "elsewhere")
    assert (
        message
        == f"error: --backbone: {published_model[0]} is a published emotion model, which has its own; leave it out"
    )


def test_the_published_emotion_model_predicts_by_name_and_shows_its_licence_once(
    published_model, recordings, tmp_path, monkeypatch, capsys
):
    """From its directory, and from its hub id; the rows are its own outputs, and the licence is not for every file."""
    folder, theirs = published_model
    monkeypatch.setattr(hub, "fetch", lambda *_: folder)
    printed = []
    for source in (folder, "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim"):
        data.say_once.cache_clear()
        assert command_line(monkeypatch, source, recordings) is None
        out, errors = capsys.readouterr()
        assert errors == f"note: {emotion.LICENCE}\n"
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
    data.say_once.cache_clear()
    keys = tiny_settings(tmp_path, folder, tiny_manifest, trainable_layers=1, epochs=1)
    train.train(Config(name="run", **keys))
    said = f"note: {folder}: its emotion head is left out; {emotion.LICENCE}"
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
    """A folder, pattern or list without audio, a window too short for a frame, a device and a place that are not."""
    empty, out = tmp_path / "empty", tmp_path / "none" / "out.csv"
    empty.mkdir()
    notes = empty / "notes.txt"
    notes.write_text("no audio")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    hop = "--hop: expected above 0 and at most the window"
    for arguments, expected in (
        ([recordings, empty], f"error: {empty}: no audio file in this folder, found *.txt"),
        ([recordings, empty / "*.wav"], f"error: {empty / '*.wav'}: nothing matches this pattern"),
        (["-"], "error: -: no path on standard input"),
        ([recordings, "--window", "0.05"], "predict.py: error: --window: expected at least 0.1 seconds, found 0.05"),
        ([recordings, "--window", "nan"], "predict.py: error: --window: expected at least 0.1 seconds, found nan"),
        ([recordings, "--hop", "0"], f"predict.py: error: {hop}, 20 seconds, found 0.0"),
        ([recordings, "--hop", "nan"], f"predict.py: error: {hop}, 20 seconds, found nan"),
        ([recordings, "--window", "2", "--hop", "2.1"], f"predict.py: error: {hop}, 2 s"),
        ([recordings, "--batch", "0"], "predict.py: error: --batch: expected at least 1, found 0"),
        ([recordings, "--format", "xml"], "predict.py: error: argument --format: invalid choice: 'xml' (choose from "),
        (
            [recordings, "--precision", "int8"],
            "predict.py: error: argument --precision: invalid choice: 'int8' (choose",
        ),
        ([recordings, "--device", "tpu"], "error: device: 'tpu' is not a device"),
        ([recordings, "--out", out], f"error: {out}: cannot be written (No such file or directory)"),
        ([recordings, "--plot", notes], f"predict.py: error: --plot: expected a directory, found {notes}"),
    ):
        code = command_line(monkeypatch, trained, *arguments)
        printed, said = capsys.readouterr()
        assert (said.splitlines()[-1] if code == 2 else code).startswith(expected)
        assert printed == "" and (code == 2) is bool(said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_not_blamed_on_the_audio(trained, recordings, monkeypatch):
    """The first row that cannot be written ends the work."""
    code = command_line(monkeypatch, trained, recordings, "--out", "/dev/full")
    assert code == "error: /dev/full: cannot be written (No space left on device)"


def test_a_folder_of_recordings_in_many_formats_through_links(trained, tmp_path):
    """Read as they are, a film too; a link that goes round in a circle ends; silence is predicted and named."""
    folder, other = tmp_path / "rec", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    kinds = [
        ("m4a", "aac", 44_100),
        ("webm", "libopus", 48_000),
        ("amr", "libopencore_amrnb", 8000),
        ("mp3", "libmp3lame", 16_000),
    ]
    for suffix, codec, rate in kinds:
        encode(other / f"a.{suffix}", codec, voice(rate, 2.0), rate)
    soundfile.write(folder / "quiet.wav", np.zeros((8000, 2)), 16_000)
    try:
        (folder / "day2").symlink_to(other, target_is_directory=True)
        (other / "round").symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("no links on this system")
    command = ["predict.py", trained, folder, "--device", "cpu"]
    done = python(*command)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(done.stdout)) == 5
    assert done.stderr.splitlines()[-2:] == [
        "warning: nothing can be heard in 1 of the files:",
        f"{folder / 'quiet.wav'}: silent, or its channels cancel: no sample is above 0 of full scale",
    ]
    (folder / "broken.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(64))
    done = python(*command)
    assert done.returncode == 1 and len(rows_of(done.stdout)) == 5 and "broken.m4a: not audio" in done.stderr


def test_what_looks_like_audio_in_a_folder_is_read_or_named(trained, recordings, monkeypatch, capsys):
    """By its suffix, whether FFmpeg knows it or not, or without one by its first bytes; pictures and texts are not."""
    for name in ("take1", "upload.tmp"):
        shutil.copy(recordings / "a.wav", recordings / name)
    encode(recordings / "Voice 001.3gp", "aac", voice(16_000, 1.0), 16_000)
    (recordings / "Voice 001.3gp").rename(recordings / "Voice 001.3gpp")
    bad = {
        "phone.3gpp": b"\0" * 99,
        "raw.PCM": bytes(999),
        "tune.mid": b"MThd" + bytes(20),
        "a.wav.gz": b"\x1f\x8b" * 9,
    }
    others = {
        "cover.jpg": b"\xff\xd8\xff\xe0",
        "photo.heic": b"\0\0\0\x18ftypheic" + bytes(9),
        "page": b"RIFF\0\0\0\0WEBP",
    }
    for name, content in (bad | others | {"list.m3u8": b"#EXTM3U", "empty": b""}).items():
        (recordings / name).write_bytes(content)
    code = command_line(monkeypatch, trained, recordings)
    assert code.splitlines()[0] == "error: 4 of 10 files have no prediction:"
    assert {Path(line.split(": ")[0]).name for line in code.splitlines()[1:]} == bad.keys()
    read = {Path(row["file"]).name for row in rows_of(capsys.readouterr().out)}
    assert read == {"a.wav", "b.flac", "C.WAV", "take1", "upload.tmp", "Voice 001.3gpp"}


def test_a_film_without_sound_is_named(trained, recordings, monkeypatch, capsys):
    """It is left out, so the exit status is not 0."""
    av = pytest.importorskip("av")
    with av.open(str(recordings / "silent film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for _ in range(3):
            film.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        film.mux(stream.encode(None))
    code = command_line(monkeypatch, trained, recordings)
    assert code.splitlines()[1] == f"{recordings / 'silent film.mp4'}: has no audio track, found video; leave it out"
    assert len(rows_of(capsys.readouterr().out)) == 3


def test_a_folder_that_cannot_be_searched_is_named(trained, recordings, monkeypatch, capsys):
    """The others are predicted; in a published corpus it is an error."""
    real, locked = os.scandir, recordings / "more"

    def scandir(path):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    code = command_line(monkeypatch, trained, recordings)
    assert code.startswith(f"error: 1 of 3 files have no prediction:\n{locked}: cannot be read: ")
    assert len(rows_of(capsys.readouterr().out)) == 2
    assert predict.find_audio([str(recordings / "**" / "*.wav")])[1:] == [locked]
    with pytest.raises(PermissionError):
        list(folders_below(recordings))


def test_patterns_go_through_links_and_end_where_these_go_round(recordings):
    """Two links to the top would lead through 2^40 folders; hidden folders are left out, as in a shell."""
    for name in ("one", "two"):
        (recordings / "more" / name).symlink_to(recordings, target_is_directory=True)
    hidden = recordings / ".hidden"
    (hidden / "below").mkdir(parents=True)
    shutil.copy(recordings / "a.wav", hidden / "below")
    other = recordings.parent / "other"
    (other / "x" / "day").mkdir(parents=True)
    shutil.copy(recordings / "a.wav", other / "x" / "day")
    (recordings / "linked").symlink_to(other, target_is_directory=True)
    found = predict.find_audio([str(recordings / "**" / "*.wav")])
    assert found == [recordings / "a.wav", recordings / "linked" / "x" / "day" / "a.wav"]
    assert predict.find_audio([str(recordings / "**" / "x" / "**" / "*.wav")]) == found[1:]
    assert predict.find_audio([str(hidden / "**" / "*.wav")]) == [hidden / "below" / "a.wav"]


def test_patterns_are_relative_to_where_the_command_runs(recordings, monkeypatch):
    """And the rows keep such names."""
    monkeypatch.chdir(recordings)
    assert predict.find_audio(["**/*.[wW][aA][vV]"]) == [Path("a.wav"), Path("more/C.WAV")]


def test_a_list_from_windows_is_understood(trained, recordings, monkeypatch, capsys):
    """A byte order mark, CRLF, blanks and backslashes; a path that is nowhere and UTF-16 are named."""
    monkeypatch.chdir(recordings)
    text = "\ufeffa.wav\r\n  \r\nmore\\C.WAV\r\nmore\\D.WAV\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code = command_line(monkeypatch, trained, "-")
    assert code.splitlines()[1:] == ["path 'more\\\\D.WAV' has backslashes, and with / there is no such file either"]
    assert [row["file"] for row in rows_of(capsys.readouterr().out)] == ["a.wav", "more\\C.WAV"]
    for encoding in ("utf-16", "utf-16-be"):
        content = ("\ufeff" if encoding == "utf-16-be" else "") + "a.wav\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode(encoding))))
        assert command_line(monkeypatch, trained, "-") == "error: -: the list is UTF-16; save it as UTF-8"


def test_home_and_variables_are_expanded(trained, recordings, tmp_path, monkeypatch):
    """Where a shell does not: in quotes and in a list."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("DAY", "recordings")
    assert predict.find_audio(["~/recordings/*.wav"]) == predict.find_audio(["~/$DAY/a.wav"]) == [recordings / "a.wav"]
    assert command_line(monkeypatch, trained, "~/$DAY/a.wav", "--out", "~/out.csv") is None
    assert (tmp_path / "out.csv").is_file()
    strange = recordings / "$DAY.wav"
    shutil.copy(recordings / "a.wav", strange)
    assert predict.find_audio([str(strange)]) == [strange]


def test_what_cannot_be_heard_is_predicted_and_named_at_the_end(trained, recordings, monkeypatch, capsys):
    """Silence, a constant, and a stereo file whose channels cancel; before the files that cannot be read."""
    wave = voice(16_000, 0.5)
    sounds = {"zero.wav": np.zeros(8000), "constant.wav": np.full(8000, 0.3), "cancels.wav": np.stack([wave, -wave], 1)}
    for name, sound in sounds.items():
        soundfile.write(recordings / name, sound, 16_000, subtype="FLOAT")
    (recordings / "bad.wav").write_bytes(b"RIFF")
    code = command_line(monkeypatch, trained, recordings)
    printed, said = capsys.readouterr()
    rows = rows_of(printed)
    assert sounds.keys() <= {Path(row["file"]).name for row in rows} and len(rows) == 6
    assert all(math.isfinite(value) for row in rows for value in values(row).values())
    first, *named = said.splitlines()[-4:]
    assert first == "warning: nothing can be heard in 3 of the files:"
    assert {Path(line.split(": ")[0]).name for line in named} == sounds.keys()
    assert code.startswith("error: 1 of 7 files have no prediction:")
