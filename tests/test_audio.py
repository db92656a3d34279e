"""What phones, browsers, messengers and recorders write is read whole, or refused for the true reason.

Every file is made here, by PyAV or soundfile, from a sound of which the right length is known.
"""

import csv
import io
import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import yaml
from conftest import tiny_settings

import data
import train

RATE = 16_000
BIT_RATES = {"wmav2": 192_000, "mp2": 192_000, "libopencore_amrnb": 12_200}


def voice(rate: int = RATE, seconds: float = 4.0, seed: int = 0) -> np.ndarray:
    """Half harmonic, half noise, with pauses, so that a variable bit rate varies."""
    t, rng = np.arange(int(rate * seconds)) / rate, np.random.default_rng(seed)
    loud = (np.sin(2 * np.pi * 0.4 * t + seed) > 0) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * t))
    tone = sum(np.sin(2 * np.pi * 120 * k * t + k) / k for k in range(1, 12))
    return ((0.1 * tone + 0.02 * rng.standard_normal(len(t))) * loud).astype(np.float32)


LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


def add_track(container, codec: str, rate: int, channels: int = 1, **options: str):
    stream = container.add_stream(codec, rate=rate, options={"strict": "experimental", **options})
    stream.codec_context.layout = LAYOUTS[channels]
    if codec in BIT_RATES:
        stream.codec_context.bit_rate = BIT_RATES[codec]
    stream.codec_context.open()
    return stream


def write_sound(container, stream, sound: np.ndarray, rate: int, channels: int = 1) -> None:
    """This sound in every channel."""
    layout = LAYOUTS[channels]
    frame = av.AudioFrame.from_ndarray(np.repeat(sound, channels)[None], "flt", layout)
    frame.sample_rate, frame.pts = rate, 0
    resampler, fifo = av.AudioResampler(stream.codec_context.format, layout, rate), av.AudioFifo()
    for part in [*resampler.resample(frame), *resampler.resample(None)]:
        fifo.write(part)
    size = stream.codec_context.frame_size or 1024
    while part := fifo.read(size) or fifo.read(0, partial=True):
        container.mux(stream.encode(part))
    container.mux(stream.encode(None))


def encode(path: Path, codec: str, sound: np.ndarray, rate: int, channels: int = 1, mux=None, **options: str) -> bytes:
    with av.open(str(path), "w", options=mux or {}) as container:
        write_sound(container, add_track(container, codec, rate, channels, **options), sound, rate, channels)
    return path.read_bytes()


def by_soundfile(sound: np.ndarray, rate: int, kind: str, subtype: str, **more) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 1, format=kind, subtype=subtype, **more) as out:
        out.write(sound)
    return file.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def assert_reads(path: Path, sound: np.ndarray, rate: int, slack: float = 0.1, likeness: float = 0.9) -> None:
    """The whole sound is there, in its place: as long within `slack` seconds, and alike where codecs may delay."""
    waveform = data.read_audio(path).numpy()
    expected = data.resample(sound, rate).numpy()
    assert abs(len(waveform) - len(expected)) <= slack * RATE, (len(waveform), len(expected))
    count = min(len(waveform), len(expected))
    spectrum = np.fft.rfft(waveform[:count], 2 * count) * np.fft.rfft(expected[:count], 2 * count).conj()
    correlation = np.fft.irfft(spectrum) / np.linalg.norm(waveform[:count]) / np.linalg.norm(expected[:count])
    delay = int(np.argmax(correlation))
    assert correlation[delay] > likeness, correlation[delay]
    assert min(delay, 2 * count - delay) < 0.12 * RATE, delay
    (seconds,) = data.check_audio([data.Utterance(str(path), "train", "s", {})])
    assert abs(seconds - len(waveform) / RATE) < 1e-3


# ---------------------------------------------------------------- formats


