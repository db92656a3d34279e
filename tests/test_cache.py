"""What `cache` promises: what is read is what was computed, whatever happened to the disk or the process in between."""

import base64
import errno
import itertools
import json
import os
import re
import shutil
import sys
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_old_wav
from processes import python, start
from random_weights import random_backbone

import cache as cache_module
import data
import freeze
import lora
import run
from cache import ActivationCache, Prefix, make_line
from machine import audio, hardware
from machine.gpu import OnGPU
from model import EmotionModel, Wav2Vec2Config
from tools.caches import verify

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
WIDTH = 8
IDENTITY = {"backbone": "abc", "depth": 2}
OLD = 10**18  # ns, in 2001: a time of change that no cache waits for


def make(*paths: str, content: bytes = b"sound") -> None:
    for path in paths:
        Path(path).write_bytes(content)
        os.utime(path, ns=(OLD, OLD))


def touch(folder: Path, count: int) -> list[str]:
    paths = [str(folder / f"{number}.wav") for number in range(count)]
    make(*paths)
    return paths


def activation(number: int) -> torch.Tensor:
    """`(T, WIDTH)` of random numbers, different in content and length for each utterance."""
    return torch.randn(3 + number % 4, WIDTH, generator=torch.Generator().manual_seed(number))


def open_cache(folder: Path, paths: list[str], dtype: torch.dtype = torch.float32, **identity) -> ActivationCache:
    return ActivationCache(folder / "cache", IDENTITY | identity, paths, WIDTH, dtype)


def write(cache: ActivationCache, *numbers: int) -> torch.Tensor:
    parts = [activation(number) for number in numbers]
    return cache.write(numbers, torch.cat(parts), [len(part) for part in parts])


def filled(folder: Path, count: int, dtype: torch.dtype = torch.float32) -> tuple[list[str], Path]:
    """A cache of `count` utterances, written and closed."""
    paths = touch(folder, count)
    cache = open_cache(folder, paths, dtype)
    write(cache, *range(count))
    cache.close()
    return paths, cache.directory


def check(cache: ActivationCache, *numbers: int) -> None:
    """These utterances are there, with exactly their own values."""
    assert cache.has(numbers)
    packed, lengths = cache.read(numbers)
    assert lengths == [len(activation(number)) for number in numbers]
    assert torch.equal(packed, torch.cat([activation(number) for number in numbers]).to(cache.dtype))


# ---------------------------------------------------------------- what is read is what was written


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reading_returns_what_writing_returned(tmp_path, dtype):
    """fp32 exactly what was computed, fp16 rounded once; by the same object and by a new one."""
    paths = touch(tmp_path, 5)
    cache = open_cache(tmp_path, paths, dtype)
    computed = torch.cat([activation(number) for number in range(5)])
    returned = write(cache, *range(5))
    assert torch.equal(returned, computed.to(dtype))
    assert torch.equal(cache.read(range(5))[0], returned)
    cache.close()
    again = open_cache(tmp_path, paths, dtype)
    packed, lengths = again.read(range(5))
    assert torch.equal(packed, returned)
    assert packed.dtype == dtype
    assert lengths == [len(activation(number)) for number in range(5)]


def test_an_utterance_is_the_same_alone_and_in_any_batch(tmp_path):
    """In any order, more than once, while the rest is not there, and in a batch of none."""
    paths = touch(tmp_path, 9)
    cache = open_cache(tmp_path, paths)
    write(cache, 7, 2)
    assert [cache.has([number]) for number in range(9)] == [number in (2, 7) for number in range(9)]
    assert not cache.has([2, 3])
    write(cache, 3, 2, 8)  # 2 is there already
    for numbers in ([2], [8, 2], [7, 3, 8, 2], [3, 3]):
        check(cache, *numbers)
    assert cache.has([])
    assert cache.read([])[0].shape == (0, WIDTH)
    assert sum(1 for _ in cache_module.read_index(cache.directory)) == 4


def test_the_same_corpus_in_another_order_finds_its_activations(tmp_path):
    """By path: numbers are only a position in this run's list. Unknown files are passed over."""
    paths, _ = filled(tmp_path, 6)
    subset = [paths[4], str(tmp_path / "new.wav"), paths[1]]
    make(subset[1])
    cache = open_cache(tmp_path, subset)
    assert [cache.has([number]) for number in range(3)] == [True, False, True]
    assert torch.equal(cache.read([2, 0])[0], torch.cat([activation(1), activation(4)]))


def test_a_file_that_the_corpus_names_twice_is_found_for_both(tmp_path):
    """Else such a cache would never be complete, and grow with every run."""
    paths, _ = filled(tmp_path, 2)
    cache = open_cache(tmp_path, [paths[0], paths[1], os.path.join(tmp_path, ".", "0.wav")])
    assert cache.has([0, 1, 2])
    assert torch.equal(cache.read([2])[0], activation(0))


