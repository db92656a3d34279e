"""What `data` promises: corpora, manifests, audio of any kind, resampling, batches, prefetching, the demo."""

import csv
import math
import shutil
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
from corpora.demo import synthesize_demo
from machine import audio

ROOT = Path(__file__).parents[1]
HEADER = "path,split,speaker,activation,valence"


def tone(seconds: float = 0.5, rate: int = 16_000, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write_manifest(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "manifest.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def utterance(path="a.wav", split="train", speaker="s", **labels: float) -> data.Utterance:
    return data.Utterance(str(path), split, speaker, labels or {"activation": 4.0, "valence": 4.0})


def corpus(**changes) -> list[data.Utterance]:
    """Two right utterances for each split, the first of them changed."""
    rows = [
        {"path": f"{split}{n}.wav", "split": split, "speaker": split, "activation": 2.0 + n, "valence": 6.0 - n}
        for split in data.SPLITS
        for n in range(2)
    ]
    if changes:
        rows[0] = {"path": "a.wav", "split": "train", "speaker": "train", **changes}
    return [utterance(**row) for row in rows]


# ---------------------------------------------------------------- corpora and manifests


def test_unknown_corpus_suggests_the_nearest():
    """A mistyped name is an error that lists what there is."""
    with pytest.raises(ValueError, match=r"'demmo' is unknown, .* manifest, demo, .*; did you mean 'demo'\?"):
        data.load_corpus("demmo")
    with pytest.raises(
        ValueError,
        match=r"'xyzzy' is unknown, expected one of manifest, demo, msp-podcast, emotale, iemocap, .*, muse$",
    ):
        data.load_corpus("xyzzy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "manifest"}, "needs a CSV; set `manifest: FILE`"),
        (
            {"name": "manifest", "manifest": "m.csv", "fold": 1},
            "fold: corpus 'manifest' has no use for it, found 1; remove the key",
        ),
        (
            {"name": "manifest", "manifest": "m.csv", "root": "r"},
            "data_root: corpus 'manifest' has no use for it, found 'r'",
        ),
        ({"name": "demo", "fold": 0}, "fold: corpus 'demo' has no use for it, found 0"),
        ({"name": "demo", "manifest": "m.csv"}, "manifest: corpus 'demo' has no use for it, found 'm.csv'"),
    ],
)
def test_a_corpus_refuses_arguments_it_would_ignore(arguments, message):
    """No key is silently without effect."""
    with pytest.raises(ValueError, match=message):
        data.load_corpus(**arguments)


def test_manifest_paths_are_relative_to_the_manifest(tmp_path, monkeypatch):
    """... wherever the program runs; absolute paths stay."""
    elsewhere = tmp_path / "else" / "b.wav"
    write_manifest(tmp_path, "sub/a.wav,train,s1,1.5,2", f"{elsewhere},dev,s2,3,4")
    monkeypatch.chdir(tmp_path)
    first, second = data.load_corpus("manifest", manifest="manifest.csv")
    assert Path(first.path) == tmp_path / "sub" / "a.wav"
    assert Path(second.path) == elsewhere
    assert first == data.Utterance(first.path, "train", "s1", {"activation": 1.5, "valence": 2.0})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_manifest_columns_go_by_name(tmp_path, encoding):
    """Order, byte order mark, blank lines, CRLF, spaces, letters beyond ASCII, other columns: no harm."""
    path = tmp_path / "m.csv"
    text = "valence, note,dominance,activation,speaker,split,path\r\n\r\n2,x,,3, Zoë ,test,größe.wav\r\n"
    path.write_bytes(text.encode(encoding))
    (only,) = data.read_manifest(path)
    labels = {"activation": 3.0, "valence": 2.0}
    assert only == data.Utterance(str(tmp_path / "größe.wav"), "test", "Zoë", labels)


def test_all_bad_manifest_rows_are_reported_at_once(tmp_path):
    """One error holds every bad row with its line, what was found and what was expected."""
    rows = [
        "a.wav,train,s,1,2",
        "b.wav,validation,s,1,2",
        "c.wav,dev,s,high,2",
        "d.wav,dev,s,1",
        ",dev,s,1,2",
    ]
    with pytest.raises(ValueError) as error:
        data.read_manifest(write_manifest(tmp_path, *rows))
    assert str(error.value).splitlines()[1:] == [
        "  line 3: split 'validation', expected one of train, dev, test",
        "  line 4: activation 'high' is not a number",
        "  line 5: 4 cells, expected 5",
        "  line 6: path is empty",
    ]
    assert "manifest.csv: bad rows in the manifest (4):" in str(error.value)


def test_a_long_list_of_bad_rows_is_cut(tmp_path):
    """Twenty rows and the number of the others: a screen, not a flood."""
    with pytest.raises(ValueError, match=r"line 21: .*\n  and 30 more$") as error:
        data.read_manifest(write_manifest(tmp_path, *["a.wav,tune,s,1,2"] * 50))
    assert len(str(error.value).splitlines()) == 22


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the manifest is empty, expected a header path,split"),
        (b"\n\n", "the manifest is empty"),
        (HEADER.encode(), "has a header but no rows"),
        (HEADER.encode() + b"\n\n\n", "has a header but no rows"),
        (b"path;split;speaker\n", "no column path, .*separated by commas"),
        (HEADER.encode() + b"\nM\xfcller.wav,train,s,1,2\n", "not UTF-8 .*save it as UTF-8"),
        (HEADER.encode("utf-16"), "the manifest is UTF-16; save it as UTF-8"),
        (HEADER.encode() + b"\n" + b"x" * 200_000 + b",train,s,1,2\n", "not a CSV file: field larger"),
    ],
)
def test_an_unusable_manifest_says_why(tmp_path, content, message):
    """Each names the file, what was found and what was expected."""
    path = tmp_path / "odd.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"odd\.csv: (?s:.*){message}"):
        data.read_manifest(path)


