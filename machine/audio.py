"""An audio file as samples: WAV and FLAC with soundfile, everything else through `formats.media`; resampling.

waveform, samples, sample_rate = read_original("talk.wav#t=2.5,4")  # (S,) float32 at the file's own rate
waveform = resample(waveform, sample_rate)  # at 16 kHz
"""

import math
import numbers
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor

from config import extra

SAMPLE_RATE = 16_000  # Hz, what every Wav2Vec 2.0 was trained on
MIN_SAMPLES = 400  # at SAMPLE_RATE: one frame of the CNN, 25 ms
BLOCK = 1 << 20  # samples decoded at once
MIN_SAMPLE_RATE = 1000  # Hz; less is a damaged header, and a second becomes hours at 16 kHz
MAX_SAMPLE_RATE = 1_000_000  # Hz; more is a damaged header, and a resampling filter that fills the memory
MAX_SAMPLES = 1 << 30  # of a file, at its rate and at 16 kHz: 6 hours at 48 kHz, 4 GB; FLAC packs silence to nothing

CLOCK_STEP = 2_000_000_000  # ns; times of change advance in steps of up to 2 s (FAT), 24 ms in virtual machines

SILENT = 1e-3  # of full scale: no sample is farther from the mean; -60 dB
BY_SOUNDFILE = {"WAV", "WAVEX", "RF64", "FLAC", "HTK", "MAT4", "MAT5", "MPC2K", "SD2", "SDS", "WVE", "XI"}
PART = re.compile(r"(.+)#t=(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)?", re.DOTALL)  # W3C Media Fragments


class TooShortError(ValueError):
    """Audio with less than one frame of the CNN."""