def test_a_relative_path_and_an_absolute_one_are_the_same_file(tmp_path, monkeypatch):
    """A cache survives a change of the working directory."""
    paths, _ = filled(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    check(open_cache(tmp_path, ["0.wav", paths[1]]), 0, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file system takes no such name")
def test_any_name_of_an_audio_file_will_do(tmp_path):
    """Commas, quotes, and bytes that are not UTF-8."""
    paths = [os.fsdecode(os.fsencode(tmp_path) + name) for name in (b'/a,"b".wav', b"/\xff\xfe.wav", b"/ \xc3\xa9.wav")]
    make(*paths)
    cache = open_cache(tmp_path, paths)
    write(cache, 0, 1, 2)
    check(open_cache(tmp_path, paths), 0, 1, 2)


def test_reading_what_is_not_there_fails(tmp_path):
    """It is not an activation of no frames; nor does one of no frames, if ever written, count as being there."""
    cache = open_cache(tmp_path, touch(tmp_path, 2))
    cache.write([0], torch.empty(0, WIDTH), [0])
    for numbers in ([0], [1], [0, 1]):
        assert not cache.has(numbers)
        with pytest.raises(AssertionError, match="ask `has` first"):
            cache.read(numbers)


# ---------------------------------------------------------------- int8


def test_int8_is_off_by_half_a_step_at_most(tmp_path):
    """A 508th of the range of the utterance's own channel, however large it or a constant in it is, beside rounding."""
    paths = touch(tmp_path, 2)
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([1.0, 1e-3, 1e6, 1.0, 0.0, 0.0, 1e-44, 3e38])
    constant = torch.tensor([0.0, 0.0, 0.0, 1e4, 0.0, 1e4 / 3, 0.0, 0.0])
    first, second = (torch.rand(frames, WIDTH, generator=generator) * 2 - 1 for frames in (50, 7))
    computed = torch.cat([first * size + constant, second])
    cache = open_cache(tmp_path, paths, torch.int8)
    returned = cache.write([0, 1], computed, [50, 7])
    assert returned.dtype == torch.float32
    for part, stored in zip(computed.double().split([50, 7]), returned.double().split([50, 7]), strict=True):
        half_step = (part.amax(0) - part.amin(0)) / 508
        rounding = part.abs().amax(0) * 2**-22 + torch.finfo(torch.float32).tiny
        error = (stored - part).abs().amax(0)
        assert (error <= half_step + rounding).all()
        assert (error >= 0.8 * half_step - rounding).all()  # it is 8 bit that were stored
    assert torch.equal(returned[:50, 4:6], computed[:50, 4:6])  # what does not vary is exact
    for reader in (cache, open_cache(tmp_path, paths, torch.int8)):
        packed, lengths = reader.read([1, 0])
        assert torch.equal(packed, torch.cat([returned[50:], returned[:50]]))
        assert lengths == [7, 50]


def test_a_channel_that_varies_by_less_than_fp32_tells_stays_what_it_is(tmp_path):
    """Its middle is no number of fp32, so that a step too many would leave int8 and come back with the other sign."""
    part = torch.full((2, WIDTH), 1e6)
    part[1] = part[0].nextafter(torch.tensor(torch.inf))
    returned = open_cache(tmp_path, touch(tmp_path, 1), torch.int8).write([0], part, [2])
    assert ((returned - part).abs() <= part[1] - part[0]).all()


def test_int8_takes_a_byte_a_value_and_eight_a_channel(tmp_path):
    """Half of fp16; `space` counts the scales, and the index the frames alone."""
    _, directory = filled(tmp_path, 5, torch.int8)
    frames = [len(activation(number)) for number in range(5)]
    (shard,) = directory.glob("*.bin")
    assert shard.stat().st_size == sum(frames) * WIDTH + 5 * WIDTH * 8
    assert [row[3] for row in cache_module.read_index(directory)] == frames
    paths = touch(tmp_path, 2)
    cache = open_cache(tmp_path, paths, torch.int8, depth=3)
    assert cache.space(2.0) == 2 * (50 * WIDTH + WIDTH * 8) + index_bytes(paths)  # two of a second each


@pytest.mark.parametrize("byte", [1, 4 * WIDTH + 1, 8 * WIDTH + 1], ids=["a scale", "a middle", "a value"])
def test_a_flipped_bit_of_int8_is_refused_and_named(tmp_path, byte):
    """The scales are under the checksum too; a shard that ends within an entry has lost it."""
    paths, directory = filled(tmp_path, 3, torch.int8)
    (shard,) = directory.glob("*.bin")
    content = bytearray(shard.read_bytes())
    content[(8 + len(activation(0))) * WIDTH + byte] ^= 1
    shard.write_bytes(content[:-1])
    assert verify(directory) == [paths[1], paths[2]]
    cache = open_cache(tmp_path, paths, torch.int8)
    assert [cache.has([number]) for number in range(3)] == [True, True, False]
    with pytest.raises(ValueError, match=f"the activation of {paths[1]} is damaged"):
        cache.read([0, 1])


# ---------------------------------------------------------------- what must not be used


@pytest.mark.parametrize("change", ["size", "time", "gone"])
def test_the_activation_of_an_audio_file_that_has_changed_is_not_used(tmp_path, change):
    """Another size or another time of change is another sound; its new activation takes the place of the old."""
    paths, _ = filled(tmp_path, 3)
    if change == "size":
        state = os.stat(paths[1])
        Path(paths[1]).write_bytes(b"other sound")
        os.utime(paths[1], ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "time":
        os.utime(paths[1], ns=(1, 1))
    else:
        os.unlink(paths[1])
    cache = open_cache(tmp_path, paths)
    assert [cache.has([number]) for number in range(3)] == [True, False, True]
    if change != "gone":
        cache.write([1], activation(9), [len(activation(9))])
        assert torch.equal(open_cache(tmp_path, paths).read([1])[0], activation(9))


@pytest.mark.parametrize(
    "changed", [{"backbone": "abd"}, {"depth": 3}, {"precision": "bf16"}, {"dtype": torch.float16}, {"width": 4}]
)
def test_another_identity_is_another_directory(tmp_path, changed):
    """Other weights, depth, precision, type or width: nothing of the one is seen by the other."""
    paths, directory = filled(tmp_path, 2)
    dtype, width = changed.pop("dtype", torch.float32), changed.pop("width", WIDTH)
    other = ActivationCache(tmp_path / "cache", IDENTITY | changed, paths, width, dtype)
    assert other.directory != directory
    assert not other.has([0])
    check(open_cache(tmp_path, paths), 0, 1)


def test_the_directory_says_what_it_holds(tmp_path):
    """In JSON, for people; the order of its keys does not matter."""
    paths, directory = filled(tmp_path, 1)
    described = json.loads((directory / "cache.json").read_text())
    assert described == {"format": cache_module.FORMAT, **IDENTITY, "width": WIDTH, "dtype": "float32"}
    turned = dict(reversed(IDENTITY.items()))
    assert ActivationCache(tmp_path / "cache", turned, paths, WIDTH, torch.float32).directory == directory


def test_a_format_of_another_version_is_not_read(tmp_path, monkeypatch):
    """Raising FORMAT is all it takes to leave old numbers behind."""
    paths, _ = filled(tmp_path, 1)
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    assert not open_cache(tmp_path, paths).has([0])


@pytest.mark.parametrize("cut", [1, 2, 5, 40])
def test_a_torn_last_line_of_the_index_is_passed_over(tmp_path, cut):
    """What a killed process leaves: the utterance in hand is computed again, all others are there."""
    paths, directory = filled(tmp_path, 4)
    (index,) = directory.glob("*.index")
    whole = index.read_bytes()
    index.write_bytes(whole[:-cut])
    cache = open_cache(tmp_path, paths)
    check(cache, 0, 1, 2)
    assert not cache.has([3])
    write(cache, 3)
    check(open_cache(tmp_path, paths), 0, 1, 2, 3)
    assert verify(directory) == []


def test_lines_of_zeros_or_of_nothing_known_are_passed_over(tmp_path):
    """What a power failure may leave at the end of a file."""
    paths, directory = filled(tmp_path, 2)
    (index,) = directory.glob("*.index")
    lines = b"\0" * 100 + b"\n[1, 2]\n\xff\xfe\n" + make_line(([1], 2), directory.name)
    index.write_bytes(index.read_bytes() + lines)
    check(open_cache(tmp_path, paths), 0, 1)
    (directory / "0.index").write_bytes(b"12ab")  # killed within its first line
    (directory / "1.index").touch()
    check(open_cache(tmp_path, paths), 0, 1)


def test_what_lies_past_the_end_of_its_shard_is_computed_again(tmp_path):
    """A truncated or missing shard costs what it held; `verify` names it until then and not afterwards."""
    paths, directory = filled(tmp_path, 4)
    (shard,) = directory.glob("*.bin")
    os.truncate(shard, shard.stat().st_size - 1)
    assert verify(directory) == [paths[3]]
    cache = open_cache(tmp_path, paths)
    check(cache, 0, 1, 2)
    assert not cache.has([3])
    write(cache, 3)
    cache.close()
    assert verify(directory) == []
    shard.unlink()
    assert verify(directory) == paths[:3]
    cache = open_cache(tmp_path, paths)
    check(cache, 3)
    assert not any(cache.has([number]) for number in range(3))


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_flipped_bit_is_refused_when_first_read_and_named(tmp_path, number):
    """With the audio file's name and the way out; the others are still served, and `verify` names the same file."""
    paths, directory = filled(tmp_path, 5)
    (shard,) = directory.glob("*.bin")
    content = bytearray(shard.read_bytes())
    content[sum(activation(n).nbytes for n in range(number)) + 5] ^= 1
    shard.write_bytes(content)
    cache = open_cache(tmp_path, paths)
    for _ in range(2):  # the second time too
        with pytest.raises(
            ValueError, match=rf"{shard}: the activation of {paths[number]} is damaged; python .* again"
        ):
            cache.read(range(5))
    check(cache, *(other for other in range(5) if other != number))
    assert verify(directory) == [paths[number]]


def test_a_shard_cut_short_under_a_running_reader_is_refused(tmp_path):
    """Also for what has been read and checked before: memory that was never filled is no activation."""
    paths, directory = filled(tmp_path, 2)
    cache = open_cache(tmp_path, paths)
    check(cache, 0, 1)
    (shard,) = directory.glob("*.bin")
    os.truncate(shard, activation(0).nbytes + 4)
    check(cache, 0)
    with pytest.raises(ValueError, match=f"the activation of {paths[1]} is damaged"):
        cache.read([0, 1])


def test_a_flipped_bit_anywhere_is_found_and_never_read(tmp_path):
    """In every byte of shard, index and cache.json: `verify` tells of it, no activation is wrong, repair mends all.

    The files are alike in size and time, and their names in all but a bit.
    """
    count, part = 4, torch.arange(4.0)[:, None].expand(4, 4)
    paths = touch(tmp_path, count)
    for path in paths:
        os.utime(path, ns=(1, 1))
    cache = ActivationCache(tmp_path / "cache", IDENTITY, paths, 4, torch.float32)
    cache.write(range(count), part, [1] * count)
    cache.close()
    files = {path: path.read_bytes() for path in cache.directory.iterdir()}
    assert len(files) == 3
    for path, content in files.items():
        for place in range(len(content)):
            flipped = content[place] ^ 1 << place % 8
            path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
            if path.suffix == ".json":
                with pytest.raises(ValueError, match="does not describe a cache of this name"):
                    verify(cache.directory)
            else:
                assert verify(cache.directory)
            again = ActivationCache(tmp_path / "cache", IDENTITY, paths, 4, torch.float32)
            for number in filter(lambda number: again.has([number]), range(count)):
                with suppress(ValueError):
                    assert torch.equal(again.read([number])[0], part[number : number + 1])
            again.close()
            verify(cache.directory, repair=True)
            assert verify(cache.directory) == []
            again = ActivationCache(tmp_path / "cache", IDENTITY, paths, 4, torch.float32)
            again.write(range(count), part, [1] * count)
            assert torch.equal(again.read(range(count))[0], part)
            again.close()
            assert sum(1 for _ in cache_module.read_index(cache.directory)) == count
            assert verify(cache.directory) == []
            for left in set(cache.directory.iterdir()) - files.keys():
                left.unlink()
            for other in files:
                other.write_bytes(files[other])
    description = cache.directory / "cache.json"
    description.write_bytes(description.read_bytes().replace(b"\n", b" "))
    with pytest.raises(ValueError, match="does not describe a cache of this name"):
        verify(cache.directory)


def test_what_was_forgotten_for_its_damage_is_computed_anew_and_nothing_else(tmp_path):
    """Of two that computed the same the whole one stays; a torn last line, as a full disk leaves it, is no damage."""
    paths, directory = filled(tmp_path, 4)
    (shard,), (index,) = directory.glob("*.bin"), directory.glob("*.index")
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    entry = next(cache_module.read_index(directory))
    (directory / "z.bin").write_bytes(activation(0).numpy().tobytes())
    (directory / "z.index").write_bytes(make_line(entry._replace(shard="z.bin"), directory.name) + b"12ab")
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(lines[0] + lines[1].replace(b"1.wav", b"2.wav") + b"".join(lines[2:]))
    found = verify(directory)
    assert found == verify(directory, repair=True)
    assert found[0] == paths[0]
    assert found[1] == f"{index}, line 2: {lines[1].decode().strip().replace('1.wav', '2.wav')}"
    assert verify(directory) == []
    cache = open_cache(tmp_path, paths)
    check(cache, 0, 2, 3)
    assert not cache.has([1])


def test_an_index_of_another_cache_is_not_read(tmp_path):
    """A directory that was renamed or mixed up: the name goes into the checksum of each line."""
    paths, directory = filled(tmp_path, 2)
    other = open_cache(tmp_path, paths, depth=9)
    for path in directory.iterdir():
        shutil.copy(path, other.directory)
    assert not other.has([0])
    other = open_cache(tmp_path, paths, depth=9)
    assert not other.has([0])
    assert json.loads((other.directory / "cache.json").read_text())["depth"] == 9  # its own again
    moved = directory.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"moved.cache\.json: does not describe a cache of this name; a run that uses"):
        verify(moved)
    (other.directory / "cache.json").unlink()
    open_cache(tmp_path, paths, depth=9)
    assert (other.directory / "cache.json").is_file()


def test_a_file_that_is_replaced_while_it_is_computed_is_computed_again(tmp_path):
    """Its state is noted before it is read: what was heard may have been the old sound."""
    paths = touch(tmp_path, 2)
    cache = open_cache(tmp_path, paths)
    make(paths[0], content=b"another sound")
    write(cache, 0, 1)
    again = open_cache(tmp_path, paths)
    assert not again.has([0])
    check(again, 1)


def test_a_cache_that_is_deleted_under_a_run_is_one_clear_error(tmp_path):
    """Of the one that reads, and of the one that writes where it needs a new file."""
    paths, directory = filled(tmp_path, 2)
    reader, writer = open_cache(tmp_path, paths), open_cache(tmp_path, touch(tmp_path, 3))
    shutil.rmtree(directory)
    with pytest.raises(ValueError, match=rf"the activation of {paths[0]} cannot be read \(No such file or directory\)"):
        reader.read([0])
    with pytest.raises(OSError, match=rf"cache {directory}: No such file or directory; set cache_dir"):
        write(writer, 2)


def test_a_complete_cache_may_be_read_where_nothing_may_be_written(tmp_path, monkeypatch):
    """One that a group shares; what it lacks cannot be added."""
    paths, directory = filled(tmp_path, 3)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *a, **k: (refuse if "r" not in mode else real)(self, mode, *a, **k)
    )
    for name in ("write_text", "write_bytes", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(os, "replace", refuse)
    cache = open_cache(tmp_path, paths)
    hardware.require_space({directory: cache.space(3.0)})
    cache.note_user(tmp_path / "run", "x")
    check(cache, 0, 1, 2)
    assert verify(directory) == []
    os.utime(paths[0], ns=(1, 1))
    cache = open_cache(tmp_path, paths)
    with pytest.raises(OSError, match=rf"cache {directory}: Permission denied; "):
        write(cache, 0)
    with pytest.raises(OSError, match=r"cache\.json: cannot be written \(\[Errno 13\] Permission denied\)"):
        open_cache(tmp_path, paths, depth=9)


# ---------------------------------------------------------------- several files, several writers


def test_two_writers_at_once_are_both_read(tmp_path):
    """Each has files of its own and finds what the other has written; so does one that only reads."""
    paths = touch(tmp_path, 6)
    one, two, reader = (open_cache(tmp_path, paths) for _ in range(3))
    for a, b in ((0, 3), (1, 2), (2, 4)):
        write(one, a)
        assert reader.has([a])
        write(two, b)
    for cache in (one, two, reader):
        check(cache, 0, 1, 2, 3, 4)
    assert sum(1 for _ in cache_module.read_index(one.directory)) == 5
    third = open_cache(tmp_path, paths)
    check(third, 0, 1, 2, 3, 4)
    assert not third.has([5])
    assert verify(third.directory) == []


def test_a_line_that_is_being_written_is_read_once_it_is_whole(tmp_path):
    """By a process beside it."""
    paths, directory = filled(tmp_path, 2)
    (index,) = directory.glob("*.index")
    whole = index.read_bytes()
    for length in range(len(whole)):
        index.write_bytes(whole[:length])
        cache = open_cache(tmp_path, paths)
        assert [cache.has([number]) for number in (0, 1)] == [b"\n" in whole[:length], False]
        index.write_bytes(whole)
        check(cache, 0, 1)


def test_what_is_there_is_what_is_trained_on(tmp_path):
    """Whoever wrote it: a run that goes on after a stop has the same numbers, even if another rounds differently."""
    paths, _ = filled(tmp_path, 2)
    other = [activation(number) + 1 for number in range(3)]
    make(new := str(tmp_path / "2.wav"))
    cache = open_cache(tmp_path, [*paths, new])
    returned = cache.write(range(3), torch.cat(other), [len(part) for part in other])
    assert torch.equal(returned, torch.cat([activation(0), activation(1), other[2]]))
    assert torch.equal(cache.read(range(3))[0], returned)


def test_a_full_shard_is_followed_by_another_and_readers_go_on(tmp_path, monkeypatch):
    """The reading thread keeps its files when the writing one goes over to the next."""
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 300)
    paths = touch(tmp_path, 12)
    cache = open_cache(tmp_path, paths)
    write(cache, 0)
    check(cache, 0)
    (reader,) = cache.readers.values()
    write(cache, *range(1, 12))
    assert not reader.closed
    check(cache, *range(12))
    shards = [path.stat().st_size for path in cache.directory.glob("*.bin")]
    assert len(shards) > 2
    assert max(shards) <= 300 + activation(3).nbytes
    cache.close()
    assert reader.closed
    check(open_cache(tmp_path, paths), *range(12))


# ---------------------------------------------------------------- what cannot be stored


def test_values_beyond_fp16_are_refused_with_the_advice(tmp_path):
    """Names the file and its largest value, not its batch's; what came before it in the batch is kept."""
    paths = touch(tmp_path, 3)
    cache = open_cache(tmp_path, paths, torch.float16)
    packed = torch.cat([activation(0), activation(1), 1e9 * activation(2)])
    packed[len(activation(0))] = -70_000
    lengths = [len(activation(number)) for number in range(3)]
    with pytest.raises(ValueError, match=rf"{paths[1]} does not fit torch.float16 \(largest 7e\+04\); set cache_dtype"):
        cache.write(range(3), packed, lengths)
    assert [cache.has([number]) for number in range(3)] == [True, False, False]
    assert open_cache(tmp_path, paths, torch.float32).write(range(3), packed, lengths).equal(packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_activations_that_are_no_numbers_are_never_stored(tmp_path, dtype):
    """NaN has another cause than the type, and the message does not send the user the wrong way."""
    cache = open_cache(tmp_path, touch(tmp_path, 1), dtype)
    with pytest.raises(ValueError, match=r"0\.wav does not fit .* \(largest nan\); the model yields no numbers for it"):
        cache.write([0], torch.full((3, WIDTH), torch.nan), [3])
    assert not cache.has([0])


class FullDisk:
    """A file on a disk that has room for half of what is written next."""

    def __init__(self, file: object):
        self.file = file

    def write(self, content: bytes | str) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space, or set"),
        (errno.EFBIG, "free space, or set"),
        (errno.EIO, "set"),
        (errno.EROFS, "set"),
    ],
)
def test_space_is_to_be_freed_only_where_the_disk_is_full(tmp_path, number, remedy):
    """And not where it is broken, or may not be written to."""
    cache = open_cache(tmp_path, touch(tmp_path, 1))

    class Broken:
        def open(self, mode: str) -> None:
            raise OSError(number, os.strerror(number))

        def with_suffix(self, suffix: str) -> "Broken":
            return self

        def __truediv__(self, name: str) -> "Broken":
            return self

        def glob(self, pattern: str) -> list:
            return []

        def __str__(self) -> str:
            return "there"

    cache.directory = Broken()
    with pytest.raises(OSError, match=f"cache there: {re.escape(os.strerror(number))}; {remedy} cache_dir or cache: f"):
        write(cache, 0)