FORMATS = [  # suffix, codec, rate, channels, options of the container
    ("m4a", "aac", 44_100, 1, None),  # iPhone voice memos
    ("m4a", "aac", 16_000, 2, {"movflags": "faststart"}),
    ("m4a", "alac", 44_100, 2, None),
    ("mp4", "aac", 48_000, 2, {"movflags": "frag_keyframe+empty_moov"}),  # browsers on macOS write fragments
    ("aac", "aac", 44_100, 1, None),
    ("3gp", "libopencore_amrnb", 8000, 1, None),
    ("amr", "libopencore_amrnb", 8000, 1, None),
    ("webm", "libopus", 48_000, 1, None),
    ("webm", "libopus", 48_000, 1, {"live": "1"}),  # MediaRecorder: without a length
    ("mkv", "aac", 48_000, 6, None),
    ("mka", "aac", 48_000, 8, None),
    ("ogg", "libopus", 48_000, 1, None),
    ("ogg", "vorbis", 44_100, 2, None),
    ("wma", "wmav2", 44_100, 1, None),
    ("mp3", "libmp3lame", 44_100, 1, None),
    ("mp3", "libmp3lame", 22_050, 2, {"write_xing": "0"}),
    ("mp2", "mp2", 44_100, 1, None),
    ("ac3", "ac3", 48_000, 6, None),
    ("avi", "libmp3lame", 44_100, 1, None),
    ("mov", "pcm_s16le", 48_000, 2, None),
    ("caf", "pcm_s16le", 44_100, 1, None),
    ("aiff", "pcm_s16be", 44_100, 1, None),
    ("au", "pcm_mulaw", 8000, 1, None),
    ("w64", "pcm_s24le", 48_000, 1, None),
    ("wav", "adpcm_ms", 16_000, 1, None),
    ("mka", "flac", 16_000, 1, None),
]


@pytest.mark.parametrize(("suffix", "codec", "rate", "channels", "mux"), FORMATS)
def test_recordings_of_every_format_are_read_whole(tmp_path, suffix, codec, rate, channels, mux):
    """All of the sound, at its own rate, with the channels averaged."""
    sound = voice(rate)
    path = tmp_path / f"a.{suffix}"
    encode(path, codec, sound, rate, channels, mux)
    assert_reads(path, sound, rate, slack=0.13, likeness=0.4 if "amr" in codec else 0.9)


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_wav_and_flac_from_a_pipe_are_equal_to_the_sample(tmp_path, size):
    """Their headers do not tell the length; PyAV gives the bits that soundfile gives for a whole file."""
    sound = voice()
    wav, flac = (bytearray(by_soundfile(sound, RATE, kind, "PCM_16")) for kind in ("WAV", "FLAC"))
    expected = {
        name: data.read_audio(put(tmp_path / name, content)) for name, content in (("a.wav", wav), ("a.flac", flac))
    }
    wav[4:8], wav[40:44] = struct.pack("<I", 0xFFFFFFFF), struct.pack("<I", size)
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    for name, content in (("a.wav", wav), ("a.flac", flac)):
        assert data.read_audio(put(tmp_path / name, content)).equal(expected[name])


# ---------------------------------------------------------------- lengths that are estimates, joined streams


def first_mp3_frame(content: bytes) -> int:
    """Bytes of the first MPEG layer III frame, the one that holds the Xing or Info header."""
    version, index = (content[1] >> 3) & 3, content[2] >> 4
    one = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    kbit = one if version == 3 else [0, *range(8, 65, 8), *range(80, 161, 16)]
    rate = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000)}[version][(content[2] >> 2) & 3]
    return (144 if version == 3 else 72) * kbit[index] * 1000 // rate + ((content[2] >> 1) & 1)


ID3 = b"ID3\x03\0\0" + bytes([0, 0, 0x40, 0]) + b"APIC" + bytes(0x2000 - 4)
ID3_OLD = b"TAG" + b"x" * 125
APE_ENDS = [b"APETAGEX" + struct.pack("<IIII", 2000, 132, 0, kind << 28) + bytes(8) for kind in (10, 8)]
APE = APE_ENDS[0] + bytes(100) + APE_ENDS[1]


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE", "AVERAGE"])
@pytest.mark.parametrize("header", [True, False])
def test_mp3_of_any_kind_is_read_whole(tmp_path, rate, mode, header):
    """With and without a Xing header, and with tags before and behind, whose bytes are no sound."""
    sound = voice(rate, 12.0)
    mp3 = by_soundfile(sound, rate, "MP3", "MPEG_LAYER_III", bitrate_mode=mode, compression_level=0.5)
    mp3 = mp3 if header else mp3[first_mp3_frame(mp3) :]
    for name, content in (("bare", mp3), ("tags", ID3 + mp3 + ID3_OLD), ("ape", mp3 + APE)):
        assert_reads(put(tmp_path / f"{name}.mp3", content), sound, rate)


