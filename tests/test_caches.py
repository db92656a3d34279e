"""What `tools.caches` promises: caches filled before a run, damage found, nothing lost by mistake."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_settings
from processes import python
from test_cache import ROOT, activation, check, filled, open_cache, touch, write

import cache as cache_module
import data
import run
import train
from config import load_config
from machine import hardware
from model import Layer
from tools import caches
from tools.caches import verify

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- the command line


def command_line(monkeypatch, *arguments: object) -> object:
    """The exit status of `python -m tools.caches ...`, or the message it exits with."""
    monkeypatch.setattr(sys, "argv", ["caches.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "tools" / "caches.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


def test_verify_names_what_is_damaged_and_its_exit_status_says_so(tmp_path, monkeypatch, capsys):
    """As a real process: status 1 and the audio file's name; status 0 when all is whole."""
    paths, directory = filled(tmp_path, 3)
    assert command_line(monkeypatch, "verify", directory) == 0
    assert capsys.readouterr().out == "every activation is as it was written\n"
    (shard,) = directory.glob("*.bin")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 128
    shard.write_bytes(content)
    done = python("-m", "tools.caches", "verify", directory)
    assert (done.returncode, done.stdout, done.stderr) == (1, f"{paths[2]}\n1 damaged; --repair forgets them\n", "")


def test_verify_of_what_is_no_cache_is_one_clear_message(tmp_path, monkeypatch):
    """No traceback; the file is named."""
    assert command_line(monkeypatch, "verify", tmp_path) == f"error: {tmp_path}: is no cache, it has no cache.json"
    description = tmp_path / "cache.json"
    for text in ("{", "[]", '{"width": 8}', '{"width": 8, "dtype": "complex"}', '{"width": "8", "dtype": "no"}'):
        description.write_text(text)
        message = f"error: {description}: does not describe a cache of this name; a run that uses it writes it anew"
        assert command_line(monkeypatch, "verify", tmp_path) == message


def test_list_tells_size_content_and_users_of_each_cache(tmp_path, monkeypatch, capsys):
    """The largest first; of its users those that are still there; damaged notes and a broken cache.json are no end."""
    (_, large), (_, small) = filled(tmp_path, 5), filled(tmp_path, 2, torch.int8)
    cache = open_cache(tmp_path, touch(tmp_path, 5))
    (tmp_path / "run").mkdir()
    for name in ("run", "gone"):
        cache.note_user(tmp_path / name, "facebook/some")
    for name, text in (("torn", '{"path'), ("other", '{"path": 1, "backbone": "x"}'), ("list", "[1]")):
        (large / f"{name}.user").write_text(text)
    size = sum(path.stat().st_size for path in large.iterdir()) / 1e6
    assert command_line(monkeypatch, "list", tmp_path / "cache") is None
    first, second, third, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{large}: {size:.1f} MB, 5 utterances, last used 20")
    assert second == "  facebook/some, hidden state 2, 8 of float32"
    assert third == f"  used by {tmp_path / 'run'}"
    assert rest[0].startswith(f"{small}: ") and "2 utterances" in rest[0]
    assert rest[1:3] == ["  SHA-256 abc..., hidden state 2, 8 of int8", "  used by nothing that still exists"]
    assert rest[3].startswith(f"{tmp_path / 'cache'}: 2 caches, ")
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    assert caches.describe(small).splitlines()[-1] == "  written by another version; no longer used"
    (small / "cache.json").write_text("{")
    assert command_line(monkeypatch, "list", tmp_path / "cache") is None
    assert (
        f"cannot be told: {small / 'cache.json'}: does not describe a cache of this name; " in capsys.readouterr().out
    )
    missing = tmp_path / "none"
    message = f"error: {missing}: no such folder; expected one of caches, as cache_dir names it"
    assert command_line(monkeypatch, "list", missing) == message


def test_what_belongs_to_lost_files_is_counted_and_can_be_dropped(tmp_path, monkeypatch, capsys):
    """Gone or changed; the space is freed, the rest is read as before, and a part counts with its file."""
    paths = touch(tmp_path, 5)
    paths[4] += "#t=0,1"
    cache = open_cache(tmp_path, paths)
    write(cache, *range(5))
    cache.close()
    directory = cache.directory
    rows = {number: activation(number).nbytes for number in range(5)}
    os.unlink(paths[0])
    os.utime(paths[2], ns=(1, 1))
    command_line(monkeypatch, "list", directory.parent)
    assert "5 utterances (2 of files that are gone or have changed), last" in capsys.readouterr().out
    assert command_line(monkeypatch, "clear", directory, "--gone") is None
    assert capsys.readouterr().out.splitlines()[0].startswith(f"{directory}: freed 0.0 MB")
    assert sum(path.stat().st_size for path in directory.glob("*.bin")) == sum(rows[n] for n in (1, 3, 4))
    assert len(list(directory.glob("*.index"))) == 1
    assert verify(directory) == []
    again = open_cache(tmp_path, paths)
    check(again, 1, 3, 4)
    assert not again.has([0]) and not again.has([2])
    before = {path: path.read_bytes() for path in directory.iterdir()}
    command_line(monkeypatch, "clear", directory, "--gone")  # nothing is left to drop
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_a_cache_is_named_by_any_path(tmp_path, monkeypatch, capsys):
    """Also as `.`, from within."""
    _, directory = filled(tmp_path, 2)
    monkeypatch.chdir(directory)
    assert command_line(monkeypatch, "verify", ".") == 0
    assert command_line(monkeypatch, "clear", ".", "--gone") is None
    assert verify(directory) == []