@pytest.mark.parametrize("file", ["shard", "index"])
def test_a_full_disk_is_one_clear_error_and_what_was_written_stays(tmp_path, file):
    """Half of an entry is in the files: it is never read, and what is written once there is space again is."""
    paths = touch(tmp_path, 4)
    cache = open_cache(tmp_path, paths)
    write(cache, 0, 1)
    shard, index = cache.writer
    cache.writer = (FullDisk(shard), index) if file == "shard" else (shard, FullDisk(index))
    with pytest.raises(OSError, match=r"cache .*: No space left on device; free space, or set cache_dir or cache: fal"):
        write(cache, 2)
    assert not cache.has([2])
    check(cache, 0, 1)
    write(cache, 3)
    cache.close()
    again = open_cache(tmp_path, paths)
    check(again, 0, 1, 3)
    assert not again.has([2])
    assert verify(again.directory) == []


def index_bytes(paths: list[str]) -> int:
    return sum(cache_module.LINE_BYTES + len(path) for path in paths)


def test_the_space_is_that_of_what_is_missing(tmp_path):
    """50 rows a second; one row an utterance if pooled; a line of the index for each."""
    paths = touch(tmp_path, 4)
    cache, row = open_cache(tmp_path, paths), WIDTH * 4
    assert cache.space(100.0) == 100 * 50 * row + index_bytes(paths)
    pooled = ActivationCache(tmp_path / "cache", IDENTITY, paths, WIDTH, torch.float32, rows=1)
    assert pooled.space(1e12) == 4 * row + index_bytes(paths)
    write(cache, 0, 1)
    assert cache.space(100.0) == 50 * 50 * row + index_bytes(paths[2:])
    write(cache, 2, 3)
    assert cache.space(1e12) == 0