def opus(sound: np.ndarray, rate: int = RATE) -> bytes:
    return by_soundfile(sound, rate, "OGG", "OPUS")


def vorbis(sound: np.ndarray, rate: int = RATE) -> bytes:
    return by_soundfile(sound, rate, "OGG", "VORBIS")


def mp3(sound: np.ndarray, rate: int = RATE) -> bytes:
    return by_soundfile(sound, rate, "MP3", "MPEG_LAYER_III")


def assert_joined(path: Path, *sounds: np.ndarray) -> None:
    """One sound after the other; codecs add a few blocks at each joint."""
    waveform, at = data.read_audio(path).numpy(), 0
    assert abs(len(waveform) - sum(map(len, sounds))) < 0.1 * RATE * len(sounds)
    for number, sound in enumerate(sounds):
        part = waveform[at : at + len(sound) + int(0.1 * RATE * (number + 1))]
        correlation = np.correlate(part, sound[: len(sound) // 2], "valid") if len(part) < 3e5 else np.array([0.0])
        delay = int(np.argmax(correlation))
        heard = part[delay : delay + len(sound) // 2]
        assert np.corrcoef(heard, sound[: len(heard)])[0, 1] > 0.9, number
        assert delay < 0.1 * RATE * (number + 1), number
        at += len(sound)


@pytest.mark.parametrize("make", [opus, vorbis, mp3])
@pytest.mark.parametrize("count", [2, 3])
def test_joined_files_are_read_to_the_end(tmp_path, make, count):
    """Streams one behind the other, of other lengths: Ogg chains, and MP3 whose header covers the first alone."""
    sounds = [voice(seconds=5 - number, seed=number) for number in range(count)]
    assert_joined(put(tmp_path / "joined", b"".join(map(make, sounds))), *sounds)


def test_a_rate_that_changes_in_mid_file(tmp_path):
    """The second half at another rate keeps its speed and pitch."""
    first, second = voice(44_100, 5), voice(16_000, 3, seed=2)
    path = put(tmp_path / "a.mp3", ID3 + mp3(first, 44_100) + ID3_OLD + ID3 + mp3(second, 16_000))
    assert_joined(path, data.resample(first, 44_100).numpy(), second)


def test_channels_that_change_in_mid_file(tmp_path):
    """Mono, then stereo: each frame's own channels are averaged."""
    first, second = voice(seconds=3), voice(seconds=2, seed=2)
    parts = [encode(tmp_path / f"{n}.mp3", "libmp3lame", sound, RATE, n) for n, sound in ((1, first), (2, second))]
    assert_joined(put(tmp_path / "a.mp3", b"".join(parts)), first, second)


def ogg_checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 if value & 1 << 31 else value << 1) & 0xFFFFFFFF
    return value


@pytest.mark.parametrize("make", [opus, vorbis])
def test_ogg_without_an_end_mark_is_whole(tmp_path, make):
    """Android's writer does not mark the last page; the page's checksum is right."""
    sound = voice()
    content = bytearray(make(sound))
    last = content.rfind(b"OggS")
    content[last + 5] &= ~4
    content[last + 22 : last + 26] = bytes(4)
    content[last + 22 : last + 26] = struct.pack("<I", ogg_checksum(content[last:]))
    assert_reads(put(tmp_path / "a.ogg", content), sound, RATE)


def test_an_ogg_page_that_is_damaged_is_an_error(tmp_path):
    """FFmpeg drops a page whose checksum is wrong; the sound would be shorter without a word."""
    content = bytearray(opus(voice(seconds=8)))
    pages = [at for at in range(len(content)) if content[at : at + 4] == b"OggS"]
    content[pages[len(pages) // 2] + 300] ^= 0xFF
    with pytest.raises(ValueError, match=r"truncated or damaged after \d\.\d\d s \(\d\.\d\d s are missing\)"):
        data.read_audio(put(tmp_path / "a.opus", content))


# ---------------------------------------------------------------- films, tracks, and what is no sound


def test_the_first_audio_track_of_a_film_is_read_and_said(tmp_path, capsys):
    """A film is named as such once, and a second audio track with its file."""
    data.say_once.cache_clear()
    sound, other = voice(48_000), voice(48_000, seed=3)
    for name in ("a.mp4", "b.mkv"):
        with av.open(str(tmp_path / name), "w") as container:
            video = container.add_stream("mpeg4", rate=10)
            video.codec_context.time_base = Fraction(1, 10)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            tracks = [add_track(container, "aac", 48_000) for _ in range(2)]
            for number in range(60):  # six seconds: longer than the sound
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8))
                frame.pts, frame.time_base = number, Fraction(1, 10)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
            for track, each in zip(tracks, (sound, other), strict=True):
                write_sound(container, track, each, 48_000)
        assert_reads(tmp_path / name, sound, 48_000)
    said = capsys.readouterr().err.splitlines()
    assert said.count("note: some files are films; their first audio track is read") == 1
    assert [line for line in said if "2 audio tracks; the first is read" in line and "a.mp4" in line]


def test_a_cover_is_no_film(tmp_path, capsys):
    """The picture of an album is no moving picture."""
    data.say_once.cache_clear()
    encode(tmp_path / "a.mp3", "libmp3lame", voice(44_100), 44_100)
    encode(tmp_path / "b.m4a", "aac", voice(44_100), 44_100)
    data.read_audio(tmp_path / "b.m4a")
    assert "film" not in capsys.readouterr().err


def test_encrypted_empty_and_silent_containers_are_refused_for_the_true_reason(tmp_path):
    """Not as damaged files."""
    content = encode(tmp_path / "a.m4a", "aac", voice(), RATE)
    with pytest.raises(ValueError, match=r"is encrypted \(enca\); export it without"):
        data.read_audio(put(tmp_path / "drm.m4a", content.replace(b"mp4a", b"enca")))
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        container.mux(video.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(video.encode(None))
    with pytest.raises(ValueError, match=r"film\.mp4: has no audio track, found video; leave it out"):
        data.read_audio(tmp_path / "film.mp4")
    content = encode(tmp_path / "b.mp4", "aac", voice(), RATE, 1, {"movflags": "frag_keyframe+empty_moov"})
    with pytest.raises(ValueError, match=r"none\.m4a: holds no sound; leave it out"):
        data.read_audio(put(tmp_path / "none.m4a", content[: content.index(b"moof") - 4]))


def test_a_playlist_opens_no_other_file(tmp_path):
    """FFmpeg would read what a playlist names, from the disk or the network."""
    encode(tmp_path / "secret.m4a", "aac", voice(), RATE)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{tmp_path / 'secret.m4a'}\n#EXT-X-ENDLIST\n"
    put(tmp_path / "a.m3u8", playlist.encode())
    put(tmp_path / "b.wav", f"ffconcat version 1.0\nfile {tmp_path / 'secret.m4a'}\n".encode())
    for name in ("a.m3u8", "b.wav"):
        with pytest.raises(ValueError, match=name):
            data.read_audio(tmp_path / name)


CUTS = [(suffix, codec, rate, mux) for suffix, codec, rate, channels, mux in FORMATS if channels == 1]


@pytest.mark.parametrize(("suffix", "codec", "rate", "mux"), CUTS)
def test_a_file_that_was_cut_is_an_error(tmp_path, suffix, codec, rate, mux):
    """Where the container declares a length, or the cut is inside a packet. Else the rest cannot be known."""
    path = tmp_path / f"a.{suffix}"
    content = encode(path, codec, voice(rate, 8.0), rate, 1, mux)
    if suffix in ("mp2", "ac3", "aac", "amr") or mux in ({"live": "1"}, {"write_xing": "0"}):
        pytest.skip("a stream without a declared length; see the next test")
    put(path, content[: int(len(content) * 0.6)])
    with pytest.raises(ValueError, match=rf"a\.{suffix}: (truncated|not audio|.* is cut|holds no sound)"):
        data.read_audio(path)
    with pytest.raises(ValueError, match=r"bad audio files \(1\)"):
        data.check_audio([data.Utterance(str(path), "train", "s", {})])


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"), [("aac", "aac", 44_100), ("amr", "libopencore_amrnb", 8000), ("ac3", "ac3", 48_000)]
)
def test_a_stream_that_stops_inside_a_packet_says_where(tmp_path, suffix, codec, rate):
    """Without a container there is no length, but half a packet shows."""
    path = tmp_path / f"a.{suffix}"
    content = encode(path, codec, voice(rate, 8.0), rate)
    put(path, content[:-5])
    with pytest.raises(ValueError, match=r"truncated or damaged after [78]\.\d\d s \(.*\); copy"):
        data.read_audio(path)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("header", [True, False])
def test_an_mp3_that_stops_inside_a_frame_is_an_error(tmp_path, rate, mode, header):
    """FFmpeg decodes the rest of a frame as a whole one; the bytes are fewer than its header says."""
    mp3 = by_soundfile(voice(rate), rate, "MP3", "MPEG_LAYER_III", bitrate_mode=mode, compression_level=0.5)
    mp3 = mp3 if header else mp3[first_mp3_frame(mp3) :]
    for lost in (1, 20, 40):
        with pytest.raises(ValueError, match=r"truncated or damaged after [34]\.\d\d s \(the last packet is cut\)"):
            data.read_audio(put(tmp_path / "a.mp3", mp3[:-lost]))


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_16"), ("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("FLAC", "PCM_16")]
)
def test_a_file_joined_to_another_is_refused_where_only_the_first_would_be_read(tmp_path, kind, subtype):
    """WAV, AIFF and FLAC have one length, so two of them are no file; with a part of the first nothing is wrong."""
    one, other = (by_soundfile(voice(seed=seed), RATE, kind, subtype) for seed in (0, 1))
    path = put(tmp_path / f"a.{kind.lower()}", one + other)
    with pytest.raises(ValueError, match=f"a second {kind} file is joined to its end; split them"):
        data.read_audio(path)
    whole = data.read_audio(put(tmp_path / "b", one))
    if kind == "FLAC":  # it is not searched for the sake of each of its parts
        assert data.read_audio(f"{path}#t=1,2").equal(whole[RATE : 2 * RATE])


