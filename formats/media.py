"""Sound from phones, browsers, messengers and films: every container and codec that FFmpeg reads, through PyAV.

    waveform, sample_rate = decode("interview.m4a")  # (S,) float32 at the file's own rate, channels averaged

What is decoded is all that the file holds, or there is an error. FFmpeg itself stops without a word where a file was
cut. Therefore the declared length, the times and sizes of packets and the end of the file are compared with the result.
"""

from collections.abc import Iterator
from itertools import chain, groupby
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer

from data import say_once
from machine.audio import BLOCK, MAX_SAMPLE_RATE, MIN_SAMPLE_RATE, require_length, resample

LOSSLESS = {"aiff", "au", "caf", "w64", "flac", "avr", "epaf", "iff", "ircam", "pvf"}  # declare samples
LOSSY = {"mov", "matroska", "asf", "avi"}  # declare a time, to which codecs round and pad
JOINED = {"mp3", "aac", "amr"}  # files without a container: between two that were joined there are tags and headers
LOST = 4  # packets in a row that may be such tags and headers
SEEKABLE = {"mov", "matroska", "ogg"}  # each packet has its time, so that a part of the file can be found
SLACK = 0.15  # seconds
LEAD = 0.5  # seconds decoded before a part, so that the decoder has settled
OGG_PAGE = 65_307  # bytes of the largest page there can be
SOUND = (
    "3ga aac ac3 adts aif aifc aiff alac amr ape au avr awb caf dts eac3 flac gsm htk ircam m4a m4b m4p mat mka mp1 mp2"
    " mp3 mpc nist oga ogg opus paf pvf qcp ra rf64 sd2 sds snd sph spx svx tta voc w64 wav wave weba wma wv wve xi"
)
FILM = "3g2 3gp asf avi f4v flv m2ts m4v mkv mov mp4 mpeg mpg mts ogm ogv rm ts vob webm wmv"
SUFFIXES = {f".{name}" for name in f"{SOUND} {FILM}".split()}  # of files that are sound or film
Frames = Iterator[tuple[av.AudioFrame, float]]  # each with its time in the track, in seconds