def test_a_missing_manifest_says_so(tmp_path):
    """A file that is not there is FileNotFoundError, a folder in its place ValueError; both name it."""
    with pytest.raises(FileNotFoundError, match=r"absent\.csv: no such manifest"):
        data.read_manifest(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="cannot be read"):
        data.read_manifest(tmp_path)


def test_a_manifest_of_300_000_rows_is_read_in_seconds(tmp_path):
    """Reading and checking labels is linear and light, so that a large corpus starts at once."""
    splits = ["train"] * 8 + ["dev", "test"]
    rows = (f"audio/{i:06d}.wav,{splits[i % 10]},s{i % 10},{1 + i % 7},{7 - i % 7}" for i in range(300_000))
    path = write_manifest(tmp_path, *rows)
    start = time.process_time()
    utterances = data.read_manifest(path)
    data.check_labels(utterances, ["activation", "valence"], (1, 7))
    assert len(utterances) == 300_000
    assert time.process_time() - start < 6  # 1.5 s when the machine has nothing else to do


def test_manifests_of_wav_need_no_folder_beside_machine(tmp_path):
    """Three files read a manifest of WAV; what needs more says which folder or package is missing."""
    for name in ("config.py", "data.py", "machine/__init__.py", "machine/audio.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    soundfile.write(tmp_path / "a.wav", tone(), 16_000)
    soundfile.write(tmp_path / "a.mp3", tone(), 16_000)
    write_manifest(tmp_path, "a.wav,train,s,1,2")
    lines = [
        "import sys, data",
        "print(len(data.read_audio(data.load_corpus('manifest', manifest='manifest.csv')[0].path)))",
        "for work in (lambda: data.load_corpus('iemocap', '.', fold=1), lambda: data.read_audio('a.mp3')):",
        "    try: work()",
        "    except ValueError as error: print(error)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    missing = "the folder {}/ is not beside config.py; copy it"
    assert done.stdout.splitlines() == [
        "8000",
        f"corpus: iemocap: needs corpora.published, but {missing.format('corpora')}",
        f"a.mp3: it is neither WAV nor FLAC: needs formats.media, but {missing.format('formats')}",
    ]
    (tmp_path / "formats").mkdir()
    shutil.copy(ROOT / "formats" / "media.py", tmp_path / "formats")
    command[2] = command[2].replace("data\n", "data\nsys.modules['av'] = None\n", 1)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "needs the package av; pip install av" in done.stdout


# ---------------------------------------------------------------- labels and speakers


def test_right_labels_pass():
    """The ends of the range are inside it, and a label that is no target may be absent."""
    data.check_labels(corpus(activation=1.0, valence=7.0), ["activation", "valence"], (1, 7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": 7.5, "valence": 1.0}, r"a.wav: activation is 7.5, outside `label_range` 1 to 7"),
        ({"activation": 0.99, "valence": 1.0}, "activation is 0.99, outside"),
        ({"activation": math.nan, "valence": 1.0}, "activation is nan, expected a finite number"),
        ({"activation": 1.0, "valence": math.inf}, "valence is inf, expected a finite number"),
        ({"valence": 1.0}, "no label for target 'activation', found valence"),
        ({"speaker": "test"}, "speaker 'test' is in train and test; .*`allow_speaker_overlap: true`"),
    ],
)
def test_wrong_labels_splits_and_speakers_are_errors(changes, message):
    """Each says where, what was found, what was expected, and the key that is the way out."""
    with pytest.raises(ValueError, match=message):
        data.check_labels(corpus(**changes), ["activation", "valence"], (1, 7))


def test_all_label_problems_come_in_one_error():
    """A user mends the corpus once, not once per problem."""
    rows = [row for row in corpus() if row.split != "test"]
    rows += [utterance("x.wav", activation=9.0, valence=1.0), utterance("y.wav", split="dev", valence=1.0)]
    with pytest.raises(ValueError, match=r"(?s)\(4\).*split 'test'.*x.wav: .*y.wav: .*speaker 's'"):
        data.check_labels(rows, ["activation", "valence"], (1, 7))


def test_speakers_without_a_name_are_not_shared():
    """Nobody ("") and "Unknown" may be in every split, and so may all speakers if the user says so."""
    for speaker, allow in (("", False), ("Unknown", False), ("s", True)):
        rows = [replace(row, speaker=speaker) for row in corpus()]
        data.check_labels(rows, ["valence"], (1, 7), allow_speaker_overlap=allow)


def test_targets_name_the_columns_that_are_needed(tmp_path):
    """Any column can be a target; those that are not named may hold anything, or not be there."""
    path = write_manifest(tmp_path, "a.wav,train,s,0.5,n/a", header="path,split,speaker,tension,activation")
    assert data.read_manifest(path, ["tension"])[0].labels == {"tension": 0.5}
    with pytest.raises(ValueError, match=r"no column valence, calm; found \['path', 'split', 'speaker', 'tension'"):
        data.read_manifest(path, ["valence", "calm", "tension"])
    alone = write_manifest(tmp_path, "a.wav,train,s,2", header="path,split,speaker,valence")
    assert data.load_corpus("manifest", manifest=str(alone))[0].labels == {"valence": 2.0}


@pytest.mark.parametrize("column", ["activation", "arousal", "Arousal", "Activation"])
@pytest.mark.parametrize("target", ["activation", "arousal"])
def test_arousal_is_another_word_for_activation(tmp_path, column, target):
    """In the manifest and in `targets`; a column of the very name comes first."""
    path = write_manifest(tmp_path, "a.wav,train,s,2.5", header=f"path,split,speaker,{column}")
    assert data.read_manifest(path, [target])[0].labels == {target: 2.5}
    both = write_manifest(tmp_path, "a.wav,train,s,1,2", header="path,split,speaker,arousal,activation")
    assert data.read_manifest(both, ["activation"])[0].labels == {"activation": 2.0}


@pytest.mark.parametrize("split", data.SPLITS)
@pytest.mark.parametrize("kind", ["one", "constant"])
def test_a_split_without_two_different_labels_is_refused(split, kind):
    """Its CCC is 0/0: no epoch could be chosen, or no score exists. Other targets do not matter."""
    rows = [row for row in corpus() if kind == "constant" or row.path != f"{split}1.wav"]
    for row in rows:
        row.labels["valence"] = 4.0 if row.split == split else row.labels["valence"]
    expected = rf"split '{split}' has no two different labels of valence; its CCC would be 0/0"
    with pytest.raises(ValueError, match=expected):
        data.check_labels(rows, ["activation", "valence"], (1, 7))
    if kind == "constant":
        data.check_labels(rows, ["activation"], (1, 7))


def test_one_file_in_two_splits_is_refused():
    """Whatever its spelling and its speaker."""
    rows = [replace(row, path=f"audio/{row.path}") for row in corpus()]
    rows.append(replace(rows[0], path="audio/../audio/train0.wav", split="test", speaker="other"))
    with pytest.raises(ValueError, match=r"audio/train0\.wav: is in (train and in test|test and in train); an utter"):
        data.check_labels(rows, ["activation"], (1, 7))


def test_one_file_with_several_labels_is_refused_and_its_parts_are_not():
    """Rows are whole files unless `start` and `end` say otherwise; parts of different splits may not overlap."""
    rows = corpus()
    again = replace(rows[0], labels={"activation": 5.0, "valence": 5.0})
    with pytest.raises(ValueError, match=r"train0\.wav: has several rows with different labels; .*`start` and `end`"):
        data.check_labels([*rows, again], ["activation"], (1, 7))
    parts = [replace(rows[0], start=0.0, end=1.0), replace(again, start=1.0, end=2.0)]
    data.check_labels([*rows[1:], *parts], ["activation"], (1, 7))
    data.check_labels([*rows, rows[0]], ["activation"], (1, 7))  # the same row twice is no contradiction
    overlapping = replace(again, start=0.5, end=2.0, split="dev", speaker="dev")
    with pytest.raises(ValueError, match=r"train0\.wav: is in train and in dev"):
        data.check_labels([*rows[1:], parts[0], overlapping], ["activation"], (1, 7))


def test_segments_of_a_manifest(tmp_path):
    """`start` and `end` in seconds; either or both may be empty."""
    header = "path,split,speaker,start,end,activation,valence"
    rows = ["a.wav,train,s,0.5,1.25,1,2", "a.wav,train,s,1.25,,1,2", "a.wav,train,s,,0.5,1,2", "b.wav,dev,t,,,1,2"]
    utterances = data.read_manifest(write_manifest(tmp_path, *rows, header=header))
    assert [(u.start, u.end) for u in utterances] == [(0.5, 1.25), (1.25, None), (0.0, 0.5), (0.0, None)]
    names = [Path(u.source).name for u in utterances]
    assert names == ["a.wav#t=0.5,1.25", "a.wav#t=1.25,", "a.wav#t=0,0.5", "b.wav"]
    soundfile.write(tmp_path / "a.wav", tone(2), 16_000)
    assert data.check_audio(utterances[:3]) == [0.75, 0.75, 0.5]
    for cells, found in (
        ("2,1", "start 2 and end 1.0"),
        ("-1,1", "start -1"),
        ("nan,1", "start nan"),
        ("1,1", "start 1"),
    ):
        path = write_manifest(tmp_path, f"a.wav,train,s,{cells},1,2", header=header)
        with pytest.raises(ValueError, match=f"line 2: {found}.*expected seconds, the end after the start"):
            data.read_manifest(path)


def test_lists_from_windows(tmp_path):
    """Backslashes where the file is under forward slashes, a line of blanks, a byte order mark."""
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", tone(), 16_000)
    path = tmp_path / "m.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\r\naudio\\a.wav,train,s,1,2\r\n , ,,\t, \r\n".encode())
    (only,) = data.read_manifest(path)
    assert Path(only.path) == tmp_path / "audio" / "a.wav"
    path.write_text(f"{HEADER}\nD:\\audio\\b.wav,train,s,1,2\n")
    with pytest.raises(
        ValueError, match=r"line 2: path 'D:.*b\.wav' has backslashes, and with / there is no such file"
    ):
        data.read_manifest(path)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((0.1, 0.9), "[0, 1]"),
        ((-0.5, 0.7), "[-1, 1]"),
        ((1.5, 4.5), "[1, 5]"),
        ((1.2, 6.9), "[1, 7]"),
        ((1, 9), "[1, 9]"),
        ((0, 7.5), "[0, 10]"),
        ((3, 80), "[0, 100]"),
        ((-40.5, 300), "[-41, 300]"),
    ],
)
def test_a_missing_label_range_is_proposed(labels, expected):
    """A line to paste, from the labels of the targets."""
    rows = [utterance(valence=label, activation=1000.0) for label in labels]
    with pytest.raises(ValueError) as error:
        data.find_label_range("manifest", None, rows, ["valence"])
    assert str(error.value).splitlines()[1] == f"label_range: {expected}"
    assert data.find_label_range("manifest", [2, 3], rows, ["valence"]) == (2, 3)