def test_frames_are_joined_in_blocks(tmp_path, monkeypatch):
    """Hours are not kept twice: the queue is emptied as it fills, and nothing is lost between two blocks."""
    from formats import media

    encode(tmp_path / "a.ogg", "vorbis", voice(), RATE, 2)
    whole = data.read_audio(tmp_path / "a.ogg")
    monkeypatch.setattr(media, "BLOCK", 5000)
    assert data.read_audio(tmp_path / "a.ogg").equal(whole)


# ---------------------------------------------------------------- parts of files


@pytest.mark.parametrize(
    ("suffix", "codec", "rate", "tolerance"),
    [
        ("wav", "pcm_s16le", 16_000, 0.0),
        ("flac", "flac", 16_000, 0.0),
        ("mp3", "libmp3lame", 16_000, 0.0),
        ("m4a", "aac", 16_000, 1e-4),
        ("mkv", "aac", 16_000, 1e-4),
        ("ogg", "vorbis", 16_000, 1e-4),
        ("aac", "aac", 16_000, 0.0),
    ],
)
def test_a_part_of_a_file_is_that_part_of_its_samples(tmp_path, suffix, codec, rate, tolerance):
    """At the beginning, in the middle, up to the end; at 16 kHz there is no filter to blur the borders."""
    path = tmp_path / f"a.{suffix}"
    encode(path, codec, voice(rate, 12.0), rate, 2 if codec == "vorbis" else 1)
    whole = data.read_audio(path)
    for start, end in ((0.0, 1.5), (5.25, 7.0), (9.001, None)):
        source = data.Utterance(str(path), "train", "s", {}, start, end).source
        part, expected = (
            data.read_audio(source),
            whole[round(start * rate) : None if end is None else round(end * rate)],
        )
        assert len(part) == len(expected)
        assert (part - expected).abs().max() <= tolerance
        assert data.check_audio([data.Utterance(str(path), "train", "s", {}, start, end)]) == [len(expected) / rate]


