"""What `machine.programs` promises: a program runs by itself, what it says is kept, and none pays for another."""

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import tiny_settings
from processes import python

from machine.programs import command, last_lines, logged


@pytest.fixture
def program(tmp_path, monkeypatch) -> Path:
    """Where a program is found as module `program`."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "program.py"


def fail(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("bad"), "error: bad"), (FileNotFoundError("gone"), "error: gone"), (KeyboardInterrupt(), "\nended")],
)
def test_a_command_ends_with_one_line(error, said, capsys):
    """What Python prints of a text that a program exits with has status 1; another status prints it before."""
    with pytest.raises(SystemExit) as end:
        command(fail(error), "ended")
    assert end.value.code == said
    with pytest.raises(SystemExit) as end:
        command(fail(error), "ended", code=2)
    assert end.value.code == 2 and capsys.readouterr().err == f"{said}\n"


def test_other_errors_of_a_command_keep_their_traceback():
    with pytest.raises(KeyError):
        command(fail(KeyError("a fault of ours")))


def test_a_name_is_printed_whatever_the_encoding(monkeypatch):
    """Bytes that are not UTF-8 as they are; characters that an encoding lacks as an escape."""
    for encoding, expected in (("utf-8", "é中".encode()), ("latin-1", b"\xe9\\u4e2d"), ("ascii", b"\\xe9\\u4e2d")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        command(lambda: print("é中\udcff\udcfe\ud800", end="", flush=True))
        assert stream.buffer.getvalue() == expected + b"\xff\xfe\\ud800"


def test_a_log_ends_with_how_its_process_did_and_reads_as_on_a_terminal(program, tmp_path):
    """Of a bar that was drawn over and over its last state is left; one that ended well has no last lines."""
    log = tmp_path / "logs" / "a.txt"
    program.write_text("import sys\nprint('1%\\r50%\\r100%\\n\\nerror: é', file=sys.stderr)\nsys.exit(3)")
    assert logged(["program"], log) == 3
    assert last_lines(log)[0] == "100%"
    assert last_lines(log)[-1] == "exit code 3"
    assert len(last_lines(log)) == 3
    program.write_text("print('fine')")
    assert logged(["program"], log) == 0
    assert last_lines(log) == last_lines(tmp_path / "none.txt") == []


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals")
def test_a_killed_process_is_said_to_be_one(program, tmp_path, monkeypatch):
    """What it had said until then is there."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    program.write_text("import os\nprint('epoch 1')\nos.kill(os.getpid(), 9)")
    assert logged(["program"], tmp_path / "log.txt") == -9
    assert last_lines(tmp_path / "log.txt") == ["epoch 1", "signal 9, Killed, perhaps for memory"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
def test_an_interrupt_waits_until_the_run_has_saved(program, tmp_path):
    """However long its step takes, where `subprocess.run` would kill it after a quarter of a second."""
    log = tmp_path / "log.txt"
    program.write_text(
        "import os, signal, sys, time\n"  # os.write: the signal may come while print still holds the stream
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.6), os.write(1, b'saved\\n'), sys.exit(1)))\n"
        "print('begun', flush=True)\ntime.sleep(60)\n"
    )

    def interrupt() -> None:
        while not log.is_file() or b"begun" not in log.read_bytes():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        logged(["program"], log)
    assert log.read_text().split() == ["begun", "saved"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_programs_are_processes_of_their_own_that_need_not_import_pytorch(program, tmp_path):
    """One server forks them all, with what train.py needs; what one leaves behind the next does not see."""
    said = []
    program.write_text(
        "import os, sys\nprint(os.getpid(), os.getppid(), 'run' in sys.modules, 'torch._dynamo' in sys.modules)\n"
        "print(hasattr(sys, 'left_behind'), sys.argv[1:], __name__)\nsys.left_behind = True\n"
    )
    for number in range(2):
        assert logged(["program", str(number)], tmp_path / "log.txt") == 0
        said.append((tmp_path / "log.txt").read_text().splitlines())
    (first, second), (pids, parents) = said, zip(*(lines[0].split()[:2] for lines in said), strict=True)
    assert len(set(pids)) == 2
    assert len(set(parents)) == 1
    assert first[0].endswith("True True") and second[0].endswith("True True")
    assert [first[1], second[1]] == ["False ['0'] __main__", "False ['1'] __main__"]


@pytest.mark.skipif(sys.platform == "win32", reason="there it is the console's encoding that decides")
def test_a_terminal_of_ascii_ends_no_command(tmp_path, tiny_checkpoint, tiny_manifest):
    """A run, what reads it and what lists its cache, in a folder that ASCII cannot name."""
    folder = tmp_path / "é"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_settings(folder, tiny_checkpoint, tiny_manifest, epochs=1)))
    cache = folder / "cache"
    keys = ["name=ü", "cache=true", f"cache_dir={cache}", f"output_dir={folder}"]
    for words in (
        ["train.py", str(tmp_path / "run.yaml"), *keys],
        ["-m", "tools.layers", str(folder / "ü")],
        ["-m", "tools.caches", "list", str(cache)],
        ["compare.py", str(tmp_path / "run.yaml"), "--table", "--out", str(folder)],
    ):
        done = python(*words, PYTHONIOENCODING="ascii")
        assert done.returncode == 0, (words, done.stderr)
        assert "\\xe9" in done.stdout, words