def test_label_scaling_is_exact_at_the_ends_and_inverts():
    """The ends of the corpus scale are 0 and 1, and the way back is the identity."""
    labels = torch.tensor([[1.0, 7.0], [4.0, 2.5]])
    scaled = data.scale_labels(labels, (1, 7))
    assert torch.equal(scaled, torch.tensor([[0.0, 1.0], [0.5, 0.25]]))
    assert torch.allclose(data.unscale_labels(scaled, (1, 7)), labels)


# ---------------------------------------------------------------- good audio


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        ("wav", "PCM_U8", 2e-2),
        ("wav", "PCM_16", 1e-4),
        ("wav", "PCM_24", 1e-6),
        ("wav", "PCM_32", 1e-6),
        ("wav", "FLOAT", 1e-6),
        ("wav", "DOUBLE", 1e-6),
        ("wav", "ULAW", 2e-2),
        ("flac", "PCM_16", 1e-4),
        ("flac", "PCM_24", 1e-6),
        ("aiff", "PCM_16", 1e-4),
        ("ogg", "VORBIS", 5e-2),
        ("ogg", "OPUS", 5e-2),
        ("mp3", "MPEG_LAYER_III", 5e-2),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_gives_the_same_samples(tmp_path, suffix, subtype, tolerance, channels):
    """(S,) float32 in -1..1 whatever the file; channels are averaged; `check_audio` agrees on the length."""
    if suffix.upper() not in soundfile.available_formats() and suffix != "aiff":
        pytest.skip(f"this libsndfile has no {suffix}")
    path, expected = tmp_path / f"a.{suffix}", tone()
    sound = expected if channels == 1 else np.stack([1.5 * expected, 0.5 * expected], axis=1)
    soundfile.write(path, sound, 16_000, subtype=subtype)
    waveform = data.read_audio(path)
    assert waveform.dtype == torch.float32 and waveform.shape == (8000,)
    inner = slice(500, -500) if tolerance > 0.02 else slice(None)  # lossy codecs blur the ends
    assert np.abs(waveform.numpy() - expected)[inner].max() < tolerance
    assert data.check_audio([utterance(path)]) == [0.5]


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 48_000, 15_999])
def test_resampling_keeps_frequency_and_level(tmp_path, rate):
    """A tone at any rate is the same tone at 16 kHz (1% away from the edges of the filter)."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(rate=rate), rate, subtype="FLOAT")
    waveform = data.read_audio(path).numpy()
    assert len(waveform) == math.ceil(int(0.5 * rate) * 16_000 / rate)
    assert np.abs(waveform - tone(seconds=1)[: len(waveform)])[200:-200].max() < 0.005
    assert data.check_audio([utterance(path)]) == [int(0.5 * rate) / rate]


def test_resampling_removes_what_16_khz_cannot_hold():
    """A tone above 8 kHz vanishes and does not come back as an alias."""
    assert data.resample(tone(rate=48_000, hertz=11_000), 48_000)[200:-200].abs().max() < 0.005


def test_resampling_at_16_khz_changes_nothing():
    """Bit for bit, from float32; other float widths become float32."""
    waveform = torch.randn(1000)
    assert torch.equal(data.resample(waveform, 16_000), waveform)
    assert data.resample(waveform.double().numpy(), np.int64(16_000)).dtype == torch.float32


@pytest.mark.parametrize("rate", [0, -16_000, 16_000.0, "16000", None, 2_000_000_000])
def test_an_impossible_rate_is_an_error(rate):
    """Rates are positive integers; a damaged header cannot ask for a filter that fills the memory."""
    with pytest.raises(ValueError, match=r"sample_rate: found .*expected an integer from 1 to 1000000 Hz"):
        data.resample(torch.zeros(1000), rate)


@pytest.mark.parametrize("waveform", [torch.zeros(2, 500), torch.zeros(500, dtype=torch.int16)])
def test_resampling_refuses_channels_and_integers(waveform):
    """Two dimensions or samples in -32768..32767 would be silently wrong."""
    with pytest.raises(ValueError, match=r"waveform: found .*expected one channel \(S,\) of floats"):
        data.resample(waveform, 8000)


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("riff_size", [0, 36, 0xFFFFFFFF])
def test_wav_from_a_pipe_is_read_whole(tmp_path, size, riff_size):
    """Programs that stream do not know the size and write a placeholder; that is not truncation."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), 16_000)
    content = bytearray(path.read_bytes())
    content[4:8], content[40:44] = struct.pack("<I", riff_size), struct.pack("<I", size)
    path.write_bytes(content)
    assert len(data.read_audio(path)) == 8000
    assert data.check_audio([utterance(path)]) == [0.5]