def test_caches_that_will_not_fit_are_refused_before_they_are_begun(tmp_path, monkeypatch):
    """Those on one disk together."""
    one, other = (open_cache(tmp_path, touch(tmp_path, 4), depth=depth).directory for depth in (1, 2))
    with pytest.raises(OSError, match=r"needs 1600000\.0 GB, the disk has [\d.]+ GB; free space, or set cache_dir"):
        hardware.require_space({one: int(16e14)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 100))
    hardware.require_space({one: 60, other: 40})
    with pytest.raises(OSError, match=rf"cache {one}, {other}: needs 0\.0 GB"):
        hardware.require_space({one: 60, other: 41})
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path: os.stat_result((0, 0, path == one, *real(path)[3:])))  # two disks
    hardware.require_space({one: 60, other: 41})


# ---------------------------------------------------------------- killed

WRITER = """
import sys, torch
from cache import ActivationCache
paths = open(sys.argv[1]).read().split()
cache = ActivationCache(sys.argv[2], {"kill": 1}, paths, 64, getattr(torch, sys.argv[3]))
for number in range(len(paths)):
    part = torch.full((20 + number % 30, 64), float(number))
    cache.write([number], part, [len(part)])
"""


@pytest.mark.parametrize(("dtype", "head"), [(torch.float32, 0), (torch.int8, 8)], ids=["fp32", "int8"])
def test_a_process_that_is_killed_loses_only_what_it_had_in_hand(tmp_path, dtype, head):
    """kill -9 while it writes, a few times; each next one continues, and the last finds all complete."""
    count, row = 1500, 64 * dtype.itemsize
    paths = touch(tmp_path, count)
    listing, root = tmp_path / "paths.txt", tmp_path / "cache"
    listing.write_text("\n".join(paths))

    def present() -> np.ndarray:
        """Which are there; those that are have their values."""
        cache = ActivationCache(root, {"kill": 1}, paths, 64, dtype)
        there = np.flatnonzero(cache.entries["frames"] > 0)
        packed, lengths = cache.read(there)
        assert lengths == (20 + there % 30).tolist()
        expected = torch.from_numpy(there.repeat(lengths)).float()[:, None].expand(-1, 64)
        torch.testing.assert_close(packed, expected, rtol=1e-6 if head else 0, atol=0)
        assert verify(cache.directory) == []
        return there

    def written() -> int:
        return sum(path.stat().st_size for path in root.glob("*/*.bin"))

    (tmp_path / "writer.py").write_text(WRITER)
    words = [tmp_path / "writer.py", listing, root, str(dtype).removeprefix("torch.")]
    before, rng = 0, np.random.default_rng(0)
    for _ in range(3):
        process = start(tmp_path, *words)
        so_far, stop, began = written(), rng.integers(400, 8_000) * row, time.monotonic()
        while written() < so_far + stop and process.is_alive() and time.monotonic() - began < 60:
            time.sleep(0.001)
        process.kill()
        process.join()
        there = present()
        assert before < len(there) < count
        assert there.tolist() == list(range(len(there)))  # each took up where the last was killed
        in_hand = written() - sum((head + 20 + n % 30) * row for n in there.tolist())
        assert in_hand <= 3 * (head + 49) * row  # one for each killed
        before = len(there)
    assert python(*words).returncode == 0
    assert len(present()) == count


