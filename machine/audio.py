"""An audio file as samples: WAV, AIFF and FLAC with soundfile, everything else through `formats.media`; resampling.

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
from collections.abc import Callable, Iterator, Sequence
from functools import cache
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
BY_SOUNDFILE = {"WAV", "WAVEX", "RF64", "AIFF", "FLAC", "HTK", "MAT4", "MAT5", "MPC2K", "SD2", "SDS", "WVE", "XI"}
KINDS = {b"RIFFWAV": "WAV", b"RF64WAV": "RF64", b"FORMAIF": "AIFF"}  # by the bytes that a file begins with
FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # how a file begins: with a STREAMINFO of 34 bytes
PART = re.compile(r"(.+)#t=(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)?", re.DOTALL)  # W3C Media Fragments


class TooShortError(ValueError):
    """Audio with less than one frame of the CNN."""


def resample(waveform: Tensor | np.ndarray, sample_rate: int, new_rate: int = SAMPLE_RATE) -> Tensor:
    """(S,) floats at any integer rate in Hz -> (ceil(S * new_rate / rate),) float32 at 16 kHz or another new rate."""
    if not isinstance(sample_rate, numbers.Integral) or not 0 < sample_rate <= MAX_SAMPLE_RATE:
        raise ValueError(f"sample_rate: found {sample_rate!r}, expected an integer from 1 to {MAX_SAMPLE_RATE} Hz")
    waveform = torch.as_tensor(waveform)
    if waveform.ndim != 1 or not waveform.is_floating_point():
        found = f"{tuple(waveform.shape)} {waveform.dtype}"
        raise ValueError(f"waveform: found {found}, expected one channel (S,) of floats in -1..1")
    if sample_rate == new_rate:
        return waveform.float()
    from scipy.signal import resample_poly  # here, since it takes a second and 70 MB to import

    common = math.gcd(new_rate, int(sample_rate))
    # scipy, not torchaudio, so that the numbers do not depend on what else is installed.
    resampled = resample_poly(waveform.float().cpu().numpy(), new_rate // common, int(sample_rate) // common)
    return torch.from_numpy(resampled.astype(np.float32))


def silence(waveform: np.ndarray) -> str:
    """What is wrong with a sound (S,) in which nothing can be heard; else an empty text."""
    middle = float(waveform.mean())
    level = float(np.abs(waveform - middle).max())
    if level >= SILENT:
        return ""
    cancelled = f", or its channels cancel: no sample is above {level:.1g} of full scale"
    return "silent" + (f": every sample is {middle:.3g}" if abs(middle) >= SILENT else cancelled)


def split_source(source: str | Path) -> tuple[str, float, float | None]:
    """The path of a source, and where its part starts and ends in seconds; None is the end of the file."""
    source = os.fspath(source)
    match = PART.fullmatch(source)
    if not match or os.path.exists(source):  # a file may have such a name
        return source, 0.0, None
    path, start, end = match.groups()
    return path, float(start), float(end) if end else None


def path_finder() -> Callable[[str], str]:
    """A function from a source to the same with its file's real path, whatever links and spelling lead to it."""
    real_folder = cache(os.path.realpath)  # four times as fast for a large corpus

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


def read_original(source: str, decode_pcm: bool = True) -> tuple[Any, int, int]:
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
    """As `read_original`: with soundfile where its length is exact, with PyAV everything else."""
    known = has_known_length(path, end is None)
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


def has_known_length(path: str, whole: bool) -> bool:
    """False for WAV and AIFF that a program wrote into a pipe: their headers do not tell the length.

    Raises ValueError for what libsndfile would read in part without a word: a file that was cut, and files that were
    joined. FLAC is searched for a second file only where the `whole` of it is to be read.
    """
    status = os.stat(path)
    if stat.S_ISFIFO(status.st_mode):  # to open it would wait for whoever writes into it
        raise ValueError("is no file but a pipe; leave it out")
    with open(path, "rb") as file:
        header = file.read(36)
        if not header:
            raise ValueError("empty file (0 bytes); copy it again or leave it out")
        if header[:4] == b"fLaC" and whole and FLAC.search(file.read()):
            raise ValueError("a second FLAC file is joined to its end; split them")
        if (kind := KINDS.get(header[:4] + header[8:11])) is None:
            return True
        if header[12:16] == b"fmt " and header[24:28] == bytes(4):
            raise ValueError("its header declares a sample rate of 0 Hz; convert it again")
        order = ">" if kind == "AIFF" else "<"
        samples = next((chunk for chunk in chunks(file, 12, order) if chunk[0] in (b"data", b"SSND")), None)
        if samples is None:
            raise ValueError(f"truncated: a {kind} header without samples; copy it again")
        _, begin, declared = samples
        found, (total,) = status.st_size - begin, struct.unpack(f"{order}I", header[4:8])
        if kind == "RF64":
            declared = int.from_bytes(header[28:36], "little")
        elif declared >= 0x7FFFF000 or (declared == 0 < found and total + 8 != status.st_size):
            return False  # placeholders of programs that do not know the length when they write the header
        if found < declared:
            raise ValueError(f"truncated: {found} of {declared} bytes of samples; copy it again")
        if any(name in (b"RIFF", b"FORM") for name, _, _ in chunks(file, begin + declared + declared % 2, order)):
            raise ValueError(f"a second {kind} file is joined to its end; split them")
    return True


def chunks(file: BinaryIO, start: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a RIFF (order "<") or AIFF file (">") from `start` on: name, first byte, declared bytes."""
    file.seek(start)
    while len(head := file.read(8)) == 8 and 0 not in head[:4]:
        name, size = struct.unpack(f"{order}4sI", head)
        yield name, start + 8, size
        start += 8 + size + size % 2
        file.seek(start)


def require_length(samples: int, sample_rate: int) -> None:
    """Raise ValueError for a sound that would fill the memory."""
    if samples * max(1, SAMPLE_RATE / sample_rate) > MAX_SAMPLES:
        raise ValueError(f"is longer than {MAX_SAMPLES} samples; cut it into several files")


def read_samples(sound: soundfile.SoundFile, first: int, last: int) -> np.ndarray:
    """Samples `first` to `last` with the channels averaged: (S,) float32; block by block, for hours of stereo."""
    blocks, left = [np.empty(0, np.float32)], last - first
    try:
        if first:  # to where it stands already a FLAC file would search, which takes longer than to decode 20 s
            sound.seek(first)
        while left and len(block := sound.read(min(left, max(1, BLOCK // sound.channels)), "float32", always_2d=True)):
            blocks.append(block.mean(axis=1))  # (S, channels) -> (S,)
            left -= len(block)
    except RuntimeError as error:
        raise ValueError(f"truncated or damaged: {error}; copy or convert it again") from None
    if left:
        raise ValueError(f"truncated: {last - first - left} of {last - first} samples; copy it again")
    return np.concatenate(blocks)