def test_chunks_around_the_samples_of_a_wav_are_skipped(tmp_path):
    """Notes before and after the samples, of odd length too, are no samples and no truncation."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), 16_000)
    content, note = path.read_bytes(), b"note" + struct.pack("<I", 5) + b"hello\0"
    body = content[8:36] + note + content[36:] + note
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert np.abs(data.read_audio(path).numpy() - tone()).max() < 1e-4
    assert data.check_audio([utterance(path)]) == [0.5]


# ---------------------------------------------------------------- bad audio


def cut(path: Path, fraction: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


def spoil(path: Path, value: float, at: int = 17) -> None:
    samples = tone()
    samples[at] = value
    soundfile.write(path, samples, 16_000, subtype="FLOAT")


def rewrite(path: Path, start: int, replacement: bytes) -> None:
    soundfile.write(path, tone(), 16_000, format="FLAC" if path.suffix == ".flac" else None)
    content = bytearray(path.read_bytes())
    content[start : start + len(replacement)] = replacement
    path.write_bytes(content)


def write_then_cut(fraction: float, **how):
    def make(path: Path) -> None:
        soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 32_000), 16_000, **how)
        cut(path, fraction)

    return make


BAD_AUDIO = {
    "empty.wav": (lambda path: path.write_bytes(b""), r"empty file \(0 bytes\)"),
    "text.wav": (lambda path: path.write_text("hello, " * 99), "not audio that can be read"),
    "text.mp3": (lambda path: path.write_text("hello, " * 99), "not audio that can be read"),
    "zeros.raw": (lambda path: path.write_bytes(bytes(999)), "has no audio track, found video"),
    "riff.wav": (lambda path: path.write_bytes(b"RIFF"), "not audio that can be read"),
    "folder.wav": (Path.mkdir, "cannot be read: "),
    "header.wav": (write_then_cut(36 / 64_044), "truncated: a WAV header without samples"),
    "cut.wav": (write_then_cut(0.6), "truncated: 38382 of 64000 bytes of samples"),
    "cut_by_one.wav": (write_then_cut(1 - 1 / 64_044), "truncated: 63999 of 64000 bytes of samples"),
    "cut_24.wav": (write_then_cut(0.6, subtype="PCM_24"), "truncated: .* of 96000 bytes"),
    "cut_float.wav": (write_then_cut(0.6, subtype="FLOAT"), "truncated: .* of 128000 bytes"),
    "cut_rf64.wav": (write_then_cut(0.6, format="RF64"), "truncated: .* of 64000 bytes"),
    "cut.aiff": (write_then_cut(0.6), "truncated: .* of 64008 bytes"),
    "cut.flac": (write_then_cut(0.6), "truncated or damaged: "),
    "cut_a_little.flac": (write_then_cut(0.99), "truncated or damaged: "),
    "cut.ogg": (write_then_cut(0.6), "truncated: its last Ogg page is cut"),
    "cut_a_little.ogg": (write_then_cut(0.99), "truncated: its last Ogg page is cut"),
    "cut.opus": (write_then_cut(0.6, format="OGG", subtype="OPUS"), "truncated: its last Ogg page is cut"),
    "cut.mp3": (write_then_cut(0.6), r"truncated or damaged after 1\.19 s \(the last packet is cut\)"),
    "nan.wav": (lambda path: spoil(path, math.nan), "holds NaN or infinite samples"),
    "infinite.wav": (lambda path: spoil(path, -math.inf), "holds NaN or infinite samples"),
    "endless.flac": (lambda path: rewrite(path, 22, b"\xff" * 4), "is longer than 1073741824 samples"),
    "rate_0.wav": (lambda path: rewrite(path, 24, bytes(4)), "its header declares a sample rate of 0 Hz"),
    "rate_huge.wav": (
        lambda path: rewrite(path, 24, b"\xff\xff\xff\x7e"),
        "its header declares a sample rate of 2130706431 Hz",
    ),
    "short.wav": (
        lambda path: soundfile.write(path, tone()[:399], 16_000),
        "too short: 399 samples at 16 kHz, expected at least 400",
    ),
    "short.flac": (
        lambda path: soundfile.write(path, tone()[:100], 8000),
        "too short: 200 samples at 16 kHz",
    ),
    "nothing.wav": (lambda path: soundfile.write(path, tone()[:0], 16_000), "too short: 0 samples"),
}


@pytest.mark.parametrize("name", BAD_AUDIO)
def test_bad_audio_is_one_clear_error(tmp_path, name):
    """Reading and checking refuse the same files in the same words, and both name the file."""
    make, message = BAD_AUDIO[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(ValueError, match=f"{name}: {message}") as error:
        data.read_audio(path)
    with pytest.raises(ValueError, match=r"bad audio files \(1\):") as listed:
        data.check_audio([utterance(path)])
    assert str(listed.value).endswith(f"\n  {error.value}")


def test_400_samples_are_enough(tmp_path):
    """One frame of the CNN, counted at 16 kHz: 400 samples, or 200 at 8 kHz."""
    for rate, count in ((16_000, 400), (8000, 200)):
        soundfile.write(tmp_path / "a.wav", tone()[:count], rate)
        assert len(data.read_audio(tmp_path / "a.wav")) == 400
        assert data.check_audio([utterance(tmp_path / "a.wav")]) == [0.025]


def test_a_missing_file_is_file_not_found(tmp_path):
    """... for the reader; the check lists it with the other bad files."""
    with pytest.raises(FileNotFoundError, match=r"absent\.wav: no such audio file"):
        data.read_audio(tmp_path / "absent.wav")
    with pytest.raises(ValueError, match=r"absent\.wav: no such audio file"):
        data.check_audio([utterance(tmp_path / "absent.wav")])


def test_all_bad_files_are_listed_in_one_error(tmp_path):
    """In the order of the corpus, before training starts, and good files are not among them."""
    rows = []
    for name, (make, _) in BAD_AUDIO.items():
        make(tmp_path / name)
        soundfile.write(tmp_path / f"good_{name}.wav", tone(), 16_000)
        rows += [utterance(tmp_path / name), utterance(tmp_path / f"good_{name}.wav")]
    with pytest.raises(ValueError) as error:
        data.check_audio(rows)
    listed = str(error.value).splitlines()[1:]
    assert [Path(line.split(": ")[0].strip()).name for line in listed] == list(BAD_AUDIO)


def test_checking_integer_wav_does_not_decode_it(tmp_path, monkeypatch):
    """150,000 files of MSP-Podcast are checked in seconds, because their headers suffice."""
    monkeypatch.setattr(audio, "read_samples", lambda *given: pytest.fail("decoded"))
    for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32"):
        for kind in ("WAV", "WAVEX"):
            soundfile.write(tmp_path / "a.wav", tone(), 16_000, subtype=subtype, format=kind)
            assert data.check_audio([utterance(tmp_path / "a.wav")]) == [0.5]


def test_checked_lengths_are_in_the_order_of_the_corpus(tmp_path):
    """Threads, which take 64 at a time, do not shuffle them."""
    lengths = [0.1 + 0.001 * i for i in range(150)]
    for i, seconds in enumerate(lengths):
        soundfile.write(tmp_path / f"{i}.wav", tone(seconds), 16_000)
    found = data.check_audio([utterance(tmp_path / f"{i}.wav") for i in range(150)], threads=4)
    assert found == pytest.approx(lengths, abs=1e-4)


# ---------------------------------------------------------------- batches and prefetching


@pytest.mark.parametrize("batch_size", [2, 4, 32])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 96, 97, 98])
def test_batches_hold_every_index_once(count, batch_size):
    """Nothing is dropped, all batches but the last are full, and none has one utterance if there are two."""
    cut = data.batches(count, batch_size, seed=1, epoch=2)
    assert sorted(index for batch in cut for index in batch) == list(range(count))
    assert all(len(batch) == batch_size for batch in cut[:-1])
    assert count < 2 or all(2 <= len(batch) <= batch_size + 1 for batch in cut)


def test_a_remainder_of_one_joins_the_batch_before():
    """The CCC of one utterance is 0/0."""
    assert [len(batch) for batch in data.batches(97, 32, 0, 0)] == [32, 32, 33]
    assert [len(batch) for batch in data.batches(98, 32, 0, 0)] == [32, 32, 32, 2]
    with pytest.raises(ValueError, match="batch_size: found 1, expected 2 or more"):
        data.batches(8, 1, 0, 0)


def test_the_order_depends_on_seed_and_epoch_alone():
    """Epoch 7 is the same after a resume as after six epochs; other seeds and epochs have other orders."""
    order = data.batches(50, 8, seed=3, epoch=7)
    np.random.seed(0)
    torch.manual_seed(0)
    assert order == data.batches(50, 8, seed=3, epoch=7)
    others = [data.batches(50, 8, 3, 8), data.batches(50, 8, 4, 7), data.batches(50, 8, 7, 3)]
    assert order not in others
    assert [index for batch in order for index in batch] != list(range(50))


def test_prefetch_keeps_the_order_and_works_one_ahead():
    """Results come in order; while one is in use, exactly the next is computed, in another thread."""
    started, threads = [], set()

    def square(item: int) -> int:
        started.append(item)
        threads.add(threading.get_ident())
        return item * item

    results = data.prefetch(square, range(10))
    assert started == []
    assert next(results) == 0
    deadline = time.monotonic() + 5
    while len(started) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert started == [0, 1]
    assert list(results) == [item * item for item in range(1, 10)]
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert list(data.prefetch(square, [])) == []


def test_prefetch_raises_where_the_result_is_due():
    """The results before a failing item arrive; then its own exception, with no thread left."""
    before = threading.active_count()
    results = data.prefetch(lambda item: 6 // item, [3, 2, 0, 1])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threading.active_count() == before


def test_prefetch_closed_early_leaves_no_thread():
    """An interrupted epoch waits for the item in hand and ends."""
    before = threading.active_count()
    results = data.prefetch(lambda item: item, iter(range(1000)))
    next(results)
    results.close()
    assert threading.active_count() == before


# ---------------------------------------------------------------- the demo corpus


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The folder of the demo corpus in full."""
    root = tmp_path_factory.mktemp("data") / "demo"
    data.load_corpus("demo", root=str(root))
    return root