# ---------------------------------------------------------------- size


def test_an_index_of_50000_utterances_opens_quickly_and_in_little_memory(tmp_path, monkeypatch):
    """The size of a large corpus: seconds at most; 27 bytes an utterance once it is open, 230 until then."""
    count = 50_000
    paths = [f"{tmp_path}/corpus/MSP-PODCAST_{number:08d}.wav" for number in range(count)]

    def state(path: str) -> tuple[int, int]:
        number = int(path[-12:-4])
        return 100_000 + number, OLD + number

    monkeypatch.setattr("machine.audio.file_state", state)  # instead of 50,000 files
    directory = open_cache(tmp_path, paths).directory
    entries = ((number, "a.bin", 32 * number, 1, *state(path), path) for number, path in enumerate(paths))
    (directory / "a.index").write_bytes(b"".join(make_line(entry, directory.name) for entry in entries))
    with open(directory / "a.bin", "wb") as file:
        file.truncate(32 * count)
    began = time.process_time()
    cache = open_cache(tmp_path, paths)
    seconds = time.process_time() - began
    assert cache.has(range(count))
    assert cache.entries["crc32"].tolist() == list(range(count))
    assert seconds < 3
    tracemalloc.start()
    cache = open_cache(tmp_path, paths)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 30 * count
    assert peak < 300 * count


