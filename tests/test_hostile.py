"""Broken and hostile files: a right result or one clear error that names the file, whatever the bytes.

Each reader is given mutated files, a few here and as many as asked for with `pytest tests/test_hostile.py --fuzz 5000`;
an input depends on its number alone, and the file of one that fails is kept. What was found so has a test of its own.
"""

import csv
import io
import json
import os
import pickle
import re
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY, speech_like, tiny_config, tiny_settings, tiny_tensors, write_tiny_checkpoint
from safetensors.torch import load_file, save_file
from test_audio import encode

import cache
import data
import predict
import run
import train
import weights
from config import Config, load_config
from corpora import check
from data import from_cell, text_cell
from formats import adapter
from machine import audio, hardware
from machine.audio import file_state
from model import Wav2Vec2
from report import results, tables
from tools import caches

HANG = 20  # seconds: far beyond any of these small files
MEMORY = 2 << 30  # bytes that all inputs of a reader together may add to the peak
CALL = b"!!python/object/apply:os.mkdir [executed]"
WORDS = {  # what means something to a parser, by suffix
    ".yaml": [b"&a", b"*a", b"<<: ", b"[", b"{", b"? ", b"!!int ''", b"!!float ''", b"!!timestamp x", b"!!binary x",
              b"!!bool x", b"!!set {", b"!!omap [", b"|", b"\n---\n", b"1:" * 50, b"2001-01-01T99:00:00", CALL, b"\t"],
    ".csv": [b'"', b",", b"\r", b"\0", b"\xff\xfe", b"nan", b"-inf", b"1_0", b"../../", b"/dev/zero", b"=1+1", b";"],
    ".txt": [b"[", b"]", b"\t", b";", b"NaN", b"A:", b".", b"\r", b"\0", b"UTD-", b"Ses0"],
    ".json": [b"[", b"{", b"]", b"null", b"NaN", b"Infinity", b'"', b"true", b"\\ud800", b"[" * 5000, b"0.5", b"{}"],
    ".safetensors": [b"F16", b"I64", b"C64", b"BOOL", b"F8_E4M3", b"F4", b"[", b"null", b'"shape":[0]'],
    ".pt": [b"R", b".", b"0", b"cposix\nsystem\n", b"\x8e", b"q\0", b"(", b"t", b"c__builtin__\neval\n", b"]", b"}"],
    ".wav": [b"RIFF", b"WAVE", b"data", b"fmt ", b"RF64", b"\xfe\xff", b"LIST", b"ds64"],
    ".flac": [b"fLaC", b"\xff\xf8"],
    ".ogg": [b"OggS", b"vorbis", b"OpusHead"],
    ".mp3": [b"ID3", b"\xff\xfb", b"Xing", b"Info"],
}  # fmt: skip
NUMBERS = [b"0", b"-1", b"1e400", b"99999999999999999999", b"2147483648", b"1" * 5000, b"0.5", b"00", b"-0"]


# ---------------------------------------------------------------- mutating


def mutate(content: bytes, random: np.random.Generator, words: list[bytes]) -> bytes:
    """One or two edits: bits, bytes, integers at limits, numbers of a text, words, ranges cut, doubled, zeroed."""
    for _ in range(random.integers(1, 3)):
        near = min(len(content), 200) if random.random() < 0.5 else len(content)  # headers are where sizes stand
        at = int(random.integers(near + 1))
        end = min(len(content), at + int(2 ** random.uniform(0, 10)))
        kind = random.integers(9)
        if kind == 0:
            part = bytes([content[at] ^ (1 << int(random.integers(8)))]) if at < len(content) else b""
            content = content[:at] + part + content[at + 1 :]
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content = content[:at] + content[end:]
        elif kind == 3:
            content = content[:at] + content[at:end] * 2 + content[end:]
        elif kind == 4:
            content = content[:at] + bytes(end - at) + content[end:]
        elif kind == 5:
            size = int(random.choice([1, 2, 4, 8]))
            value = int(random.choice([0, 1, -1, 127, -128])) % 256**size
            value = 1 << int(random.integers(8 * size)) if random.random() < 0.5 else value
            order = "little" if random.random() < 0.7 else "big"
            content = content[:at] + value.to_bytes(size, order) + content[at + size :]
        elif kind == 6 and (found := list(re.finditer(rb"\d+", content[:20_000]))):
            match = found[random.integers(len(found))]
            content = content[: match.start()] + NUMBERS[random.integers(len(NUMBERS))] + content[match.end() :]
        elif kind == 7:
            content = content[:at] + random.bytes(int(random.integers(1, 20))) + content[at:]
        else:
            content = content[:at] + words[random.integers(len(words))] + content[at:]
    return content