def test_the_demo_passes_its_own_checks(demo):
    """160 utterances of 16 speakers, disjoint over the splits, about 200 s, labels all over 1..7."""
    utterances = data.load_corpus("demo", root=str(demo))
    data.check_labels(utterances, ["activation", "valence", "dominance"], (1, 7))
    seconds = data.check_audio(utterances)
    assert [sum(u.split == split for u in utterances) for split in data.SPLITS] == [96, 32, 32]
    assert len({u.speaker for u in utterances}) == 16
    assert 180 < sum(seconds) < 220 and min(seconds) >= 0.9 and max(seconds) <= 1.8
    labels = np.array([list(u.labels.values()) for u in utterances])
    assert (labels.min(axis=0) < 1.5).all() and (labels.max(axis=0) > 6.5).all()
    assert np.abs(np.corrcoef(labels.T) - np.eye(3)).max() < 0.2


def test_the_demo_is_the_same_on_each_run(demo, tmp_path):
    """The same bytes in another folder; a smaller demo is the beginning of the larger one."""
    again = synthesize_demo(tmp_path, train=9, dev=5, test=5)
    assert again.parent == tmp_path and len(list(tmp_path.iterdir())) == 20
    for path in tmp_path.glob("*.wav"):
        assert path.read_bytes() == (demo / path.name).read_bytes()
    assert set(again.read_bytes().splitlines()) < set((demo / again.name).read_bytes().splitlines())