def decode(path: str, start: float = 0.0, end: float | None = None) -> tuple[np.ndarray, int]:
    """The first audio track between two times in seconds: mono (S,) float32 at its own rate, and that rate in Hz.

    Only the part itself is decoded where the format has times to seek by. A track that changes its rate is resampled to
    its first. Raises ValueError, without the path, for what is no sound, encrypted, empty, cut or damaged.
    """
    try:
        # An open file and no protocols: a playlist cannot make FFmpeg read other files or the network.
        with open(path, "rb") as file, av.open(file, options={"protocol_whitelist": ""}) as container:
            kind, stream = container.format.name.partition(",")[0], first_track(container, path)
            begin = float((stream.start_time or 0) * (stream.time_base or 0))
            if sought := start > 2 * LEAD and kind in SEEKABLE:
                container.seek(int((start - LEAD + begin) / stream.time_base), stream=stream)
            packets = container.demux(stream)
            packet = next(packets)
            declared = declared_seconds(container, stream, kind, packet.pos or 0)  # before decoding, which changes it
            found = frames(chain([packet], packets), kind, begin, end, sought)
            waveform, rate, offset = collect(found)
            waveform = without_padding(waveform, stream)
            if end is None:
                require_whole(file, kind, (offset + len(waveform) + 0.5) / rate, declared)
    except (av.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it cannot be decoded"
        raise ValueError(f"not audio that can be read ({reason}); convert it to WAV or FLAC") from None
    last = None if end is None else max(0, round(end * rate) - offset)
    return waveform[max(0, round(start * rate) - offset) : last], rate


def first_track(container: InputContainer, path: str) -> av.AudioStream:
    """The first audio track; others beside it, and films, are mentioned on stderr."""
    if not container.streams.audio:
        found = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise ValueError(f"has no audio track, found {found}; leave it out")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise ValueError("its audio has a codec that FFmpeg does not know; convert it to WAV or FLAC")
    if (tag := stream.codec_context.codec_tag) in ("enca", "drms"):
        raise ValueError(f"is encrypted ({tag}); export it without copy protection")
    picture = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    if any(not video.disposition & picture for video in container.streams.video):
        say_once("note: some files are films; their first audio track is read")
    if len(container.streams.audio) > 1:
        say_once(f"note: {path}: has {len(container.streams.audio)} audio tracks; the first is read")
    return stream


def frames(packets: Iterator[av.Packet], kind: str, begin: float, end: float | None, sought: bool) -> Frames:
    """Decoded frames in order."""
    at, failed, last = 0.0, 0, None
    try:
        for packet in packets:
            if packet.is_corrupt and kind != "wav":  # which sets it at the end of a pipe; its length is known before
                raise av.InvalidDataError(0, "a packet is cut")
            try:
                decoded = packet.decode()
            except av.InvalidDataError:
                failed += 1
                if kind not in JOINED or failed > LOST:
                    raise
                continue
            for frame in decoded:
                if frame.is_corrupt:
                    raise av.InvalidDataError(0, "a frame is cut")
                failed, last = 0, packet
                if kind in SEEKABLE and frame.time is not None:
                    ahead = frame.time - begin - at
                    if sought:
                        at, sought = max(0.0, ahead), False
                    elif kind == "ogg" and ahead > SLACK:
                        raise av.InvalidDataError(0, f"{ahead:.2f} s are missing")
                    elif kind == "ogg" and ahead < -SLACK:  # another stream begins
                        begin = frame.time - at
                yield frame, at
                at += frame.samples / frame.sample_rate
                if end is not None and at >= end:
                    return
        if failed or (kind == "mp3" and last and is_cut(last)):
            raise av.InvalidDataError(0, "the last packet is cut")
    except av.FFmpegError as error:
        if not at:
            raise
        found = f"truncated or damaged after {at:.2f} s ({error.strerror})"
        raise ValueError(f"{found}; copy or convert it again") from None


def is_cut(packet: av.Packet) -> bool:
    """Whether a packet of MP3 has fewer bytes than its header says: FFmpeg decodes it all the same."""
    header, alone = bytes(packet)[:4], av.CodecContext.create("mp3", "r")
    alone.bit_rate = 0  # unknown, so that the decoder sets it
    alone.decode(packet)
    size = packet.duration * packet.time_base * (alone.bit_rate or 0) // 8 + (header[2] >> 1 & 1)
    return header[1] >> 1 & 3 == 1 and packet.size < size  # layer III alone


def collect(found: Frames) -> tuple[np.ndarray, int, int]:
    """All frames as one channel (S,) at the rate of the first; that rate; and the sample at which the first begins.

    FFmpeg's queue joins the frames, as NumPy takes longer for one than FFmpeg to decode it.
    """
    stretches, rate, offset = [], 0, 0
    kinds = groupby(found, lambda each: (each[0].sample_rate, each[0].format.name, each[0].layout.name))
    for (own, *_), stretch in kinds:
        if not MIN_SAMPLE_RATE <= own <= MAX_SAMPLE_RATE:
            raise ValueError(f"declares a sample rate of {own} Hz; convert it again")
        queue, blocks = av.AudioFifo(), [np.empty(0, np.float32)]
        for frame, at in stretch:
            if not rate:
                rate, offset = own, round(at * own)
            frame.pts = None  # else the queue compares the times
            queue.write(frame)
            if queue.samples >= BLOCK:
                blocks.append(mono(queue.read()))
                require_length(sum(map(len, stretches + blocks)), min(own, rate))
        if queue.samples:
            blocks.append(mono(queue.read()))
        stretches.append(resample(np.concatenate(blocks), own, rate).numpy())
    if not stretches:
        raise ValueError("holds no sound; leave it out")
    return np.concatenate(stretches), rate, offset


def without_padding(waveform: np.ndarray, stream: av.AudioStream) -> np.ndarray:
    """Without the end of the last block of a Vorbis stream, which FFmpeg leaves in where the file has one page."""
    surplus = len(waveform) - (stream.duration or 0)
    return waveform[: stream.duration] if stream.codec_context.name == "vorbis" and 0 < surplus < 8192 else waveform


def mono(frame: av.AudioFrame) -> np.ndarray:
    """The mean of a frame's channels, (S,) float32 in -1..1; of eight planes or more PyAV cannot make an array."""
    (packed,) = av.AudioResampler("flt").resample(frame)
    samples, channels = packed.to_ndarray()[0], frame.layout.nb_channels  # (S * channels,), in turns
    return sum(samples[channel::channels] for channel in range(channels)) / channels


def declared_seconds(container: InputContainer, stream: av.AudioStream, kind: str, first_byte: int) -> float:
    """The length that the file declares; 0 where it does not, or where FFmpeg's is an estimate."""
    declared = float(stream.duration * stream.time_base) if stream.duration else 0.0
    if kind in LOSSY or kind in LOSSLESS:
        alone = kind == "matroska" and len(container.streams) == 1
        return container.duration / av.time_base if alone and container.duration else declared
    if kind == "mp3":  # a Xing header, unless it is what follows from the number of bytes and the bit rate
        estimate = 8 * (container.size - first_byte) / (stream.codec_context.bit_rate or 1)
        return declared if abs(declared - estimate) > SLACK + 0.005 * declared else 0.0
    return 0.0


def require_whole(file: BinaryIO, kind: str, seconds: float, declared: float) -> None:
    """Raise ValueError for what was cut: less sound than declared, or a part of the file that FFmpeg leaves out."""
    if seconds < declared - (0 if kind in LOSSLESS else SLACK):
        raise ValueError(f"truncated: {seconds:.2f} of {declared:.2f} s; copy it again")
    size = file.seek(0, 2)
    if kind == "ogg":
        file.seek(max(0, size - OGG_PAGE))
        tail = file.read()
        page = tail[max(0, tail.rfind(b"OggS")) :]
        if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            raise ValueError("truncated: its last Ogg page is cut; copy it again")
    if kind == "avi":
        file.seek(4)
        if size < (declared_size := int.from_bytes(file.read(4), "little")):
            raise ValueError(f"truncated: {size:,} of {declared_size:,} bytes; copy it again")
