"""Every clock of this process, and the times of files, advance in steps of 16 ms, as in some virtual machines.

Python imports this file at its start where its folder is on PYTHONPATH; `pytest --coarse-clock` puts it there, so that
the programs that tests start have such a clock too.
"""

import os
import time

STEP = 16_000_000  # ns


def coarse(now):
    """The nanoseconds that `now` tells, rounded down to a step."""
    return lambda: now() // STEP * STEP


def in_seconds(nanoseconds):
    return lambda: nanoseconds() / 1e9


def install() -> None:
    """Replace the clocks of `time`, and the times in the results of `os.stat` and its kin."""
    if getattr(time, "is_coarse", False):
        return
    time.is_coarse = True
    for name in ("time", "perf_counter", "monotonic", "process_time", "thread_time"):
        nanoseconds = coarse(getattr(time, f"{name}_ns"))
        setattr(time, f"{name}_ns", nanoseconds)
        setattr(time, name, in_seconds(nanoseconds))
    for name in ("stat", "lstat", "fstat"):
        setattr(os, name, coarse_stat(getattr(os, name)))


def coarse_stat(stat):
    def call(*arguments, **options):
        found = stat(*arguments, **options)
        values = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        for kind in ("atime", "mtime", "ctime"):
            values[f"st_{kind}_ns"] = values[f"st_{kind}_ns"] // STEP * STEP
            values[f"st_{kind}"] = values[f"st_{kind}_ns"] / 1e9
        first = [*found[:7], *(int(values[f"st_{kind}"]) for kind in ("atime", "mtime", "ctime"))]
        return os.stat_result(first, values)

    return call


install()