def mutate_inside(content: bytes, suffix: str, random: np.random.Generator) -> bytes:
    """Mutate what a container holds, and put it into a whole container again."""
    words = WORDS[suffix]
    if suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = mutate(content[8 : 8 + size], random, words)
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    packed, compression = io.BytesIO(), zipfile.ZIP_STORED if random.random() < 0.9 else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w", compression) as new:
        names = old.namelist()
        chosen = names[0] if random.random() < 0.8 else names[random.integers(len(names))]  # the first is the pickle
        for name in names:
            new.writestr(name, mutate(old.read(name), random, words) if name == chosen else old.read(name))
    return packed.getvalue()


Reader = tuple[list[Path], Callable[[Path], object]]  # files to be mutated, and what reads the one that was


def fuzz(reader: Reader, count: int, seed: int, folder: Path) -> None:
    """Read `count` mutated files. Only a result, ValueError or OSError may come of it, soon, and in little memory."""
    files, read = reader
    contents = {file: file.read_bytes() for file in files}
    peak, errors, slowest = hardware.peak_memory(torch.device("cpu")), 0, 0.0
    for number in range(count):
        random = np.random.default_rng([seed, number])
        file = files[random.integers(len(files))]
        suffix = ".pt" if contents[file].startswith(b"PK") else file.suffix
        if suffix in (".safetensors", ".pt") and random.random() < 0.6:
            mutated = mutate_inside(contents[file], suffix, random)
        else:
            mutated = mutate(contents[file], random, WORDS.get(suffix, WORDS[".txt"]))
        file.write_bytes(mutated)
        where, start = f"input {number}, in {file}", time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(file)
        except (ValueError, OSError) as error:
            errors += 1
            assert str(folder) in str(error), f"{where}: {type(error).__name__} without the file's name: {error}"
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {str(error)[:500]}") from error
        slowest = max(slowest, seconds := time.perf_counter() - start)
        assert seconds < HANG, f"{where}: took {seconds:.0f} s"
        file.write_bytes(contents[file])
    grown = hardware.peak_memory(torch.device("cpu")) - peak
    print(f"{count} inputs: {errors} errors, {count - errors} results, slowest {slowest:.2f} s, +{grown / 1e6:.0f} MB")
    assert grown < MEMORY
    assert not (Path("executed").exists() or (folder / "executed").exists())
    assert 0 < errors < count or count < 50  # else it would test the whole files, or the first check, alone


# ---------------------------------------------------------------- readers


