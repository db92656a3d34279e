"""Sound from phones, browsers, messengers and films: every container and codec that FFmpeg reads, through PyAV.

    waveform, sample_rate = decode("interview.m4a")  # (S,) float32 at the file's own rate, channels averaged

What is decoded is all that the file holds, or there is an error. FFmpeg itself stops without a word where a file was
cut. Therefore the declared length, the times of packets and the last page of an Ogg file are compared with the result.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np

from data import say_once
from machine.audio import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE, require_length, resample

LOSSLESS = {"aiff", "au", "caf", "w64", "flac", "avr", "epaf", "iff", "ircam", "pvf"}  # declare samples
LOSSY = {"mov", "matroska", "asf", "avi"}  # declare a time, to which codecs round and pad
JOINED = {"mp3", "aac", "amr"}  # files without a container: between two that were joined there are tags and headers
LOST = 4  # packets in a row that may be such tags and headers
SEEKABLE = {"mov", "matroska", "ogg"}  # each packet has its time, so that a part of the file can be found
SLACK = 0.15  # seconds
SOUND = "3ga aac ac3 adts aif aifc aiff alac amr ape au avr awb caf dts eac3 flac gsm htk ircam m4a m4b m4p mat mka mp1"
SOUND += (
    " mp2 mp3 mpc nist oga ogg opus paf pvf qcp ra rf64 sd2 sds snd sph spx svx tta voc w64 wav wave weba wma wv wve xi"
)
FILM = "3g2 3gp asf avi f4v flv m2ts m4v mkv mov mp4 mpeg mpg mts ogm ogv rm ts vob webm wmv"
SUFFIXES = {f".{name}" for name in f"{SOUND} {FILM}".split()}  # of files that are sound or film
LEAD = 0.5  # seconds decoded before a part, so that the decoder has settled
OGG_PAGE = 65_307  # bytes of the largest page there can be


@dataclass
class Progress:
    """How far a file was read."""

    seconds: float = 0.0
    first_byte: int | None = None  # where the first packet is in the file


def decode(path: str, start: float = 0.0, end: float | None = None) -> tuple[np.ndarray, int]:
    """The first audio track between two times in seconds: mono (S,) float32 at its own rate, and that rate in Hz.

    Only the part itself is decoded where the format has times to seek by. A track that changes its rate is resampled
    to the rate it begins with. Raises ValueError, without the path, for what is no sound, encrypted, empty, cut or
    damaged.
    """
    done = Progress()
    try:
        # An open file and no protocols: a playlist cannot make FFmpeg read other files or the network.
        with open(path, "rb") as file, av.open(file, options={"protocol_whitelist": ""}) as container:
            kind = container.format.name.partition(",")[0]
            stream = first_track(container, path)
            bit_rate = stream.codec_context.bit_rate or 1  # before decoding, which changes it
            waveform, rate, offset = collect(pieces(container, stream, kind, start, end, done), end, done)
            waveform = without_padding(waveform, stream)
            if end is None:
                declared = declared_seconds(container, stream, kind, bit_rate, done.first_byte)
                require_whole((offset + len(waveform)) / rate, declared, 0.5 / rate if kind in LOSSLESS else SLACK)
                if kind == "ogg":
                    require_last_page(file)
    except (av.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it cannot be decoded"
        if not done.seconds:
            raise ValueError(f"not audio that can be read ({reason}); convert it to WAV or FLAC") from None
        raise ValueError(
            f"truncated or damaged after {done.seconds:.2f} s ({reason}); copy or convert it again"
        ) from None
    return waveform[max(0, round(start * rate) - offset) :], rate


def first_track(container: av.container.InputContainer, path: str) -> av.AudioStream:
    """The first audio track; others beside it, and films, are mentioned on stderr."""
    if not container.streams.audio:
        found = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise ValueError(f"has no audio track, found {found}; leave it out")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise ValueError("its audio has a codec that FFmpeg does not know; convert it to WAV or FLAC")
    if (tag := stream.codec_context.codec_tag) in ("enca", "drms"):
        raise ValueError(f"is encrypted ({tag}); export it without copy protection")
    pictures = (av.stream.Disposition.attached_pic, av.stream.Disposition.timed_thumbnails)
    if any(not any(kind & video.disposition for kind in pictures) for video in container.streams.video):
        say_once("note: some files are films; their first audio track is read")
    if len(container.streams.audio) > 1:
        say_once(f"note: {path}: has {len(container.streams.audio)} audio tracks; the first is read")
    return stream


def pieces(
    container: av.container.InputContainer,
    stream: av.AudioStream,
    kind: str,
    start: float,
    end: float | None,
    done: Progress,
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Decoded parts in order: mono samples, their rate, and where the part begins as a sample of the track."""
    base, at, failed = (stream.start_time or 0) * (stream.time_base or 0), 0, 0
    if sought := start > 2 * LEAD and kind in SEEKABLE:
        container.seek(int((start - LEAD + float(base)) / stream.time_base), stream=stream)
    for packet in container.demux(stream):
        done.first_byte = packet.pos if done.first_byte is None else done.first_byte
        if packet.is_corrupt and kind != "wav":  # which sets it at the end of a pipe; its length is known before
            raise av.InvalidDataError(0, "a packet is cut")
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            failed += 1
            if kind not in JOINED or failed > LOST:
                raise
            continue
        for frame in frames:
            if frame.is_corrupt:
                raise av.InvalidDataError(0, "a frame is cut")
            failed, rate = 0, frame.sample_rate
            told = round(float(frame.pts * frame.time_base - base) * rate) if frame.pts is not None else None
            if sought:
                at, sought = max(0, told or 0), False
            elif kind == "ogg" and told is not None and told - at > SLACK * rate:
                raise av.InvalidDataError(0, f"{(told - at) / rate:.2f} s are missing")
            elif kind == "ogg" and told is not None and told < at - SLACK * rate:  # another stream begins
                base = frame.pts * frame.time_base - Fraction(at, rate)
            yield mono(frame), rate, at
            at += frame.samples
            if end is not None and at >= end * rate:
                return
    if failed:
        raise av.InvalidDataError(0, "the last packet is cut")