def test_a_part_is_found_without_decoding_what_is_before(tmp_path, monkeypatch):
    """Of ten minutes, four seconds are decoded, where the format has times."""
    from formats import media

    encode(tmp_path / "a.m4a", "aac", np.tile(voice(), 150), RATE)
    decoded, mono = [], media.mono
    monkeypatch.setattr(media, "mono", lambda frame: decoded.append(frame.samples) or mono(frame))
    data.read_audio(f"{tmp_path / 'a.m4a'}#t=500,503")
    assert 3 * RATE <= sum(decoded) < 5 * RATE


def test_a_part_beyond_the_file_is_an_error(tmp_path):
    soundfile.write(tmp_path / "a.wav", voice(), RATE)
    encode(tmp_path / "b.mp3", "libmp3lame", voice(44_100), 44_100)
    for name in ("a.wav", "b.mp3"):
        with pytest.raises(
            ValueError, match=rf"{name}#t=3,4\.5: its part 3 to 4\.5 s ends after the file; correct `end`"
        ):
            data.read_audio(f"{tmp_path / name}#t=3,4.5")
    with pytest.raises(ValueError, match="too short: 160 samples"):
        data.read_audio(f"{tmp_path / 'a.wav'}#t=3,3.01")


def test_a_file_may_be_named_like_a_part(tmp_path):
    """The file that is there comes first."""
    soundfile.write(tmp_path / "a.wav#t=1,2", voice(seconds=3), RATE, format="WAV")
    assert len(data.read_audio(tmp_path / "a.wav#t=1,2")) == 3 * RATE