# ---------------------------------------------------------------- in training

TINY = Wav2Vec2Config(
    conv_channels=(32,) * 7,
    width=64,
    heads=4,
    ffn=128,
    layers=3,
    position_kernel=16,
    position_groups=4,
    hidden_dropout=0.1,  # of the part that trains: the same draws with and without a cache
)
FULL, LORA, LAST_LAYER, HEADS_ONLY = ("all", 0, -1), (0, 4, 0), (1, 0, 2), (0, 0, 4)  # trainable layers, rank, depth


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Twelve recordings of 0.3 to 0.8 s: noise through a filter of its own."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for number in range(12):
        noise = rng.standard_normal(rng.integers(4800, 12800))
        write_old_wav(folder / f"{number}.wav", 0.1 * np.convolve(noise, rng.standard_normal(8), "same"))
    return [str(folder / f"{number}.wav") for number in range(12)]


def fit(
    paths: list[str], method: tuple, root: Path | None, dtype: str, tier: str = "disk"
) -> tuple[list[float], dict, Prefix]:
    """Losses of three epochs, and the inputs of the part that trains, by epoch and utterance."""
    layers, rank, depth = method
    torch.manual_seed(0)
    model = EmotionModel(random_backbone(TINY), ["activation", "valence"], (1, 7), head_width=16)
    freeze.freeze(model, layers)
    if rank:
        lora.inject(model, rank, 2 * rank, ["q", "v"])
    labels = torch.rand(len(paths), 2, generator=torch.Generator().manual_seed(1))
    optimizer = run.make_optimizer(model, 1e-3, 1e-2, 0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    how = {"backbone": "tiny", "precision": "fp32", "dtype": dtype}
    cache = None if root is None else cache_module.open_cache(str(root), model, paths, **how)
    prefix = Prefix(model, paths, torch.device("cpu"), torch.float32, cache)
    assert prefix.depth == depth
    losses, inputs = [], {}
    torch.manual_seed(0)
    for epoch in (1, 2, 3):
        freeze.train_mode(model, depth)
        batches = data.batches(len(paths), 4, 0, epoch)
        for numbers, (x, lengths) in zip(batches, prefix(batches), strict=True):
            parts = x.split(lengths)
            inputs |= {(epoch, number): part.clone() for number, part in zip(numbers, parts, strict=True)}
            losses.append(
                run.step(model, x, lengths, labels[numbers], depth=depth, optimizer=optimizer, scaler=scaler)[0].item()
            )
        if root is not None:
            prefix.release_if_cached()
            prefix.reader = OnGPU(prefix.cache, torch.device("cpu")) if tier == "gpu" else prefix.cache
            assert prefix.complete  # from here on it could not be computed
    return losses, inputs, prefix


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-5), ("float16", 2e-2), ("int8", 2e-2)],
    ids=["stored in fp32", "stored in fp16", "stored in int8"],
)
@pytest.mark.parametrize("method", [FULL, LORA, LAST_LAYER, HEADS_ONLY], ids=["full", "LoRA", "last", "heads"])
def test_training_on_the_cache_has_the_losses_of_training_without(
    tmp_path, corpus, monkeypatch, method, dtype, tolerance
):
    """At every depth, over the epoch that fills it and those after; and a second run reads it from the start."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))  # moves on, however coarse the real one is
    expected, _, _ = fit(corpus, method, None, dtype)
    losses, inputs, prefix = fit(corpus, method, tmp_path, dtype)
    assert len(losses) == 9
    exact = dtype == "float32" or (dtype == "int8" and method == HEADS_ONLY)  # a single row is its own middle
    assert exact or losses != expected
    assert losses[:6] == pytest.approx(expected[:6], abs=tolerance)  # two epochs: what is rounded drifts apart
    for number in range(len(corpus)):  # the epoch that fills the cache trains on what the next ones read
        assert torch.equal(inputs[1, number], inputs[2, number])
        assert torch.equal(inputs[1, number], inputs[3, number])
    prefix.cache.close()
    again, _, second = fit(corpus, method, tmp_path, dtype)
    assert again == losses
    assert second.seconds == 0 < prefix.seconds


@pytest.mark.parametrize("method", [LAST_LAYER, HEADS_ONLY], ids=["last", "heads"])
def test_training_is_the_same_from_every_tier(tmp_path, corpus, method):
    """On a cache that is partly there, which the first epoch completes; with a file that the corpus names twice."""
    corpus = [*corpus, corpus[0]]
    expected, expected_inputs, _ = fit(corpus, method, tmp_path / "whole", "float16")
    fit(corpus[3:7], method, tmp_path / "part", "float16")
    losses, inputs, _ = fit(corpus, method, tmp_path / "part", "float16", "gpu")
    assert losses == expected
    assert inputs.keys() == expected_inputs.keys()
    assert all(torch.equal(inputs[key], expected_inputs[key]) for key in inputs)


def prefix_with_cache(tmp_path: Path, corpus: list[str]) -> Prefix:
    """The prefix of a run whose cache is whole."""
    fit(corpus, LAST_LAYER, tmp_path, "float16")[2].cache.close()
    model = EmotionModel(random_backbone(TINY), ["activation"], (1, 7))
    freeze.freeze(model, 1)
    how = {"backbone": "tiny", "precision": "fp32", "dtype": "float16"}
    cache = cache_module.open_cache(str(tmp_path), model, corpus, **how)
    return Prefix(model, corpus, torch.device("cpu"), torch.float32, cache)


def test_a_config_that_says_ram_reads_from_the_disk(tmp_path, corpus):
    """It was a tier once; such configs go on working, on a GPU too."""
    prefix = prefix_with_cache(tmp_path, corpus)
    prefix.device = torch.device("cuda", 0)
    prefix.release_if_cached("ram")
    assert prefix.complete and prefix.reader is prefix.cache


def test_on_a_gpu_auto_may_keep_a_whole_cache_there(tmp_path, corpus, monkeypatch):
    prefix = prefix_with_cache(tmp_path, corpus)
    prefix.device = torch.device("cuda", 0)
    monkeypatch.setattr("machine.gpu.pick", lambda tier, cache, device: "on the GPU")
    prefix.release_if_cached("auto")
    assert prefix.reader == "on the GPU"


def test_runs_that_differ_above_the_prefix_share_a_cache(tmp_path, corpus):
    """LoRA of another rank reads what the first wrote; another depth does not."""
    _, _, first = fit(corpus, LORA, tmp_path, "float16")
    _, _, second = fit(corpus, (0, 2, 0), tmp_path, "float16")
    assert second.cache.directory == first.cache.directory
    assert second.seconds == 0
    assert fit(corpus, LAST_LAYER, tmp_path, "float16")[2].cache.directory != first.cache.directory


def test_a_cache_of_pooled_utterances_has_one_row_each(tmp_path, corpus):
    """768 values an utterance, not a frame: why heads alone train in seconds."""
    _, _, prefix = fit(corpus, HEADS_ONLY, tmp_path, "float16")
    assert prefix.cache.entries["frames"].tolist() == [1] * len(corpus)
    assert sum(path.stat().st_size for path in prefix.cache.directory.glob("*.bin")) == len(corpus) * 64 * 2


# ---------------------------------------------------------------- files: real paths, coarse clocks, other places


@pytest.mark.skipif(os.name == "nt", reason="needs a right to make links there")
@pytest.mark.parametrize("written", ["corpus", "link", "folder/../corpus"])
@pytest.mark.parametrize("read", ["corpus", "link", "folder/../corpus", "files"])
def test_a_file_is_found_by_its_real_path(tmp_path, written, read):
    """Through a link to its folder, a link to itself, and any other spelling."""
    for name in ("corpus", "folder", "files"):
        (tmp_path / name).mkdir()
    touch(tmp_path / "corpus", 2)
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    for number in range(2):
        (tmp_path / "files" / f"{number}.wav").symlink_to(f"../corpus/{number}.wav")
    write(open_cache(tmp_path, [f"{tmp_path}/{written}/{number}.wav" for number in range(2)]), 0, 1)
    check(open_cache(tmp_path, [f"{tmp_path}/{read}/{number}.wav" for number in range(2)]), 0, 1)


@pytest.mark.skipif(os.name == "nt", reason="needs a right to make links there")
def test_what_was_written_under_a_link_before_is_found(tmp_path):
    """Entries once held the path as it was given; and a link from the old place to the new one brings them back."""
    for name in ("corpus", "root"):
        (tmp_path / name).mkdir()
    (path,) = touch(tmp_path / "corpus", 1)
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    cache = open_cache(tmp_path, [path])
    write(cache, 0)
    cache.close()
    (index,) = cache.directory.glob("*.index")
    (line,) = cache_module.read_index(cache.directory)
    index.write_bytes(make_line(line._replace(source=str(tmp_path / "link" / "0.wav")), cache.directory.name))
    check(open_cache(tmp_path, [path]), 0)
    (tmp_path / "link").unlink()
    assert not open_cache(tmp_path, [path]).has([0])
    moved = (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(moved)
    check(open_cache(tmp_path, [str(moved / "0.wav")]), 0)


def test_parts_of_a_file_have_entries_of_their_own(tmp_path):
    """By spelling of the file they are the same, by times they are not."""
    (path,) = touch(tmp_path, 1)
    cache = open_cache(tmp_path, [f"{path}#t=0,1", f"{path}#t=1,", path])
    write(cache, 0, 1)
    again = open_cache(tmp_path, [f"{tmp_path}/./0.wav#t=0,1", f"{path}#t=1,", path])
    check(again, 0, 1)
    assert not again.has([2])


@pytest.mark.parametrize("step", [16_000_000, 2_000_000_000], ids=["16 ms", "2 s"])
def test_a_file_rewritten_within_a_step_of_the_clock_is_noticed(tmp_path, monkeypatch, step):
    """Of the same size: the cache has waited until any later change gets another time."""
    paths = touch(tmp_path, 1)
    clock = [10**18 + 12_345]  # ns

    def sleep(seconds: float) -> None:
        clock[0] += int(seconds * 1e9)

    def rewrite(content: bytes) -> None:
        Path(paths[0]).write_bytes(content)
        os.utime(paths[0], ns=(clock[0] // step * step,) * 2)

    monkeypatch.setattr(audio.time, "time_ns", lambda: clock[0])
    monkeypatch.setattr(audio.time, "sleep", sleep)
    rewrite(b"first")
    cache = open_cache(tmp_path, paths)
    write(cache, 0)  # of what was read now
    rewrite(b"other")
    assert not open_cache(tmp_path, paths).has([0])


def test_a_file_that_goes_on_changing_is_never_trusted(tmp_path, monkeypatch):
    """One that is still recent after the wait; a time in the future is no reason to wait."""
    paths, waits, clock = touch(tmp_path, 2), [], [2 * OLD]

    def change(*_: object) -> None:
        os.utime(paths[0], ns=(clock[0], clock[0]))

    def sleep(seconds: float) -> None:
        clock[0] += int(seconds * 1e9)
        waits.append(seconds)
        change()

    monkeypatch.setattr(audio.time, "time_ns", lambda: clock[0])
    monkeypatch.setattr(audio.time, "sleep", sleep)
    change()
    cache = open_cache(tmp_path, paths)
    write(cache, 0, 1)
    check(cache, 0, 1)
    assert len(waits) == 1 and 2 < waits[0] < 2.1
    clock[0] += 10_000_000_000  # and the file stays as it is
    again = open_cache(tmp_path, paths)
    assert [again.has([number]) for number in (0, 1)] == [False, True]
    os.utime(paths[0], ns=(4 * OLD, 4 * OLD))
    open_cache(tmp_path, paths)
    assert len(waits) == 1


@pytest.mark.skipif(os.name == "nt", reason="paths begin otherwise there")
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_a_cache_of_an_earlier_version_is_read(tmp_path, dtype):
    """Files that the version with `frozen.py` wrote; nothing in them is written anew."""
    kept = json.loads((Path(__file__).parent / "cache_format_3.json").read_text())
    before = {tmp_path / "cache" / name: base64.b64decode(content) for name, content in kept.items()}
    for path, content in before.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    cache = open_cache(tmp_path, [f"/corpus/{number}.wav" for number in range(3)], dtype)
    packed, lengths = cache.read([2, 0, 1])
    assert lengths == [3, 1, 2]
    values = torch.cat([torch.arange(8.0 * frames).view(frames, 8) - 4 for frames in lengths])
    torch.testing.assert_close(packed.float(), values, rtol=0, atol=16 / 508 if dtype == torch.int8 else 0)
    assert verify(cache.directory) == []
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("layers", "rank", "pooling", "name"),
    [
        ("all", 0, "mean", "12d4b1191dadb200"),
        (0, 4, "mean", "d4770f90cd8bae0e"),
        (1, 0, "mean", "e89c401a89828cbd"),
        (0, 0, "mean", "f26a017a541df051"),
        (0, 0, "mean_std", "7a7333d48f83ec81"),
    ],
)
def test_the_directories_of_an_earlier_version_keep_their_names(tmp_path, layers, rank, pooling, name):
    """As that version named them; TF32, whose numbers are others, has a directory of its own."""
    model = EmotionModel(random_backbone(TINY), ["activation"], (1, 7), head_width=16, pooling=pooling)
    freeze.freeze(model, layers)
    if rank:
        lora.inject(model, rank, 2 * rank, ["q", "v"])
    how = {"backbone": "tiny", "precision": "fp32", "dtype": "float16"}
    assert cache_module.open_cache(tmp_path, model, ["/corpus/0.wav"], **how).directory.name == name
    assert cache_module.open_cache(tmp_path, model, ["/corpus/0.wav"], **how, tf32=True).directory.name != name


def open_for_a_model(folder: Path, paths: list[str]) -> ActivationCache:
    """As a run opens its cache: with notes."""
    model = EmotionModel(random_backbone(TINY), ["activation"], (1, 7))
    how = {"backbone": "tiny", "precision": "fp32", "dtype": "float32"}
    return cache_module.open_cache(folder / "cache", model, paths, **how)


def test_a_moved_corpus_is_named_before_it_is_computed_anew(tmp_path, capsys):
    """With both places; files that only have the same name are not taken for it."""
    for name in ("old", "new", "other"):
        (tmp_path / name).mkdir()
    old, other = touch(tmp_path / "old", 3), touch(tmp_path / "other", 3)
    cache = open_for_a_model(tmp_path, old)
    cache.write(range(3), torch.zeros(3, cache.width), [1, 1, 1])
    assert capsys.readouterr().err == ""
    for path in other:
        make(path, content=b"another sound")
    open_for_a_model(tmp_path, other)
    assert capsys.readouterr().err == ""
    new = [str(Path(path).rename(tmp_path / "new" / Path(path).name)) for path in old[:2]]
    open_for_a_model(tmp_path, [*new, other[2]])
    told = capsys.readouterr().err
    assert f"lacks 3 files and has 2 of them under another path, {old[0]} for {new[0]}; to use that, stop and" in told


def test_a_cache_of_another_user_is_read_and_named(tmp_path, capsys, monkeypatch):
    """What it lacks is computed, rounded as ever, and not stored; no space is asked for."""
    paths, directory = filled(tmp_path, 3, torch.float16)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != directory and real(path, mode))
    os.utime(paths[1], ns=(1, 1))
    before = {path: path.read_bytes() for path in directory.iterdir()}
    cache = open_cache(tmp_path, paths, torch.float16)
    assert cache.space(1e15) == 0
    for _ in range(2):
        assert torch.equal(write(cache, 0, 1), torch.cat([activation(0), activation(1)]).half())
        assert [cache.has([number]) for number in range(3)] == [True, False, True]
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    whole = open_for_a_model(tmp_path, paths)
    assert "read-only" not in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    open_for_a_model(tmp_path, paths)
    told = "lacks 3 files and is read-only: they are computed in every epoch; set cache_dir to keep them"
    assert f"note: cache {whole.directory} {told}" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_another_user_reads_a_cache(tmp_path):
    """A real process that may write nothing there; as root it becomes another user first."""
    paths, directory = filled(tmp_path, 2)
    directory.chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents[:-1]):  # pytest's are for one user
        if os.geteuid() == 0 and not folder.stat().st_mode & 1:
            folder.chmod(0o711)
    child = os.fork()
    if child == 0:
        fine = False
        with suppress(BaseException):
            if os.geteuid() == 0:
                os.setuid(65534)
            cache = open_cache(tmp_path, paths)
            check(cache, 0, 1)
            fine = not cache.writable
        os._exit(not fine)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    directory.chmod(0o755)