def test_the_demo_is_made_once(tmp_path):
    """A second call writes nothing, but a lost file is made again."""
    size = {"train": 3, "dev": 2, "test": 2}
    synthesize_demo(tmp_path, **size)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    synthesize_demo(tmp_path, **size)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    lost = tmp_path / "dev_001.wav"
    lost.unlink()
    synthesize_demo(tmp_path, **size)
    assert lost.read_bytes() == before[lost][1]


def test_an_interrupted_demo_is_made_again(tmp_path, monkeypatch):
    """The manifest comes last, so half a corpus has none."""

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        synthesize_demo(tmp_path, train=2, dev=2, test=2)
    assert not (tmp_path / "manifest.csv").exists()
    (tmp_path / "train_000.wav").write_bytes(b"half")
    monkeypatch.undo()
    manifest = synthesize_demo(tmp_path, train=2, dev=2, test=2)
    assert len(data.check_audio(data.read_manifest(manifest))) == 6
    assert not list(tmp_path.glob("*.part"))


def test_the_demo_overwrites_no_other_manifest(tmp_path):
    """A data_root that holds a real corpus is left alone."""
    path = write_manifest(tmp_path, "a.wav,train,s,1,2")
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"manifest\.csv: not this version's demo; .*`data_root`"):
        data.load_corpus("demo", root=str(tmp_path))
    assert path.read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def log_spectrum_statistics(path: str) -> np.ndarray:
    """Mean and standard deviation over time of 40 log band energies of the normalised waveform."""
    waveform = data.read_audio(path).numpy()
    frames = np.lib.stride_tricks.sliding_window_view(waveform / waveform.std(), 400)[::160] * np.hanning(400)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2  # (T, 257)
    edges = np.unique(np.geomspace(2, 256, 41).astype(int))
    bands = np.log(np.add.reduceat(power, edges[:-1], axis=1) + 1e-3)
    return np.concatenate([bands.mean(axis=0), bands.std(axis=0)])


