"""Programs of this repository: what all commands share, processes of their own, and what they say in a log.

Python and PyTorch take two to five seconds to start, and the first optimizer as long again. So a server imports them
once and forks for each program, where there is fork. A program's seconds then leave out these imports, and its peak
memory on a CPU counts, of PyTorch's own files, only what it touches: 65 MB less than when it is started by itself.
"""

import codecs
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = ["run", "torch.export.experimental", __name__]  # the second brings what the first optimizer imports
FAILED = "compare.py: failed, "  # begins the last line of the log of a program that failed


def command(main: Callable[[], None], stopped: str = "stopped", code: int = 1) -> None:
    """Run the `main` of a command. What goes wrong is one line, and no encoding of a terminal or pipe ends it."""
    sys.stdout.reconfigure(errors="as_named")
    try:
        return main()
    except (OSError, ValueError) as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = f"\n{stopped}"
    if code != 1:
        print(message, file=sys.stderr)
    sys.exit(message if code == 1 else code)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of a command line that are paths, and those that are `key=value`; a path may hold an equals sign too."""
    overrides = [word for word in words if "=" in word and word.partition("=")[0].isidentifier()]
    return [word for word in words if word not in overrides], overrides


def as_named(error: UnicodeError) -> tuple[str | bytes, int]:
    r"""For `errors=`: a byte of a file name that is not UTF-8 as it is, and what an encoding lacks as \x.. or \u...."""
    error.end = error.start + 1  # one character after the other
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error("as_named", as_named)


def logged(words: Sequence[str], log: Path) -> int:
    """Run `python -m WORDS` with its output in `log`; returns the exit code. Ctrl-C asks it to end, and waits."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # where the server finds what it imports
        context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=be, args=(list(words), str(log)))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()  # it ends its step and saves
        process.join()
        raise
    if code := process.exitcode:
        reason = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
        with open(log, "ab") as file:
            file.write(f"\n{FAILED}{reason}{', perhaps for memory' if code == -9 else ''}\n".encode())
    return code


def be(words: Sequence[str], log: str) -> None:
    """Become the program `python -m WORDS`: a module and its arguments."""
    with open(log, "ab") as file:
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            os.dup2(file.fileno(), number)
            stream.reconfigure(line_buffering=True)  # what a killed process has said is in the file
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def last_lines(log: Path, count: int = 5) -> list[str]:
    """The last lines of a program that failed, as a terminal would show them, and how it ended; else none."""
    text = log.read_bytes().decode(errors="replace") if log.is_file() else ""
    lines = [line for line in (line.rstrip().split("\r")[-1] for line in text.split("\n")) if line]
    failed = bool(lines) and lines[-1].startswith(FAILED)
    return [*lines[-1 - count : -1], lines[-1].removeprefix(FAILED)] if failed else []