def resample(waveform: Tensor | np.ndarray, sample_rate: int, new_rate: int = SAMPLE_RATE) -> Tensor:
    """(S,) floats at any integer rate in Hz -> (ceil(S * new_rate / rate),) float32 at 16 kHz or another new rate."""
    if not isinstance(sample_rate, numbers.Integral) or not 0 < sample_rate <= MAX_SAMPLE_RATE:
        expected = f"an integer from 1 to {MAX_SAMPLE_RATE} Hz"
        raise ValueError(f"sample_rate: found {sample_rate!r}, expected {expected}")
    waveform = torch.as_tensor(waveform)
    if waveform.ndim != 1 or not waveform.is_floating_point():
        found = f"{tuple(waveform.shape)} {waveform.dtype}"
        raise ValueError(f"waveform: found {found}, expected one channel (S,) of floats in -1..1")
    waveform = waveform.float()
    if sample_rate == new_rate:
        return waveform
    from scipy.signal import resample_poly  # here, since it takes a second and 70 MB to import

    common = math.gcd(new_rate, int(sample_rate))
    # scipy, not torchaudio, so that the numbers do not depend on what else is installed.
    resampled = resample_poly(waveform.cpu().numpy(), new_rate // common, int(sample_rate) // common)
    return torch.from_numpy(resampled.astype(np.float32))


def silence(waveform: np.ndarray | Tensor) -> str:
    """What is wrong with a sound (S,) in which nothing can be heard; else an empty text."""
    middle = float(waveform.mean())
    centered: Any = waveform - middle  # of either kind
    level = float(abs(centered).max())
    if level >= SILENT:
        return ""
    if abs(middle) >= SILENT:
        return f"silent: every sample is {middle:.3g}"
    return f"silent, or its channels cancel: no sample is above {level:.1g} of full scale"


def split_source(source: str | Path) -> tuple[str, float, float | None]:
    """The path of a source, and where its part starts and ends in seconds; None is the end of the file."""
    source = os.fspath(source)
    match = PART.fullmatch(source)
    if not match or os.path.exists(source):  # a file may have such a name
        return source, 0.0, None
    path, start, end = match.groups()
    return path, float(start), float(end) if end else None


def path_finder() -> Callable[[str], str]:
    """A function from a source to the same with its file's real path, whatever links and spelling lead to it.

    It remembers the folders that it has seen: four times as fast for a large corpus.
    """
    real_folder = lru_cache(maxsize=None)(os.path.realpath)

    def real_path(source: str) -> str:
        path = split_source(source)[0]
        folder, name = os.path.split(path)
        try:
            found = os.path.join(real_folder(folder), name)
            found = (os.path.realpath(found) if os.path.islink(found) else found) + source[len(path) :]
            return source if found == source else found  # of a large corpus a copy of each takes tens of MB
        except ValueError:  # no path: it holds a null character
            return source

    return real_path


def file_state(source: str) -> tuple[int, int]:
    """Size and time of change in ns, by which a replaced file is noticed; -1 and -1 for one that is not there."""
    try:
        status = os.stat(split_source(source)[0])
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def settled_states(sources: Sequence[str]) -> list[tuple[int, int]]:
    """The state of each file, once any later change of it must get another time: clocks are coarse.

    A file that is still changing after the wait gets a time that no file has, so its entry is never used again.
    """
    states = list(map(file_state, sources))
    newest = max((mtime for _, mtime in states if mtime <= time.time_ns()), default=0)
    if (wait := newest + CLOCK_STEP - time.time_ns()) <= 0:
        return states
    time.sleep(wait / 1e9 + 0.05)  # more than a step of the system's own clock
    now, states = time.time_ns(), list(map(file_state, sources))
    return [(size, -now if 0 <= now - mtime < CLOCK_STEP else mtime) for size, mtime in states]


def read_original(source: str, decode_pcm: bool = True) -> tuple[np.ndarray | None, int, int]:
    """The mono waveform (S,) at the file's own rate, S, and the rate; raises as `read_audio` does.

    Without `decode_pcm` the waveform of integer PCM in WAV is left out: None.
    """
    path, start, end = split_source(source)
    try:
        waveform, samples, sample_rate = decode_file(path, start, end, decode_pcm)
        if end is not None and samples < round(end * sample_rate) - round(start * sample_rate):
            raise ValueError(f"its part {start:g} to {end:g} s ends after the file; correct `end`")
        at_16k = -(-samples * SAMPLE_RATE // sample_rate)  # rounded up, as `resample` does
        if at_16k < MIN_SAMPLES:
            found = f"{at_16k} samples at 16 kHz"
            raise TooShortError(f"too short: {found}, expected at least {MIN_SAMPLES}; leave it out")
        if waveform is not None and not np.isfinite(waveform).all():
            raise ValueError("holds NaN or infinite samples; convert it again or leave it out")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such audio file; check the path or leave it out") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as problem:
        kind = TooShortError if isinstance(problem, TooShortError) else ValueError
        raise kind(f"{source}: {problem}") from None
    return waveform, samples, sample_rate


def decode_file(path: str, start: float, end: float | None, decode_pcm: bool) -> tuple[np.ndarray | None, int, int]:
    """As `read_original`: WAV and FLAC with soundfile, everything else and what has no known length with PyAV."""
    known = has_known_length(path)
    try:
        sound = soundfile.SoundFile(os.fsencode(path)) if known else None
    except (RuntimeError, TypeError):  # TypeError: a headerless .raw file
        sound = None
    if sound is None or sound.format not in BY_SOUNDFILE or sound.frames > 1 << 62:
        waveform, sample_rate = extra("formats.media", "it is neither WAV nor FLAC").decode(path, start, end)
        return waveform, len(waveform), sample_rate
    with sound:
        if not MIN_SAMPLE_RATE <= sound.samplerate <= MAX_SAMPLE_RATE:
            raise ValueError(f"its header declares a sample rate of {sound.samplerate} Hz; convert it again")
        first = min(round(start * sound.samplerate), sound.frames)
        last = sound.frames if end is None else min(round(end * sound.samplerate), sound.frames)
        require_length(last - first, sound.samplerate)
        pcm = sound.format in ("WAV", "WAVEX") and sound.subtype.startswith("PCM_")
        waveform = read_samples(sound, first, last) if decode_pcm or not pcm else None
        return waveform, last - first, sound.samplerate


def has_known_length(path: str) -> bool:
    """False for a WAV file that a program wrote into a pipe. Raises ValueError for what no decoder should be given.

    libsndfile reads a WAV file that was cut short, or one of two that were joined, without a word.
    """
    if stat.S_ISFIFO(os.stat(path).st_mode):  # to open it would wait for whoever writes into it
        raise ValueError("is no file but a pipe; leave it out")
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        header = file.read(28)
        if size == 0:
            raise ValueError("empty file (0 bytes); copy it again or leave it out")
        if header[:4] != b"RIFF" or header[8:12] != b"WAVE":
            return True
        if header[12:16] == b"fmt " and header[24:28] == bytes(4):
            raise ValueError("its header declares a sample rate of 0 Hz; convert it again")
        start, declared = wav_samples(file)
        found = size - start
        if declared >= 0x7FFFF000 or (declared == 0 < found and int.from_bytes(header[4:8], "little") + 8 != size):
            return False  # placeholders of programs that do not know the length when they write the header
        if found < declared:
            raise ValueError(f"truncated: {found} of {declared} bytes of samples; copy it again")
        file.seek(start + declared)
        if file.read(4) == b"RIFF":
            raise ValueError("a second WAV file is joined to its end; split them")
    return True


def wav_samples(file: BinaryIO) -> tuple[int, int]:
    """Where the samples of a WAV file begin and how many bytes of them its header declares."""
    file.seek(12)
    while len(chunk := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", chunk)
        if name == b"data":
            return file.tell(), length
        file.seek(length + length % 2, os.SEEK_CUR)
    raise ValueError("truncated: a WAV header without samples; copy it again")


def require_length(samples: int, sample_rate: int) -> None:
    if samples * max(1, SAMPLE_RATE / sample_rate) > MAX_SAMPLES:
        raise ValueError(f"is longer than {MAX_SAMPLES} samples; cut it into several files")


def read_samples(sound: soundfile.SoundFile, first: int, last: int) -> np.ndarray:
    """Samples `first` to `last` with the channels averaged: (S,) float32; block by block, for hours of stereo."""
    blocks, left = [np.empty(0, np.float32)], last - first
    try:
        sound.seek(first)
        while left and len(block := sound.read(min(left, max(1, BLOCK // sound.channels)), "float32", always_2d=True)):
            blocks.append(block.mean(axis=1))  # (S, channels) -> (S,)
            left -= len(block)
    except RuntimeError as error:
        raise ValueError(f"truncated or damaged: {error}; copy or convert it again") from None
    if left:
        raise ValueError(f"truncated: {last - first - left} of {last - first} samples; copy it again")
    return np.concatenate(blocks)