def test_a_build_into_a_cache_that_may_not_be_written_is_refused(several, monkeypatch):
    """It would compute everything for nothing; a whole one is no error."""
    path = str(several["lora"])
    caches.build([path])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert caches.build([path])[path]["seconds"] is None
    with pytest.raises(OSError, match=r"cache .*: is read-only and lacks 20 files; set cache_dir"):
        caches.build([path, "cache_dtype=float32"])


def test_clear_deletes_caches_alone_and_says_what_it_freed(tmp_path, monkeypatch, capsys):
    """By directory, or by name below ./cache; if one is no cache, none is deleted; a file of others stays."""
    (_, one), (_, other) = filled(tmp_path, 5), filled(tmp_path, 2, torch.int8)
    monkeypatch.chdir(tmp_path)
    for wrong in (tmp_path / "cache", tmp_path / "none", "none"):
        assert "is no cache, it has no cache.json" in command_line(monkeypatch, "clear", one, wrong)
    assert verify(one) == verify(other) == []
    (other / "notes.txt").write_text("mine")
    size = sum(path.stat().st_size for path in one.iterdir()) / 1e6
    assert command_line(monkeypatch, "clear", one.name, other, str(one.relative_to(tmp_path))) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{Path('cache') / one.name}: freed {size:.1f} MB"
    assert len(lines) == 3 and lines[-1].startswith("freed ")
    assert not one.exists()
    assert [path.name for path in other.iterdir()] == ["notes.txt"]


def test_a_run_and_a_build_are_told_as_users_of_their_cache(several, capsys, monkeypatch):
    """Also one that is not finished; and what is listed is not taken for an index."""
    path = several["lora"]
    caches.build([str(path)])
    config = load_config(path, ["epochs=1", "name=user"])
    train.train(config)
    command_line(monkeypatch, "list", config.cache_dir)
    printed = capsys.readouterr().out
    assert f"  used by {Path(config.output_dir) / 'user'}\n" in printed
    assert f"  used by {path}\n" in printed
    assert f"  {config.backbone}, hidden state 0, 64 of float16\n" in printed
    assert "20 utterances" in printed


# ---------------------------------------------------------------- several caches with one command


@pytest.fixture
def several(tmp_path, tiny_checkpoint, tiny_manifest) -> dict[str, Path]:
    """Configs of one corpus and backbone whose prefixes end at different depths; the last two share a cache."""
    kinds = {
        "lora": {"lora_rank": 2},
        "last2": {"trainable_layers": 2, "cache_dtype": "float32"},
        "heads": {},
        "spread": {"pooling": "mean_std"},
        "layers": {"pooling": "layers"},
        "attentive": {"pooling": "attentive", "cache_dtype": "int8"},
        "lora again": {"lora_rank": 4},
    }
    paths = {}
    for name, keys in kinds.items():
        paths[name] = tmp_path / f"lr=1e-4 {name}.yaml"  # a path may hold an equals sign
        settings = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, cache=True, **keys)
        paths[name].write_text(yaml.safe_dump(settings), encoding="utf-8")
    return paths


def activations(path: Path) -> tuple[Path, torch.Tensor, list[int]]:
    """Directory, stored rows and lengths of a complete cache of a config."""
    config = load_config(path)
    utterances, label_range = run.load_utterances(config)
    model, identity = run.build_model(config, label_range)
    paths, how = [utterance.path for utterance in utterances], {"precision": "fp32", "dtype": config.cache_dtype}
    cache = cache_module.open_cache(config.cache_dir, model, paths, backbone=identity["sha256"], **how)
    numbers = range(len(utterances))
    assert cache.has(numbers)
    stored, lengths = cache.read_stored(numbers)
    cache.close()
    return cache.directory, stored, lengths


def test_one_command_builds_the_caches_of_several_configs(several, monkeypatch):
    """Each activation is what a run computes, bit for bit; configs that share a cache fill it once."""
    read, real_read = [], data.read_audio
    monkeypatch.setattr(data, "read_audio", lambda path: (read.append(path), real_read(path))[1])
    built = caches.build([*map(str, several.values()), "batch_size=10"])
    assert len(read) == 6 * 20
    assert list(built) == [str(path) for path in several.values()]
    assert len({report["directory"] for report in built.values()}) == 6
    rows = {}
    for name, path in several.items():
        directory, stored, lengths = activations(path)
        assert str(directory) == built[str(path)]["directory"]
        assert built[str(path)]["bytes"] == stored.numel() * stored.element_size()
        rows[name] = set(lengths)
        shutil.rmtree(directory)
        train.train(load_config(path, ["epochs=1", f"name={name}", "batch_size=10"]))
        of_run = activations(path)
        assert of_run[2] == lengths and torch.equal(of_run[1], stored), name
    assert (rows["heads"], rows["spread"], rows["layers"]) == ({1}, {2}, {4})


