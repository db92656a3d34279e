"""From files to tensors: corpora, audio of any kind as 16 kHz mono, random batches, the demo corpus.

    utterances = load_corpus("manifest", manifest="my/manifest.csv")
    check_labels(utterances, ["activation", "valence"], label_range=(1, 7))
    seconds = check_audio(utterances)
    waveform = read_audio(utterances[0].path)  # (S,) float32, 16 kHz

Nothing is padded, cropped or normalised here: an utterance is its samples, and its length is its own.
"""

import csv
import difflib
import io
import math
import numbers
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

import numpy as np
import soundfile
import torch
from torch import Tensor

SAMPLE_RATE = 16_000  # Hz, what every Wav2Vec 2.0 was trained on
MIN_SAMPLES = 400  # at SAMPLE_RATE: one frame of the CNN, 25 ms
MAX_SAMPLE_RATE = 1_000_000  # Hz; more is a damaged header, and a resampling filter that fills the memory
SPLITS = ("train", "dev", "test")
CORPORA = ("demo", "manifest")
LABEL_RANGE: dict[str, tuple[float, float]] = {"demo": (1.0, 7.0)}  # a manifest has no range of its own
REQUIRED_COLUMNS = ("path", "split", "speaker", "activation", "valence")
LABEL_COLUMNS = ("activation", "valence", "dominance")

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One turn of one speaker: an audio file and its labels by target name, in the scale of the corpus."""

    path: str
    split: str
    speaker: str
    labels: dict[str, float]


# ---------------------------------------------------------------- corpora and manifests


def load_corpus(
    name: str, root: str | None = None, manifest: str | None = None, fold: int | None = None
) -> list[Utterance]:
    """The utterances of corpus "demo" (synthesised into `root` if it is not there) or "manifest" (a CSV).

    Raises ValueError for an unknown name or an argument that the corpus has no use for, and what
    `read_manifest` and `synthesize_demo` raise.
    """
    if name not in CORPORA:
        nearest = difflib.get_close_matches(name, CORPORA, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"corpus: {name!r} is unknown, expected one of {', '.join(CORPORA)}{hint}")
    if fold is not None:
        raise ValueError(f"fold: corpus {name!r} has no folds, found {fold!r}; remove the key")
    if name == "demo":
        if manifest is not None:
            raise ValueError(f"manifest: corpus 'demo' has no use for {manifest!r}; set `corpus: manifest`")
        return read_manifest(synthesize_demo(root or "data/demo"))
    if manifest is None:
        raise ValueError("manifest: found nothing, but corpus 'manifest' needs a CSV; set `manifest: FILE`")
    if root is not None:
        raise ValueError(f"data_root: found {root!r}, but paths are relative to the manifest; remove the key")
    return read_manifest(manifest)


def read_manifest(path: str | Path) -> list[Utterance]:
    """Read a CSV `path,split,speaker,activation,valence[,dominance]` in UTF-8; other columns are ignored.

    Relative audio paths are relative to the manifest; an empty label cell means that there is no such label.
    Raises FileNotFoundError, or one ValueError that lists the bad rows by line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: Excel writes a byte order mark
            return _parse_manifest(path, file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such manifest; check the key `manifest`") from None
    except OSError as error:
        raise ValueError(f"{path}: the manifest cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the manifest is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: the manifest is not a CSV file: {error}") from None


def _parse_manifest(path: str | Path, file: TextIO) -> list[Utterance]:
    reader = csv.reader(file)
    header = [cell.strip() for cell in next(reader, [])]
    if not any(header):
        raise ValueError(f"{path}: the manifest is empty, expected a header {','.join(REQUIRED_COLUMNS)}")
    if missing := [column for column in REQUIRED_COLUMNS if column not in header]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; found {header}, separated by commas")
    at = {column: header.index(column) for column in header}
    targets = [(target, at[target]) for target in LABEL_COLUMNS if target in at]
    folder = os.path.dirname(os.path.abspath(path))
    utterances, problems = [], []
    for row in filter(any, reader):  # not the blank lines
        try:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} cells, expected {len(header)}")
            audio, split, speaker = (row[at[column]].strip() for column in REQUIRED_COLUMNS[:3])
            if not audio:
                raise ValueError("path is empty")
            if split not in SPLITS:
                raise ValueError(f"split {split!r}, expected one of {', '.join(SPLITS)}")
            labels = {target: _number(target, row[i]) for target, i in targets if row[i].strip()}
            utterances.append(Utterance(os.path.join(folder, audio), split, speaker, labels))
        except ValueError as problem:
            problems.append(f"line {reader.line_num}: {problem}")
    _raise_listed(f"{path}: bad rows in the manifest", problems)
    if not utterances:
        raise ValueError(f"{path}: the manifest has a header but no rows, expected one for each audio file")
    return utterances


