"""From files to tensors: audio of any kind as 16 kHz mono, and random batches. Corpora are read in `corpora.py`.

    utterances = load_corpus("manifest", manifest="my/manifest.csv")
    check_labels(utterances, ["activation", "valence"], label_range=(1, 7))
    seconds = check_audio(utterances)
    waveform = read_audio(utterances[0].path)  # (S,) float32, 16 kHz

Nothing is padded, cropped or normalised here: an utterance is its samples, and its length is its own.

    python data.py check CONFIG [key=value ...] [--out DIR]

reads a corpus without training: its numbers, a picture of its labels, and every problem with its file. It exits with 0
if there is none, 1 after warnings, 2 after errors, which are what training refuses and sounds that two splits share.
"""

import argparse
import io
import math
import numbers
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import soundfile
import torch
from torch import Tensor

from corpora.demo import synthesize_demo

# ruff: noqa: F401 - all that is about data can be had from here
from corpora.published import CORPORA, LABEL_RANGE, load_corpus, read_corpus, say_once
from manifest import (
    LABEL_COLUMNS,
    REQUIRED_COLUMNS,
    SPLITS,
    Problem,
    Utterance,
    check_labels,
    label_problems,
    raise_listed,
    read_manifest,
    text_cell,
)

SAMPLE_RATE = 16_000  # Hz, what every Wav2Vec 2.0 was trained on
MIN_SAMPLES = 400  # at SAMPLE_RATE: one frame of the CNN, 25 ms
BLOCK = 1 << 20  # samples decoded at once
MIN_SAMPLE_RATE = 1000  # Hz; less is a damaged header, and a second becomes hours at 16 kHz
MAX_SAMPLE_RATE = 1_000_000  # Hz; more is a damaged header, and a resampling filter that fills the memory
MAX_SAMPLES = 1 << 30  # of a file, at its rate and at 16 kHz: 6 hours at 48 kHz, 4 GB; FLAC packs silence to nothing

Item, Result = TypeVar("Item"), TypeVar("Result")


class TooShortError(ValueError):
    """Audio with less than one frame of the CNN."""


# ---------------------------------------------------------------- audio


def check_audio(utterances: Sequence[Utterance], threads: int = 4) -> list[float]:
    """Seconds of each utterance, in order; one ValueError lists every file that `read_audio` would refuse.

    The header is enough for integer PCM in WAV, which declares its size and cannot hold NaN. All else is
    decoded.
    """

    def check(utterance: Utterance) -> float | str:
        try:
            _, samples, sample_rate = read_original(utterance.path, decode_pcm=False)
            return samples / sample_rate
        except (FileNotFoundError, ValueError) as problem:
            return str(problem)

    # In parts, as a file's header takes less time than handing it to a thread.
    parts = [utterances[start : start + 64] for start in range(0, len(utterances), 64)]
    with ThreadPoolExecutor(threads) as pool:
        checked = [each for part in pool.map(lambda part: [check(u) for u in part], parts) for each in part]
    # The limit is for a wrong folder, where each of 100,000 files is missing.
    raise_listed("bad audio files", [problem for problem in checked if isinstance(problem, str)], limit=1000)
    return checked


def read_audio(path: str | Path) -> Tensor:
    """An audio file of any rate, width, channel count and format as (S,) float32, 16 kHz; channels averaged.

    Raises FileNotFoundError, or ValueError for a file that is empty, not audio, truncated, not finite or
    shorter than MIN_SAMPLES. Truncation is noticed in WAV, FLAC, OGG, Opus, and MP3 that declares its length.
    """
    waveform, _, sample_rate = read_original(str(path))
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


def read_original(path: str, decode_pcm: bool = True) -> tuple[np.ndarray | None, int, int]:
    """The mono waveform (S,) at the file's own rate, S, and the rate; raises as `read_audio` does.

    Without `decode_pcm` the waveform of integer PCM in WAV is left out: None.
    """
    try:
        with _open(path) as sound:
            samples, sample_rate, waveform = sound.frames, sound.samplerate, None
            if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
                raise ValueError(f"its header declares a sample rate of {sample_rate} Hz; convert it again")
            if decode_pcm or sound.format not in ("WAV", "WAVEX") or not sound.subtype.startswith("PCM_"):
                waveform = _decode(sound)
        at_16k = -(-samples * SAMPLE_RATE // sample_rate)  # rounded up, as `resample` does
        if at_16k < MIN_SAMPLES:
            found = f"{at_16k} samples at 16 kHz"
            raise TooShortError(f"too short: {found}, expected at least {MIN_SAMPLES}; leave it out")
        require_length(samples, sample_rate)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such audio file; check the path or leave it out") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except TooShortError as problem:
        raise TooShortError(f"{path}: {problem}") from None
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None
    return waveform, samples, sample_rate


def _open(path: str) -> soundfile.SoundFile:
    """Open a sound whose end is there: libsndfile reads a WAV or OGG that was cut short without a word."""
    source: str | io.BytesIO = path
    if stat.S_ISFIFO(os.stat(path).st_mode):  # to open it would wait for whoever writes into it
        raise ValueError("is no file but a pipe; leave it out")
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


def require_length(samples: int, sample_rate: int) -> None:
    if samples * max(1, SAMPLE_RATE / sample_rate) > MAX_SAMPLES:
        raise ValueError(f"is longer than {MAX_SAMPLES} samples; cut it into several files")


def _decode(sound: soundfile.SoundFile) -> np.ndarray:
    """All samples with the channels averaged: (S,) float32 at the own rate; part by part, for hours of stereo."""
    parts = [np.empty(0, np.float32)]
    try:
        size, count = max(1, BLOCK // sound.channels), 0
        while len(part := sound.read(size, dtype="float32", always_2d=True)):  # (S, channels)
            parts.append(part.mean(axis=1))
            require_length(count := count + len(part), sound.samplerate)
    except RuntimeError as error:
        raise ValueError(f"truncated or damaged: {error}; copy or convert it again") from None
    samples = np.concatenate(parts)
    if len(samples) < sound.frames:
        raise ValueError(f"truncated: {len(samples)} of {sound.frames} samples; copy it again")
    if not np.isfinite(samples).all():
        raise ValueError("holds NaN or infinite samples; convert it again or leave it out")
    return samples


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


# ---------------------------------------------------------------- the command line


def main() -> None:
    parser = argparse.ArgumentParser(description="Look at a corpus without training.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="count, draw the labels, and name every problem with its file")
    check.add_argument("config", help="a YAML file, as in configs/")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set otherwise")
    check.add_argument("--out", help="folder for the report, its tables and pictures; else one below output_dir")
    arguments = parser.parse_args()
    from run import check_corpus

    text, severity = check_corpus(arguments.config, arguments.overrides, arguments.out)
    sys.stdout.reconfigure(errors="backslashreplace")  # a Windows pipe cannot carry every file's name
    print(text)
    sys.exit(severity)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'stopped; no report is written'}", file=sys.stderr)
        sys.exit(2)