def test_a_file_name_that_is_not_utf_8(tmp_path):
    """Bytes of an old disk reach the decoders as they are."""
    for suffix, write in (
        ("wav", lambda p: soundfile.write(p, voice(), RATE)),
        ("m4a", lambda p: encode(p, "aac", voice(), RATE)),
    ):
        path = tmp_path / f"M\udcfcller.{suffix}"
        write(tmp_path / f"x.{suffix}")
        try:
            (tmp_path / f"x.{suffix}").rename(path)
        except OSError:
            pytest.skip("this file system wants UTF-8")
        assert abs(len(data.read_audio(path)) - 4 * RATE) < 2000


@pytest.mark.parametrize("cache", [False, True])
def test_a_run_on_parts_of_files(tmp_path, tiny_checkpoint, monkeypatch, cache):
    """They train and test as the same sounds cut into files do; each has its own entry; predictions have the times."""
    rng, rows, cut_rows = np.random.default_rng(0), [], []
    for split in data.SPLITS:
        sound = voice(seconds=4, seed=len(rows)) + 0.01 * rng.standard_normal(4 * RATE).astype(np.float32)
        soundfile.write(tmp_path / f"{split}.wav", sound, RATE, "FLOAT")
        for n in range(4):
            soundfile.write(tmp_path / f"{split}{n}.wav", sound[n * RATE : (n + 1) * RATE], RATE, "FLOAT")
            rows.append(f"{split}.wav,{split},{split},{n},{n + 1},{1 + n},{7 - n}")
            cut_rows.append(f"{split}{n}.wav,{split},{split},,,{1 + n},{7 - n}")
    for path in tmp_path.glob("*.wav"):
        os.utime(path, (1e9, 1e9))  # in 2001: opening a cache waits where a file has only just changed
    results = {}
    for name, listed in (("parts", rows), ("files", cut_rows)):
        manifest = tmp_path / f"{name}.csv"
        manifest.write_text("\n".join(["path,split,speaker,start,end,activation,valence", *listed]), encoding="utf-8")
        keys = tiny_settings(tmp_path, tiny_checkpoint, manifest, name=name, epochs=1, trainable_layers=1, cache=cache)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "c.yaml")])
        train.main()
        with open(tmp_path / "runs" / name / "predictions_test.csv", newline="", encoding="utf-8") as file:
            results[name] = list(csv.DictReader(file))
    for n, (part, file) in enumerate(zip(*results.values(), strict=True)):
        assert float(part["activation"]) == pytest.approx(float(file["activation"]), abs=2e-3)
        assert (part["start"], part["end"], Path(part["file"]).name) == (f"{n}.0", f"{n + 1}.0", "test.wav")
    assert list(results["files"][0]) == [
        "file",
        "speaker",
        "activation",
        "valence",
        "activation_label",
        "valence_label",
    ]


@pytest.mark.parametrize("constant", [0.0, 0.25])
def test_silence_a_constant_and_channels_that_cancel_are_named(tmp_path, capsys, constant):
    """They are read, and named once."""
    data.say_once.cache_clear()
    sound = voice()
    stereo = np.stack([sound, -sound], axis=1) if constant == 0 else np.full((RATE, 2), constant)
    soundfile.write(tmp_path / "a.wav", stereo, RATE, "FLOAT")
    assert len(data.read_audio(tmp_path / "a.wav")) == len(data.read_audio(tmp_path / "a.wav")) == len(stereo)
    expected = "silent: every sample is 0.25" if constant else "silent, or its channels cancel: no sample is above 0 of"
    assert capsys.readouterr().err.count(f"a.wav: {expected}") == 1
    named: list[str] = []
    data.read_audio(tmp_path / "a.wav", named)
    assert len(named) == 1 and capsys.readouterr().err == ""