def audio_reader(folder: Path) -> Reader:
    """Every format and width, short ones."""
    waveform = speech_like(3000).numpy().clip(-0.9, 0.9)
    kinds = [("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("wav", "ULAW"), ("wav", "IMA_ADPCM")]
    kinds += [("flac", "PCM_16"), ("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", "MPEG_LAYER_III")]
    kinds += [("aiff", "PCM_24"), ("au", "FLOAT"), ("caf", "ALAC_16"), ("w64", "PCM_16")]
    files = []
    for suffix, subtype in kinds:
        files.append(folder / f"{subtype}.{suffix}")
        soundfile.write(files[-1], np.stack([waveform, waveform], 1), 16_000, subtype)
    for suffix, codec, rate in (
        ("m4a", "aac", 16_000),
        ("webm", "libopus", 48_000),
        ("amr", "libopencore_amrnb", 8000),
    ):
        files.append(folder / f"{codec}.{suffix}")
        encode(files[-1], codec, waveform, rate)

    def read(file: Path) -> None:
        problem = None
        try:
            waveform = data.read_audio(file)
            assert waveform.dtype == torch.float32 and waveform.ndim == 1 and len(waveform) >= data.MIN_SAMPLES
            assert waveform.isfinite().all()
        except (ValueError, OSError) as error:
            problem = error
        try:
            data.check_audio([data.Utterance(str(file), "train", "s", {})])
        except ValueError:
            assert problem is not None, "check_audio refuses what read_audio reads"
        if problem is not None:
            raise problem

    return files, read


def manifest_reader(folder: Path) -> Reader:
    rows = [f"audio/{i}.wav,{split},s{i},{i + 1}.5,-2,3e0" for i, split in enumerate(("train", "dev", "test"))]
    (folder / "m.csv").write_text("\n".join(["path,split,speaker,activation,valence,dominance", *rows]), "utf-8")

    def read(file: Path) -> None:
        for utterance in data.read_manifest(file):
            assert utterance.split in data.SPLITS and all(isinstance(v, float) for v in utterance.labels.values())

    return [folder / "m.csv"], read


def place(folder: Path, texts: dict[str, str], audio: list[str]) -> list[Path]:
    """Label files, returned, and empty files in the place of audio, which the corpora's readers do not open."""
    for name, text in {**texts, **dict.fromkeys(audio, "")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return [folder / name for name in texts]


def podcast_reader(folder: Path) -> Reader:
    header, splits = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set", ("Train", "Validation", "Test1")
    rows = [f"MSP_{i}.wav,N,2.{i},4.0,2.6,{i},Male,{split}" for i, split in enumerate(splits)]
    texts = {"Labels/labels_consensus.csv": "\n".join([header, *rows])}
    files = place(folder, texts, [f"Audios/MSP_{i}.wav" for i in range(3)])
    return files, lambda _: data.read_corpus("msp-podcast", str(folder))


def iemocap_reader(folder: Path) -> Reader:
    texts, audio = {}, []
    for session in range(1, 6):
        turns = [f"Ses0{session}F_impro01_{letter}000" for letter in "FM"]
        lines = [f"[6.2901 - 8.2357]\t{turn}\tneu\t[2.5000, 3.5000, 5.2000]" for turn in turns]
        texts[f"Session{session}/dialog/EmoEvaluation/Ses0{session}F_impro01.txt"] = "\n".join(["% x", *lines])
        audio += [f"Session{session}/sentences/wav/a/{turn}.wav" for turn in turns]
    return place(folder, texts, audio), lambda _: data.read_corpus("iemocap", str(folder), fold=1)


def improv_reader(folder: Path) -> Reader:
    turns = [f"IMPROV-S01A-{'FM'[i % 2]}0{1 + i // 2}-S-FM0{i}" for i in range(12)]
    lines = [
        f"UTD-{turn}.avi; {'AN'[i % 2]}; A:3.000000; V:3.5; D:NaN ; N:4.2;\n A1; x\n" for i, turn in enumerate(turns)
    ]
    files = place(folder, {"Evalution.txt": "\n".join(lines)}, [f"s/MSP-{turn}.wav" for turn in turns])
    return files, lambda _: data.read_corpus("msp-improv", str(folder), fold=1)


def muse_reader(folder: Path) -> Reader:
    name = "NotStressed/Emotion data from crowdsourcing - x.csv"
    lines = [",Activation_Mean,Valence_Mean", *(f"0{i}_a_{i},{i}.5,4.25" for i in range(6))]
    files = place(folder, {name: "\n".join(lines)}, [f"NotStressed/Audio/0{i}_a_{i}.wav" for i in range(6)])
    (folder / "Stressed" / "Audio").mkdir(parents=True)
    return files, lambda _: data.read_corpus("muse", str(folder))


def config_reader(folder: Path) -> Reader:
    text = "corpus: manifest\nmanifest: m.csv\nlabel_range: [1, 7]\ntargets: [valence]\nlora_rank: 8\nlr: 1e-4\n"
    text += "lora_targets:\n  - q\n  - v\ntrainable_layers: [1, 2]\ncache: true\nseed: 1_0\nmicro_batch_size: null\n"
    (folder / "c.yaml").write_text(text, "utf-8")

    def read(file: Path) -> None:
        assert isinstance(load_config(file), Config)

    return [folder / "c.yaml"], read


def use_backbone(backbone: Wav2Vec2, source: Path) -> None:
    """As a run does: not before its weights were looked at, of which `load_backbone` reads none."""
    weights.require_finite(dict(backbone.named_parameters()), source)
    with torch.no_grad():
        states = backbone.hidden_states([speech_like(800)])
    assert len(states) == backbone.config.layers + 1


def safetensors_reader(folder: Path) -> Reader:
    write_tiny_checkpoint(folder)
    files = [folder / name for name in ("model.safetensors", "config.json", "preprocessor_config.json")]
    return files, lambda _: use_backbone(weights.load_backbone(folder), folder)


def pickle_reader(folder: Path) -> Reader:
    settings = {"model": {"encoder_attention_heads": 4, "layer_norm_first": False}, "task": {"normalize": False}}
    torch.save({"model": tiny_tensors(), "cfg": settings}, folder / "a.pt")
    torch.save(tiny_tensors(), folder / "pytorch_model.bin")
    files = [folder / "a.pt", folder / "pytorch_model.bin"]
    return files, lambda file: use_backbone(weights.load_backbone(file), file)


def index_reader(folder: Path) -> Reader:
    tensors = tiny_tensors()
    save_file(tensors, folder / "model-1.safetensors")
    names = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names), "utf-8")
    return [folder / "model.safetensors.index.json"], lambda _: use_backbone(weights.load_backbone(folder), folder)


def emotion_reader(folder: Path) -> Reader:
    """A published emotion model, its head in a pickle."""
    width = TINY["hidden_size"]
    shapes = {
        "dense.weight": (width, width),
        "dense.bias": (width,),
        "out_proj.weight": (3, width),
        "out_proj.bias": (3,),
    }
    head = {f"classifier.{name}": 0.1 * torch.ones(shape) for name, shape in shapes.items()}
    torch.save({f"wav2vec2.{key}": value for key, value in tiny_tensors().items()} | head, folder / "pytorch_model.bin")
    labels = {"id2label": {"0": "arousal", "1": "dominance", "2": "valence"}, "pooling_mode": "mean"}
    (folder / "config.json").write_text(json.dumps(tiny_config() | labels), "utf-8")

    def read(_: Path) -> None:
        assert set(run.load_run(folder).predict(speech_like(800), 16_000)) == {"activation", "dominance", "valence"}

    return [folder / "pytorch_model.bin", folder / "config.json"], read


def adapter_reader(folder: Path) -> Reader:
    write_tiny_checkpoint(folder)
    (folder / "peft").mkdir()
    backbone = weights.load_backbone(folder)
    run.inject(backbone, 2, 4.0, ["q", "fc1"])
    adapter.save_adapter(backbone, folder / "peft", "a/b")

    def read(_: Path) -> None:
        backbone = weights.load_backbone(folder)
        adapter.merge_adapter(backbone, folder / "peft", "a/b")
        use_backbone(backbone, folder)

    return [folder / "peft" / name for name in adapter.FILES], read


def run_reader(folder: Path) -> Reader:
    """A run's best.pt, of LoRA and a head."""
    write_tiny_checkpoint(folder)
    settings = tiny_settings(folder, folder, folder / "m.csv", name="a", lora_rank=2, head_width=4)
    config = run.make_config(settings, "test")
    model, identity = run.build_model(config, (1.0, 7.0))
    checkpoint = {"trained": train.trained_state(model), "backbone": identity, "label_range": [1.0, 7.0]}
    (folder / "runs" / "a").mkdir(parents=True)
    best = folder / "runs" / "a" / "best.pt"
    hardware.save(best, checkpoint | {"config": run.plain(config)})

    def read(_: Path) -> None:
        model = run.load_run(folder / "runs" / "a")
        assert list(model.predict(speech_like(800), 16_000)) == list(model.targets)  # which a changed file may name

    return [best], read


def cache_reader(folder: Path) -> Reader:
    """An index and a description: an activation that is read is the one that was written."""
    paths = [str(folder / f"{i}.wav") for i in range(3)]
    for path in paths:
        Path(path).write_text("x")
        os.utime(path, (1e9, 1e9))  # in 2001: opening a cache waits where a file has only just changed
    expected = torch.arange(6 * 8).view(6, 8).float()

    def opened() -> cache.ActivationCache:
        return cache.ActivationCache(folder / "cache", {"backbone": "x"}, paths, 8, torch.float32)

    first = opened()
    first.write([0, 1, 2], expected, [1, 2, 3])
    first.close()

    def read(_: Path) -> None:
        again = opened()
        try:
            for number, part in enumerate(expected.split([1, 2, 3])):
                if again.has([number]):
                    assert torch.equal(again.read([number])[0], part)
            caches.verify(again.directory)
        finally:
            again.close()

    (index,) = first.directory.glob("*.index")
    return [index, first.directory / "cache.json", index.with_suffix(".bin")], read


READERS = [audio_reader, manifest_reader, podcast_reader, iemocap_reader, improv_reader, muse_reader, config_reader]
READERS += [safetensors_reader, pickle_reader, index_reader, emotion_reader, adapter_reader, run_reader, cache_reader]


@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_a_mutated_file_is_read_or_refused_by_name(request, tmp_path, monkeypatch, make):
    """Nothing is executed, no other exception comes, and time and memory stay small."""
    monkeypatch.chdir(tmp_path)
    fuzz(make(tmp_path), request.config.getoption("--fuzz"), READERS.index(make), tmp_path)


# ---------------------------------------------------------------- what was found, and what is known elsewhere


LAUGHS = "\n".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9 if i else ['lol'])}]" for i in range(30))
MERGES = "\n".join(
    f"x{i}: &x{i} {{<<: [{', '.join([f'*x{i - 1}'] * 9)}]}}" if i else "x0: &x0 {a: 1}" for i in range(30)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "no alias"),
        (LAUGHS + "\ntargets: *x29", "no alias"),
        (MERGES, "no alias"),
        ("targets: " + "[" * 50_000, "at most 10 levels"),
        ("seed: 1\nlr: 1\nseed: 2", "seed is given more than once"),
        ("# " * 50_000, "has 100,000 bytes"),
        ("seed: !!int ''", "is not YAML"),
        ("seed: !!bool x", "is not YAML"),
        ("seed: !!timestamp x", "is not YAML"),
        (f"seed: {CALL.decode()}", "is not YAML"),
    ],
)
def test_yaml_that_fills_memory_runs_code_or_breaks_its_reader_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=rf"a\.yaml: (is not YAML .*)?{message}"):
        load_config(tmp_path / "a.yaml")
    assert not Path("executed").exists()


