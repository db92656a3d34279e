"""Programs as processes of their own that need not import PyTorch: a server has, and forks for each.

That import takes two to five seconds, more than most of what is tested. What depends on how Python starts (the
encoding of file names, files that stand alone) starts it, with `subprocess`.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from machine.programs import IMPORTED

ROOT = Path(__file__).parents[1]
Ended = subprocess.CompletedProcess[str]


def server() -> multiprocessing.context.BaseContext:
    """Where processes come from: `.Process(target=..., args=...)`; Windows has no fork, and imports each time."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, "pytest"])  # which this file imports, in each fork
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # where it finds what it imports
        multiprocessing.forkserver.ensure_running()
    return context


@contextmanager
def server_with(*modules: str) -> Iterator[multiprocessing.context.BaseContext]:
    """While this lasts processes come from another server, which has imported these modules, and what lies here."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        yield multiprocessing.get_context("spawn")
        return
    other = multiprocessing.forkserver.ForkServer()
    other.set_forkserver_preload([*IMPORTED, *modules])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]), prepend=os.pathsep)
        other.ensure_running()
        patch.setattr(multiprocessing.forkserver, "connect_to_new_process", other.connect_to_new_process)
        try:
            yield multiprocessing.get_context("forkserver")
        finally:
            other._stop()


def start(folder: Path, *words: object, cwd: Path = ROOT, **environment: str) -> multiprocessing.process.BaseProcess:
    """Start `python WORDS`: a file, or -m and a module, and its arguments. What it says is in FOLDER/stdout, stderr."""
    given = (tuple(map(str, words)), str(cwd), os.environ | environment, str(folder))
    process = server().Process(target=be, args=given)
    process.start()
    return process


def python(*words: object, cwd: Path = ROOT, seconds: float = 120, **environment: str) -> Ended:
    """What `python WORDS` says and ends with, as from a shell; within so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(Path(folder), *words, cwd=cwd, **environment)
        process.join(seconds)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(words, seconds)
        said = [
            (Path(folder) / name).read_bytes().decode("utf-8", "surrogateescape").replace(os.linesep, "\n")
            for name in ("stdout", "stderr")
        ]
    return subprocess.CompletedProcess(words, process.exitcode, *said)


def be(words: tuple[str, ...], cwd: str, environment: dict[str, str], folder: str) -> None:
    """Become that program, with its output in files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(Path(folder) / name, "wb") as file:
            os.dup2(file.fileno(), number)
        errors = "strict" if number == 1 else "backslashreplace"  # as Python has it
        setattr(sys, name, open(number, "w", encoding=encoding, errors=errors, closefd=False))  # noqa: SIM115
    if words[0] == "-m":
        sys.path.insert(0, cwd)
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