def test_a_build_tells_what_each_cache_has_cost(several, monkeypatch):
    """A deeper prefix costs more than a shallower one; what is complete costs nothing, which is told apart from 0."""
    clock = [0.0]
    real_layer = Layer.forward
    monkeypatch.setattr(caches.time, "perf_counter", lambda: clock[0])

    def layer(self: torch.nn.Module, *inputs) -> torch.Tensor:
        clock[0] += 1.0  # the only thing that takes time
        return real_layer(self, *inputs)

    monkeypatch.setattr(Layer, "forward", layer)
    words = [str(several[name]) for name in ("lora", "last2")]
    assert [report["seconds"] for report in caches.build([*words, "batch_size=10"]).values()] == [0.0, 2.0]
    words.append(str(several["heads"]))
    seconds = [report["seconds"] for report in caches.build([*words, "batch_size=10"]).values()]
    assert seconds == [None, None, 6.0]


def test_two_builds_at_once_share_the_work(several, monkeypatch):
    """What the other has done by then is not done again, and what each has is what one alone has."""
    paths, read, real = [str(several[name]) for name in ("lora", "last2")], [], data.read_audio

    def read_audio(path: str) -> torch.Tensor:
        read.append(path)
        if len(read) == 1:
            caches.build(paths)  # another process, from beginning to end
        return real(path)

    monkeypatch.setattr(data, "read_audio", read_audio)
    built = caches.build(paths)
    assert len(read) == 2 * 20 + 4  # the batch in hand
    for path in paths:
        assert verify(built[path]["directory"]) == []
        assert sum(1 for _ in caches.read_index(Path(built[path]["directory"]))) == 20


def test_a_damaged_activation_ends_a_run_and_is_mended_by_one_command(several, monkeypatch, capsys):
    """Which the message names; the same command then reads one file, and goes on where it was."""
    path = several["lora"]
    directory = Path(caches.build([str(path)])[str(path)]["directory"])
    (shard,) = directory.glob("*.bin")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    config = load_config(path, ["epochs=1", "name=mended"])
    with pytest.raises(
        ValueError, match=f"is damaged; python -m tools.caches verify --repair {directory} forgets"
    ) as error:
        train.train(config)
    assert command_line(monkeypatch, *str(error.value).split("python -m tools.caches ")[1].split()[:3]) == 1
    assert "1 damaged; forgotten: the next run computes them anew" in capsys.readouterr().out
    read, real = [], data.read_audio
    monkeypatch.setattr(data, "read_audio", lambda path: (read.append(path), real(path))[1])
    assert train.train(config)["epochs"] == 1
    assert len(set(read)) <= config.batch_size
    assert verify(directory) == []


def test_the_caches_of_one_build_must_fit_together(several, monkeypatch):
    """Each alone would; and what is estimated is what is written, index included, to some per cent."""
    paths = [str(path) for path in several.values()]
    needed, real = {}, hardware.require_space
    monkeypatch.setattr(hardware, "require_space", lambda these: (needed.update(these), real(these))[1])
    free = shutil.disk_usage(several["lora"].parent)
    built = caches.build(paths)
    for report in built.values():
        written = sum(file.stat().st_size for file in Path(report["directory"]).glob("*.[bi]*"))
        assert 0.9 * written < needed[Path(report["directory"])] < 1.2 * written
    shutil.rmtree(Path(built[paths[0]]["directory"]).parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=max(needed.values())))
    with pytest.raises(OSError, match=r"cache .*, .*, .*: needs 0\.0 GB, the disk has"):
        caches.build(paths)


def test_the_build_command_reports_to_a_file(several, tmp_path, monkeypatch, capsys):
    """`tools.caches build CONFIG CONFIG key=value --report FILE`, and a run then reads and computes nothing."""
    report = tmp_path / "report.json"
    words = [str(several["last2"]), str(several["heads"]), "epochs=1"]
    monkeypatch.setattr(sys, "argv", ["caches.py", "build", *words, "--report", str(report)])
    caches.main()
    assert "built in" in capsys.readouterr().out
    assert json.loads(report.read_text()).keys() == set(words[:2])
    monkeypatch.setattr(data, "read_audio", None)
    result = train.train(load_config(several["last2"], ["epochs=1", "name=reads"]))
    assert result["seconds"]["cache_build"] == 0
    monkeypatch.setattr(sys, "argv", ["caches.py", "build", "epochs=1"])
    with pytest.raises(ValueError, match="build: expected at least one config"):
        caches.main()