def _number(target: str, cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{target} {cell!r} is not a number") from None


def _raise_listed(heading: str, problems: Sequence[str], limit: int = 20) -> None:
    """Raise one ValueError for all problems, if there are any, so that a user mends them in one go."""
    if problems:
        more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
        raise ValueError("\n  ".join([f"{heading} ({len(problems)}):", *problems[:limit], *more]))


def check_labels(
    utterances: Sequence[Utterance],
    targets: Sequence[str],
    label_range: tuple[float, float],
    allow_speaker_overlap: bool = False,
) -> None:
    """Raise one ValueError that lists all that is wrong with splits, labels and speakers.

    Right is: each split has utterances, each utterance a finite label within `label_range` (inclusive) for
    each target, and no speaker is in two splits. A speaker "" or "Unknown" is nobody and may be in all.
    """
    low, high = label_range
    present = {utterance.split for utterance in utterances}
    problems = [f"split {split!r} has no utterances" for split in SPLITS if split not in present]
    splits_of = defaultdict(set)
    for utterance in utterances:
        splits_of[utterance.speaker].add(utterance.split)
        for target in targets:
            value = utterance.labels.get(target)
            if value is None:
                found = ", ".join(utterance.labels) or "none"
                problems.append(f"{utterance.path}: no label for target {target!r}, found {found}")
            elif not math.isfinite(value):
                problems.append(f"{utterance.path}: {target} is {value}, expected a finite number")
            elif not low <= value <= high:
                scale = f"`label_range` {low:g} to {high:g}"
                problems.append(f"{utterance.path}: {target} is {value:g}, outside {scale}")
    if not allow_speaker_overlap:
        for speaker, splits in splits_of.items():
            if len(splits) > 1 and speaker.lower() not in ("", "unknown"):
                shared = " and ".join(split for split in SPLITS if split in splits)
                hint = "part them, or set `allow_speaker_overlap: true`"
                problems.append(f"speaker {speaker!r} is in {shared}; {hint}")
    _raise_listed("the corpus cannot be used", problems)


# ---------------------------------------------------------------- audio


def check_audio(utterances: Sequence[Utterance], threads: int = 4) -> list[float]:
    """Seconds of each utterance, in order; one ValueError lists every file that `read_audio` would refuse.

    The header is enough for integer PCM in WAV, which declares its size and cannot hold NaN. All else is
    decoded.
    """

    def check(utterance: Utterance) -> float | str:
        try:
            _, samples, sample_rate = _load(utterance.path, decode_pcm=False)
            return samples / sample_rate
        except (FileNotFoundError, ValueError) as problem:
            return str(problem)

    # In parts, as a file's header takes less time than handing it to a thread.
    parts = [utterances[start : start + 64] for start in range(0, len(utterances), 64)]
    with ThreadPoolExecutor(threads) as pool:
        checked = [each for part in pool.map(lambda part: [check(u) for u in part], parts) for each in part]
    # The limit is for a wrong folder, where each of 100,000 files is missing.
    _raise_listed("bad audio files", [problem for problem in checked if isinstance(problem, str)], limit=1000)
    return checked


def read_audio(path: str | Path) -> Tensor:
    """An audio file of any rate, width, channel count and format as (S,) float32, 16 kHz; channels averaged.

    Raises FileNotFoundError, or ValueError for a file that is empty, not audio, truncated, not finite or
    shorter than MIN_SAMPLES. Truncation is noticed in WAV, FLAC, OGG, Opus, and MP3 that declares its length.
    """
    waveform, _, sample_rate = _load(str(path), decode_pcm=True)
    return resample(waveform, sample_rate)


def resample(waveform: Tensor | np.ndarray, sample_rate: int) -> Tensor:
    """(S,) floats at any integer rate in Hz -> (ceil(S * 16000 / rate),) float32 at 16 kHz."""
    if not isinstance(sample_rate, numbers.Integral) or not 0 < sample_rate <= MAX_SAMPLE_RATE:
        expected = f"an integer from 1 to {MAX_SAMPLE_RATE} Hz"
        raise ValueError(f"sample_rate: found {sample_rate!r}, expected {expected}")
    waveform = torch.as_tensor(waveform)
    if waveform.ndim != 1 or not waveform.is_floating_point():
        found = f"{tuple(waveform.shape)} {waveform.dtype}"
        raise ValueError(f"waveform: found {found}, expected one channel (S,) of floats in -1..1")
    waveform = waveform.float()
    if sample_rate == SAMPLE_RATE:
        return waveform
    from scipy.signal import resample_poly  # here, since it takes a second and 70 MB to import

    common = math.gcd(SAMPLE_RATE, int(sample_rate))
    # scipy, not torchaudio, so that the numbers do not depend on what else is installed.
    resampled = resample_poly(waveform.cpu().numpy(), SAMPLE_RATE // common, int(sample_rate) // common)
    return torch.from_numpy(resampled.astype(np.float32))


def _load(path: str, decode_pcm: bool) -> tuple[np.ndarray | None, int, int]:
    """The mono waveform (S,) at the file's own rate, S, and the rate; every error names the file.

    Without `decode_pcm` the waveform of integer PCM in WAV is left out: None.
    """
    try:
        with _open(path) as sound:
            samples, sample_rate, waveform = sound.frames, sound.samplerate, None
            if sample_rate > MAX_SAMPLE_RATE:
                raise ValueError(f"its header declares a sample rate of {sample_rate} Hz; convert it again")
            if decode_pcm or sound.format not in ("WAV", "WAVEX") or not sound.subtype.startswith("PCM_"):
                waveform = _decode(sound)
        at_16k = -(-samples * SAMPLE_RATE // sample_rate)  # rounded up, as `resample` does
        if at_16k < MIN_SAMPLES:
            found = f"{at_16k} samples at 16 kHz"
            raise ValueError(f"too short: {found}, expected at least {MIN_SAMPLES}; leave it out")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such audio file; check the path or leave it out") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None
    return waveform, samples, sample_rate


def _open(path: str) -> soundfile.SoundFile:
    """Open a sound whose end is there: libsndfile reads a WAV or OGG that was cut short without a word."""
    source: str | io.BytesIO = path
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        header = file.read(28)
        if size == 0:
            raise ValueError("empty file (0 bytes); copy it again or leave it out")
        if header[:4] == b"RIFF" and header[8:12] == b"WAVE":
            if header[12:16] == b"fmt " and header[24:28] == bytes(4):
                raise ValueError("its header declares a sample rate of 0 Hz; convert it again")
            start, declared = _wav_samples(file)
            found = size - start
            if found < declared < 0x7FFFF000:  # from there on it is what sox and ffmpeg write into a pipe
                raise ValueError(f"truncated: {found} of {declared} bytes of samples; copy it again")
            if declared == 0 < found and int.from_bytes(header[4:8], "little") + 8 != size:
                # A program that streams wrote 0 and never came back; libsndfile wants the other placeholder.
                file.seek(0)
                content = bytearray(file.read())
                content[start - 4 : start] = b"\xff" * 4
                source = io.BytesIO(content)
        elif header[:4] == b"OggS" and not _ogg_ends(file, size):
            raise ValueError("truncated: the last OGG page is cut or not marked as the last; copy it again")
    try:
        return soundfile.SoundFile(source)
    except (
        RuntimeError,
        TypeError,
    ):  # TypeError: headerless .raw. libsndfile's own reasons mislead (see MP3)
        raise ValueError("not audio that soundfile reads; convert it to WAV, FLAC, OGG or MP3") from None


def _wav_samples(file: BinaryIO) -> tuple[int, int]:
    """Where the samples of a WAV file begin and how many bytes of them its header declares."""
    file.seek(12)
    while len(chunk := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", chunk)
        if name == b"data":
            return file.tell(), length
        file.seek(length + length % 2, os.SEEK_CUR)
    raise ValueError("truncated: a WAV header without samples; copy it again")


def _ogg_ends(file: BinaryIO, size: int) -> bool:
    """Whether an OGG file closes with a whole page that is marked as the last of its stream."""
    file.seek(max(0, size - 65_307))  # the largest page there can be
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    return len(page) > 27 and page[5] & 4 > 0 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


def _decode(sound: soundfile.SoundFile) -> np.ndarray:
    """All samples with the channels averaged: (S,) float32 at the file's own rate."""
    try:
        samples = sound.read(dtype="float32", always_2d=True)  # (S, channels)
    except (RuntimeError, MemoryError, ValueError) as error:  # the last two: FLAC without a possible length
        raise ValueError(f"truncated or damaged: {error}; copy or convert it again") from None
    if len(samples) < sound.frames:
        raise ValueError(f"truncated: {len(samples)} of {sound.frames} samples; copy it again")
    if not np.isfinite(samples).all():
        raise ValueError("holds NaN or infinite samples; convert it again or leave it out")
    return samples.mean(axis=1)


# ---------------------------------------------------------------- labels and batches


def scale_labels(labels: Tensor, label_range: tuple[float, float]) -> Tensor:
    """Corpus scale -> 0..1, any shape."""
    low, high = label_range
    return (labels - low) / (high - low)


def unscale_labels(labels: Tensor, label_range: tuple[float, float]) -> Tensor:
    """0..1 -> corpus scale, any shape; not clipped."""
    low, high = label_range
    return labels * (high - low) + low


def batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every index below `count` once, in a random order that (seed, epoch) alone decides: a run can resume.

    Each batch has `batch_size` indices but the last, which has the remainder. A remainder of one joins the
    batch before it, because the CCC of one utterance is 0/0; for the same reason `batch_size` is at least 2.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size: found {batch_size}, expected 2 or more: the CCC of one is 0/0")
    order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    cut = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    if len(cut) > 1 and len(cut[-1]) == 1:
        cut[-2:] = [cut[-2] + cut[-1]]
    return cut


def prefetch(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) for each item in order; a thread computes the next while the caller uses this one.

    An exception surfaces where its result is due. Closing the generator early leaves no thread running.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = None
        for item in items:
            due, ahead = ahead, thread.submit(function, item)
            if due is not None:
                yield due.result()
        if ahead is not None:
            yield ahead.result()


# ---------------------------------------------------------------- the demo corpus

DEMO_SEED = 5  # one for which loudness and labels happen to be uncorrelated
DEMO_SPEAKERS = {"train": 8, "dev": 4, "test": 4}
VOWELS = np.array(
    [  # four formants in Hz of an average voice
        [300, 2300, 3000, 3600],  # i
        [450, 2000, 2700, 3600],  # e
        [750, 1250, 2550, 3500],  # a
        [480, 900, 2500, 3400],  # o
        [330, 800, 2400, 3400],  # u
    ]
)
BANDWIDTHS = np.array([70, 100, 140, 200])  # Hz, of the four formants


def synthesize_demo(root: str | Path, train: int = 96, dev: int = 32, test: int = 32) -> Path:
    """Make the demo corpus in `root`, unless it is there already, and return the path of its manifest.

    A synthetic voice (buzz and breath through four resonators) whose labels, 1..7, are the knobs it was made
    with: it shows that a pipeline learns and **says nothing about emotion**. Each speaker has a pitch and a
    vocal tract of its own and is in one split. Every run makes the same files. Raises ValueError if `root`
    holds another manifest.csv.
    """
    root = Path(root)
    manifest = root / "manifest.csv"
    rows, voices = ["path,split,speaker,activation,valence,dominance\n"], []
    first_speaker = 0
    for split, count in zip(SPLITS, (train, dev, test), strict=True):
        for index in range(count):
            speaker = first_speaker + index % DEMO_SPEAKERS[split]
            rng = np.random.default_rng([DEMO_SEED, first_speaker, index])
            labels = rng.uniform(1, 7, size=3).round(3)
            path = f"{split}_{index:03d}.wav"
            rows.append(f"{path},{split},demo{speaker:02d},{','.join(map(str, labels.tolist()))}\n")
            voices.append((root / path, rng, speaker, (labels - 1) / 6))
        first_speaker += DEMO_SPEAKERS[split]
    text = "".join(rows).encode()
    if manifest.exists():
        if manifest.read_bytes() != text:
            raise ValueError(f"{manifest}: not this version's demo; delete it or set another `data_root`")
        if all(path.exists() for path, *_ in voices):
            return manifest
    root.mkdir(parents=True, exist_ok=True)
    for path, *controls in voices:
        soundfile.write(path, _voice(*controls), SAMPLE_RATE, subtype="PCM_16")
    # Last and in one move: where there is a manifest, its audio was written whole.
    partial = root / "manifest.csv.part"
    partial.write_bytes(text)
    os.replace(partial, manifest)
    return manifest


def _voice(rng: np.random.Generator, speaker: int, knobs: np.ndarray) -> np.ndarray:
    """One utterance of 0.9 to 1.8 s, (S,) within -1..1; the knobs activation, valence, dominance are 0..1.

    Activation raises pitch, pitch range, syllable rate and treble. Valence turns the pitch from falling to
    rising, takes breath out of the voice and, as a smile does, lifts the upper formants. Dominance separates
    the syllables. Loudness is random, since the waveform is normalised before the backbone sees it.
    """
    from scipy.signal import lfilter, sosfilt

    activation, valence, dominance = knobs
    # Multiples of two irrational numbers spread the speakers evenly over the plane of pitch and vocal tract.
    own_pitch = 95 * 2 ** (1.1 * (0.7549 * speaker % 1))  # Hz
    own_tract = 0.92 + 0.18 * (0.5698 * speaker % 1)  # factor on all formants
    count = int(SAMPLE_RATE * rng.triangular(0.9, 1.05, 1.8))
    time = np.arange(count) / SAMPLE_RATE  # s
    syllable = (2.5 + 3.5 * activation) * rng.uniform(0.9, 1.1) * time + rng.uniform()  # one more for each
    openness = np.sin(np.pi * syllable) ** 2  # 0 between two syllables, 1 amid one

    octaves = 0.8 * (activation - 0.5) + (0.05 + 0.25 * activation) * openness
    octaves += (valence - 0.5) * (time / time[-1] - 0.5)
    buzz = np.diff(np.floor(np.cumsum(own_pitch * 2**octaves / SAMPLE_RATE)), prepend=0)  # a pulse a period
    breath = rng.standard_normal(count) * 10 ** (-(10 + 25 * valence) / 20)
    pole = 0.97 - 0.25 * activation  # of the low-pass that tilts the spectrum
    source = lfilter([1 - pole], [1, -pole], buzz + breath)
    source *= 0.05 + 0.95 * openness ** (0.4 + 1.6 * dominance)

    vowels = VOWELS[rng.integers(len(VOWELS), size=int(syllable[-1]) + 2)] * own_tract
    vowels[:, 1:] *= 1 + 0.25 * (valence - 0.5)
    radius = np.exp(-np.pi * BANDWIDTHS / SAMPLE_RATE)
    speech, state = np.empty(count), np.zeros((4, 2))
    step = SAMPLE_RATE // 100  # the formants glide in steps of 10 ms
    for start in range(0, count, step):
        index, glide = divmod(syllable[start], 1)
        formants = (1 - glide) * vowels[int(index)] + glide * vowels[int(index) + 1]  # (4,) Hz
        sections = np.zeros((4, 6))  # one resonator a row: b0 b1 b2 a0 a1 a2
        sections[:, 3] = 1
        sections[:, 4] = -2 * radius * np.cos(2 * np.pi * formants / SAMPLE_RATE)
        sections[:, 5] = radius**2
        sections[:, 0] = sections[:, 3:].sum(axis=1)  # gain 1 at 0 Hz
        speech[start : start + step], state = sosfilt(sections, source[start : start + step], zi=state)
    return rng.uniform(0.02, 0.1) * speech / np.sqrt(np.mean(speech**2))