def test_activation_and_valence_of_the_demo_can_be_learnt_for_unseen_speakers(demo):
    """Ridge regression on simple spectral statistics: CCC above 0.75, and loudness tells nothing."""
    utterances = data.read_manifest(demo / "manifest.csv")
    features = np.array([log_spectrum_statistics(u.path) for u in utterances])
    loudness = [float(data.read_audio(u.path).std()) for u in utterances]
    train = np.array([u.split == "train" for u in utterances])
    features = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    gram = features[train].T @ features[train] + 5 * np.eye(features.shape[1])
    for target in ("activation", "valence"):
        truth = np.array([u.labels[target] for u in utterances])
        weights = np.linalg.solve(gram, features[train].T @ (truth[train] - truth[train].mean()))
        guess, goal = (features @ weights)[~train], (truth - truth[train].mean())[~train]
        spread = guess.var() + goal.var() + (guess - goal).mean() ** 2
        ccc = 2 * np.cov(guess, goal, bias=True)[0, 1] / spread
        assert ccc > 0.75, (target, ccc)
        assert abs(np.corrcoef(loudness, truth)[0, 1]) < 0.15


def test_the_demo_manifest_is_a_plain_manifest(demo, tmp_path):
    """A copy of the folder is a corpus by itself, as an example of the format."""
    shutil.copytree(demo, tmp_path / "copy")
    with open(tmp_path / "copy" / "manifest.csv", newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == [*data.REQUIRED_COLUMNS, *data.LABEL_COLUMNS]
    utterances = data.load_corpus("manifest", manifest=str(tmp_path / "copy" / "manifest.csv"))
    assert all(Path(u.path).parent == tmp_path / "copy" for u in utterances)