@pytest.mark.parametrize("key", ["seed", "lora_rank", "head_width", "epochs"])
def test_a_number_beyond_all_use_is_refused(tmp_path, key):
    (tmp_path / "a.yaml").write_text(f"{key}: 1{'0' * 4000}", "utf-8")
    with pytest.raises(ValueError, match=rf"a\.yaml: {key}: expected (below|at most)"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_audio_that_is_a_pipe_or_a_link_to_itself_is_refused(tmp_path):
    """No writer is waited for."""
    os.mkfifo(tmp_path / "a.wav")
    os.symlink("b.wav", tmp_path / "b.wav")
    for name, message in (("a", "is no file but a pipe"), ("b", "cannot be read: ")):
        with pytest.raises(ValueError, match=rf"{name}\.wav: {message}"):
            data.read_audio(tmp_path / f"{name}.wav")


@pytest.mark.parametrize("rate", [1, 999])
def test_a_rate_that_would_make_hours_of_a_second_is_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.zeros(20_000), rate)
    with pytest.raises(ValueError, match=rf"a\.wav: its header declares a sample rate of {rate} Hz"):
        data.read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(("name", "rate"), [("a.flac", 16_000), ("a.flac", 8_000), ("a.wav", 16_000)])
def test_silence_packed_to_fill_the_memory_is_not_decoded_to_its_end(tmp_path, monkeypatch, name, rate):
    """FLAC keeps a block of one value in a few bytes. The limit counts at 16 kHz too, and for what is not decoded."""
    soundfile.write(tmp_path / name, np.zeros(2_000_000), rate)
    monkeypatch.setattr(audio, "MAX_SAMPLES", 2_000_000 * 16_000 // rate - 1)
    for read in (data.read_audio, lambda path: data.check_audio([data.Utterance(str(path), "", "", {})])):
        with pytest.raises(ValueError, match=rf"{name}: is longer than "):
            read(tmp_path / name)


def test_many_channels_are_decoded_in_blocks_of_the_same_size(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK", 1000)
    waveform = np.stack([speech_like(5000).numpy() / 2] * 7, 1)
    soundfile.write(tmp_path / "a.wav", waveform, 16_000, subtype="FLOAT")
    assert np.allclose(data.read_audio(tmp_path / "a.wav"), waveform[:, 0], atol=1e-6)


class Executes:
    """A pickle that would make a directory."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def cyclic() -> dict:
    settings: dict = {"encoder_attention_heads": 4}
    settings["w2v_args"] = settings
    return settings


def laughing() -> list:
    value: list = ["lol"]
    for _ in range(40):
        value = [value] * 9
    return value


def changed(name: str = "encoder.layer_norm.bias", **values: torch.Tensor) -> dict:
    tensors = tiny_tensors()
    return tensors | {name: values["value"](tensors[name])}


NOT_PLAIN = {
    "int8": (lambda x: x.to(torch.int8), "expected floating point"),
    "complex": (lambda x: x.to(torch.complex64), "expected floating point"),
    "sparse": (lambda x: x.to_sparse(), "is no plain tensor"),
    "meta": (lambda x: x.to("meta"), "expected floating point on the CPU"),
    "huge": (lambda _: torch.zeros(1).expand(10**12), "declares 4,000,[0-9,]+ bytes of tensors, but has only"),
    "NaN": (lambda x: x / 0 * 0, "NaN or infinite values in norm.bias"),
    "infinite": (lambda x: x / 0, "NaN or infinite values in norm.bias"),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_tensor_that_is_no_plain_finite_numbers_is_refused(tmp_path, kind):
    change, message = NOT_PLAIN[kind]
    torch.save(changed(value=change), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt: .*{message}"):
        use_backbone(weights.load_backbone(tmp_path / "a.pt"), tmp_path / "a.pt")


def test_tensors_that_share_memory_or_lie_across_it_are_read_as_what_they_are(tmp_path):
    tensors = tiny_tensors()
    tensors["encoder.layers.1.final_layer_norm.bias"] = tensors["encoder.layers.0.final_layer_norm.bias"]
    name = "encoder.layers.0.attention.q_proj.weight"
    tensors[name] = tensors[name].T.contiguous().T
    torch.save(tensors, tmp_path / "a.pt")
    backbone = weights.load_backbone(tmp_path / "a.pt")
    assert torch.equal(backbone.layers[0].attention.q.weight, tensors[name])
    one, other = (layer.feed_forward_norm.bias for layer in backbone.layers[:2])
    assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [cyclic(), {"model": {"activation_fn": laughing(), "x": laughing()}}])
def test_settings_that_hold_themselves_or_unfold_without_end_are_read(tmp_path, settings):
    torch.save({"model": tiny_tensors(), "cfg": settings}, tmp_path / "a.pt")
    use_backbone(weights.load_backbone(tmp_path / "a.pt"), tmp_path / "a.pt")


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in members.items():
            new.writestr(name, content)


@pytest.mark.parametrize("load", [weights.load_backbone, run.load_checkpoint])
def test_a_checkpoint_that_runs_code_or_is_a_zip_bomb_is_refused(tmp_path, monkeypatch, load):
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        torch.save({"model": Executes()}, "a.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"a\.pt: "):
            load(Path("a.pt"))
    Path("b.pt").write_bytes(pickle.dumps({"trained": Executes(), "backbone": {}}))
    with pytest.raises(ValueError, match=r"b\.pt: "):
        load(Path("b.pt"))
    assert not Path("executed").exists()
    torch.save({"model": torch.zeros(10_000_000)}, "c.pt")
    compress(Path("c.pt"))
    assert Path("c.pt").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"c\.pt: is not a whole .* \(it has compressed members"):
        load(Path("c.pt"))
    torch.save({"model": bytearray(10)}, "d.pt")  # in a pickle its size alone could stand
    with pytest.raises(ValueError, match=r"d\.pt: is not a whole .* \(it holds more than tensors and plain values\)"):
        load(Path("d.pt"))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": "3"}, {"num_attention_heads": 0}, {"conv_stride": 5},
        {"num_attention_heads": -4}, {"layer_norm_eps": float("nan")}, {"do_stable_layer_norm": "no"}, "[" * 100_000,
    ],
)  # fmt: skip
def test_settings_of_an_impossible_kind_or_size_are_refused(tmp_path, settings):
    write_tiny_checkpoint(tmp_path)
    text = settings if isinstance(settings, str) else json.dumps(tiny_config() | settings)
    (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        weights.load_backbone(tmp_path)


def test_a_layer_of_a_number_without_end_is_refused_before_it_is_made(tmp_path):
    tensors = tiny_tensors()
    tensors["encoder.layers.999999999.fc1.bias"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: has 1000000000 layers, expected at most 1000"):
        weights.load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x / 0, "NaN or infinite values in base_model"),
        (lambda x: x.to(torch.int8), "expected floating point"),
    ],
)
def test_an_adapter_that_is_no_plain_finite_numbers_is_refused(tmp_path, change, message):
    (*_, tensors), read = adapter_reader(tmp_path)
    stored = load_file(tensors)
    stored[min(stored)] = change(stored[min(stored)])
    save_file(stored, tensors)
    with pytest.raises(ValueError, match=message):
        read(tensors)


@pytest.mark.parametrize(
    "change",
    [{"config": None}, {"config": {"seed": []}}, {"label_range": [7, 1]}, {"label_range": "ab"}, {"backbone": {}},
     {"trained": [1]}, {"trained": {1: torch.zeros(1)}}, {"trained": {}}, {"trained": {"a": 5}},
     {"config": {"seed": laughing()}}, {"config": {"head_width": 10**9}}],
)  # fmt: skip
def test_a_checkpoint_of_a_run_that_holds_something_else_is_named(tmp_path, change):
    (best,), read = run_reader(tmp_path)
    torch.save(torch.load(best, weights_only=True) | change, best)
    with pytest.raises(ValueError, match=re.escape(str(best.parent))):
        read(best)


def test_weights_that_are_no_numbers_stop_a_run_and_a_cache_before_anything_is_learnt(tmp_path, tiny_manifest):
    (tmp_path / "backbone").mkdir()
    write_tiny_checkpoint(tmp_path / "backbone")
    weight = "encoder.layers.1.attention.q_proj.weight"
    save_file(changed(weight, value=lambda x: x / 0 * 0), tmp_path / "backbone" / "model.safetensors")
    settings = tiny_settings(tmp_path, tmp_path / "backbone", tiny_manifest, name="a", cache=True)
    with pytest.raises(
        ValueError, match=r"backbone: NaN or infinite values in backbone\.layers\.1\.attention\.q\.weight"
    ):
        train.train(run.make_config(settings, "test"))
    assert not (tmp_path / "runs" / "a" / "last.pt").exists()
    (tmp_path / "a.yaml").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(ValueError, match=r"\.wav does not fit torch\.float16 .*the model yields no numbers for it"):
        caches.build([str(tmp_path / "a.yaml")])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_checkpoint, tiny_manifest) -> tuple[Config, Path]:
    folder = tmp_path_factory.mktemp("finished")
    settings = tiny_settings(folder, tiny_checkpoint, tiny_manifest, name="a", lora_rank=2, epochs=1)
    train.train(config := run.make_config(settings, "test"))
    (folder / "runs" / "a" / "result.json").unlink()
    return config, folder / "runs" / "a" / "last.pt"


@pytest.mark.parametrize(
    "change",
    [{"optimizer": {}}, {"optimizer": None}, {"state": {}}, {"state": {"losses": [1]}}, {"state": {"epoch": "1"}},
     {"state": {"best": [0.5]}}, {"trained": {}}, {"trained": {"a": 5}}, {"backbone": {"sha256": 1}}],
)  # fmt: skip
def test_a_run_does_not_go_on_from_what_is_not_its_state(finished, change):
    config, last = finished
    content = last.read_bytes()
    whole = torch.load(last, weights_only=True)
    if change.get("state"):  # one value of it
        change = {"state": whole["state"] | change["state"]}
    torch.save(whole | change, last)
    with pytest.raises(ValueError, match=r"last\.pt: (does not fit this run|is no checkpoint of train\.py)"):
        train.train(config)
    last.write_bytes(content)


@pytest.mark.parametrize(
    "line",
    [(1, "{shard}", -8, 1, 1, 1, "x"), (1, "{shard}", 0, 99999999999999, 1, 1, "{path}"),
     (-1, "{shard}", 0, 1, "{size}", "{time}", "{path}"), (1, "../a", 0, 1, 1, 1, "x"), (1, "a\0b", 0, 1, 1, 1, "x"),
     (1, "{shard}", 10**30, 1, 1, 1, "{path}"), (1, "{shard}", 0, 1, 1, 1, "a\0/b"),
     (1, 2, 0, 1, 1, 1, "x"), {"a": 1}, "9" * 200_000],
)  # fmt: skip
def test_an_index_of_a_cache_that_claims_the_impossible_is_passed_over(tmp_path, line):
    """Also with the checksum that a line of ours would have."""
    (index, *_), read = cache_reader(tmp_path)
    size, time = file_state(str(tmp_path / "0.wav"))
    words = {"{shard}": index.with_suffix(".bin").name, "{path}": str(tmp_path / "0.wav"), "{size}": size}
    words["{time}"] = time
    entry = [words.get(value, value) for value in line] if isinstance(line, tuple) else line
    index.write_bytes(index.read_bytes() + cache.make_line(entry, index.parent.name))
    read(index)


@pytest.mark.parametrize("text", ["[", "[" * 100_000, '{"width": -8, "dtype": "float32"}', '{"width": 1e9}', "{}"])
def test_a_cache_that_does_not_tell_what_it_holds_is_not_verified(tmp_path, text):
    (_, description, _), _ = cache_reader(tmp_path)
    description.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"cache\.json: does not describe a cache"):
        caches.verify(description.parent)


# ---------------------------------------------------------------- tables, and paths of manifests


FORMULA = '=HYPERLINK("http://a.b"&A1)'
NAMES = [FORMULA, "@a", "+1", "-x", "\t=1", "\uff1d1", "'=1", "''-", "'a", "b=1", ""]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_table_is_no_formula_and_can_be_had_back(name):
    assert not text_cell(name).startswith(tuple("=+-@\t\r\n\uff1d"))
    assert from_cell(text_cell(name)) == name
    assert (text_cell(name) == name) == (name in ("'a", "b=1", ""))


def test_no_name_becomes_a_formula_in_a_table_and_numbers_stay_numbers(tmp_path):
    """In every table with names of others; our reader of predictions gives the names back. JSON lines keep them."""
    utterances = [data.Utterance(name, "test", name, {"valence": -1.5}) for name in NAMES]
    run.write_predictions(tmp_path / "predictions_test.csv", ["valence"], utterances, np.full((len(NAMES), 1), -0.25))
    (tmp_path / "result.json").write_text('{"config": {"targets": ["valence"]}}', "utf-8")
    (tmp_path / "log.jsonl").write_text("{}\n", "utf-8")
    assert results.read_run(tmp_path).speakers == NAMES
    row = {"file": FORMULA, "start": 0.0, "end": 1.0, "valence": -0.5}
    table, lines = io.StringIO(), io.StringIO()
    predict.row_writer(table, "csv", ["valence"])([row])
    predict.row_writer(lines, "jsonl", ["valence"])([row])
    assert json.loads(lines.getvalue()) == row
    tables.write_csv(tmp_path / "problems.csv", ["file", "detail"], [{"file": FORMULA, "detail": "-x"}])
    speakers = check.speakers([(utterance, 1.0) for utterance in utterances])
    tables.write_csv(tmp_path / "speakers.csv", check.SPEAKER, speakers)
    names = ("problems.csv", "speakers.csv", "predictions_test.csv")
    texts = [table.getvalue(), *((tmp_path / name).read_text("utf-8") for name in names)]
    cells = [cell for text in texts for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
    assert cells.count(f"'{FORMULA}") == 5
    assert [cell for cell in cells if cell[:1] in "=+-@" and cell] == ["-0.5", *["-0.2500", "-1.5"] * len(NAMES)]


@pytest.mark.parametrize(
    ("name", "text"),
    [("result.json", "{}"), ("result.json", "[]"), ("log.jsonl", "{"), ("predictions_test.csv", ""),
     ("predictions_test.csv", "file,speaker,valence,valence_label\na,b,1"),
     ("predictions_test.csv", "file,speaker,valence,valence_label\na,b,1,x")],
)  # fmt: skip
def test_a_broken_run_among_those_compared_is_named(tmp_path, name, text):
    (tmp_path / "result.json").write_text('{"config": {"targets": ["valence"]}}', "utf-8")
    (tmp_path / "log.jsonl").write_text("{}\n", "utf-8")
    (tmp_path / "predictions_test.csv").write_text("file,speaker,valence,valence_label\na,b,1,2\n", "utf-8")
    results.read_run(tmp_path)
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(
        ValueError,
        match=re.escape(str(tmp_path))
        + ".*( is not as train.py leaves | has columns |holds a JSON list, expected an object)",
    ):
        results.read_run(tmp_path)


def test_predictions_of_a_file_whose_name_is_not_utf8_are_written(tmp_path):
    utterances = [data.Utterance("\udcff.wav", "test", "s", {"valence": 1.0})]
    run.write_predictions(tmp_path / "p.csv", ["valence"], utterances, np.zeros((1, 1)))
    assert "\\udcff.wav,s" in (tmp_path / "p.csv").read_text("utf-8")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"a.wav,train,{'s' * 10_000_000},1,1", "is not a CSV file: field larger"),
        ('"a.wav,train,s,1,1\nb.wav,train,s,1,1', "1 cells, expected 5"),
    ],
)
def test_a_manifest_with_a_cell_that_does_not_end_is_refused(tmp_path, row, message):
    (tmp_path / "m.csv").write_text(f"path,split,speaker,activation,valence\n{row}\n", "utf-8")
    with pytest.raises(ValueError, match=rf"m\.csv: (?s:.*){message}"):
        data.read_manifest(tmp_path / "m.csv")


def test_a_column_that_is_there_twice_is_refused_unless_it_is_ignored(tmp_path):
    for column, message in (("note", None), ("valence", "column valence is there more than once")):
        (tmp_path / "m.csv").write_text(
            f"path,split,speaker,activation,valence,note,{column}\na,train,s,1,1,,\n", "utf-8"
        )
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            data.read_manifest(tmp_path / "m.csv")


def test_a_manifest_may_name_files_outside_its_folder(tmp_path):
    """It is the user's own list, and corpora are kept on other disks: its paths are read, and never written to."""
    (tmp_path / "lists").mkdir()
    rows = ["path,split,speaker,activation,valence", "../a.wav,train,s,1,1", f"{tmp_path / 'b.wav'},dev,t,1,1"]
    (tmp_path / "lists" / "m.csv").write_text("\n".join(rows), "utf-8")
    paths = [utterance.path for utterance in data.read_manifest(tmp_path / "lists" / "m.csv")]
    assert [Path(path).resolve() for path in paths] == [tmp_path / "a.wav", tmp_path / "b.wav"]