def collect(
    parts: Iterator[tuple[np.ndarray, int, int]], end: float | None, done: Progress
) -> tuple[np.ndarray, int, int]:
    """All parts at the rate of the first, up to `end`; that rate; and the sample at which the first begins.

    `done.seconds` is what there is so far, for a message if the next part cannot be decoded.
    """
    runs: list[tuple[list[np.ndarray], int]] = []  # stretches of one rate
    count, rate, offset = 0, 0, 0
    for samples, own, at in parts:
        if not runs:
            rate, offset = own, at
        if not MIN_SAMPLE_RATE <= own <= MAX_SAMPLE_RATE:
            raise ValueError(f"declares a sample rate of {own} Hz; convert it again")
        if not runs or runs[-1][1] != own:
            runs.append(([], own))
        runs[-1][0].append(samples)
        count += len(samples)
        require_length(count, min(own, rate))
        done.seconds += len(samples) / own
    if not runs:
        raise ValueError("holds no sound; leave it out")
    joined = [
        np.concatenate(stretch) if own == rate else resample(np.concatenate(stretch), own, rate).numpy()
        for stretch, own in runs
    ]
    waveform = np.concatenate(joined)
    return (waveform if end is None else waveform[: max(0, round(end * rate) - offset)]), rate, offset


def without_padding(waveform: np.ndarray, stream: av.AudioStream) -> np.ndarray:
    """Without the end of the last block of a Vorbis stream, which FFmpeg leaves in where the file has one page."""
    surplus = len(waveform) - (stream.duration or 0)
    return waveform[: stream.duration] if stream.codec_context.name == "vorbis" and 0 < surplus < 8192 else waveform


def mono(frame: av.AudioFrame) -> np.ndarray:
    """The mean of a frame's channels, (S,) float32 in -1..1."""
    samples = frame.to_ndarray()  # (channels, S), or packed (1, S * channels)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples / np.float32(2 ** (8 * samples.itemsize - 1))
    return samples.mean(axis=0, dtype=np.float32)


def declared_seconds(
    container: av.container.InputContainer, stream: av.AudioStream, kind: str, bit_rate: int, first_byte: int | None
) -> float:
    """The length that the file declares; 0 where it does not, or where FFmpeg's is an estimate."""
    declared = float(stream.duration * stream.time_base) if stream.duration else 0.0
    if kind in LOSSY or kind in LOSSLESS:
        alone = kind == "matroska" and len(container.streams) == 1
        return container.duration / av.time_base if alone and container.duration else declared
    if kind == "mp3":  # a Xing header, unless it is what follows from the number of bytes and the bit rate
        estimate = 8 * (container.size - (first_byte or 0)) / bit_rate
        return declared if abs(declared - estimate) > SLACK + 0.005 * declared else 0.0
    return 0.0


def require_whole(seconds: float, declared: float, slack: float) -> None:
    if seconds < declared - slack:
        raise ValueError(f"truncated: {seconds:.2f} of {declared:.2f} s; copy it again")


def require_last_page(file: BinaryIO) -> None:
    """Raise ValueError if an Ogg file ends inside a page, which FFmpeg leaves out without a word."""
    file.seek(max(0, file.seek(0, 2) - OGG_PAGE))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
        raise ValueError("truncated: its last Ogg page is cut; copy it again")
