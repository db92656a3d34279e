"""Files that are found whole: what was there, or what was to be there, whatever happens in between."""

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import yaml

from machine import parallel


def first_line(error: Exception) -> str:
    """What an error says, or is, in a line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a file beside `path`, then put it in its place: whoever reads `path` finds the old or the new, whole.

    Of several processes only the first does.
    """
    if parallel.rank() > 0:
        return
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer has errors of its own for a full disk
        advice = "" if isinstance(error, OSError) else "; is the disk full?"  # PyTorch's own words do not tell
        raise OSError(f"{path}: cannot be written ({first_line(error)}); what was there is unharmed{advice}") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def save(path: Path, value: dict) -> None:
    replace(path, lambda file: torch.save(value, file))


def write_text(path: Path, text: str) -> None:
    replace(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_yaml(path: Path, value: dict) -> None:
    write_text(path, yaml.safe_dump(value, sort_keys=False))
