"""Predict activation and valence of audio files with a finished run, or with a published emotion model.

    python predict.py runs/lora_r8 speech.wav recordings/ --out predictions.csv
    python predict.py audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim speech.wav

Folders are searched for audio. A file longer than the window becomes equal windows, a row each. What cannot be read is
named at the end, after all the rest.
"""

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

import data
import run
from model import EmotionModel

SUFFIXES = {f".{name.lower()}" for name in (*soundfile.available_formats(), "AIF", "OGA", "OPUS")} - {".raw"}
TOGETHER = 8  # windows in memory at once


def find_audio(paths: Sequence[str]) -> list[Path]:
    """The files that paths name, folders searched for audio. Raises FileNotFoundError for a folder without any."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise FileNotFoundError(f"{path}: no audio file in this folder")
            files += found
        else:
            files.append(path)
    return files


def cut(waveform: Tensor, window: float) -> list[tuple[float, float, Tensor]]:
    """Equal pieces of at most `window` seconds: start and end in seconds, and samples `(S,)`."""
    seconds = len(waveform) / data.SAMPLE_RATE
    count = max(1, math.ceil(seconds / window))
    edges = [round(i * len(waveform) / count) for i in range(count + 1)]
    return [
        (start / data.SAMPLE_RATE, stop / data.SAMPLE_RATE, waveform[start:stop]) for start, stop in pairwise(edges)
    ]


@torch.no_grad()
def predict_file(model: EmotionModel, path: Path, window: float) -> Iterator[list]:
    """Rows of a file: name, start and end in seconds, predictions in the label's scale."""
    device = next(model.head.parameters()).device
    low, high = model.label_range
    pieces = cut(data.read_audio(str(path)), window)
    for first in range(0, len(pieces), TOGETHER):
        group = pieces[first : first + TOGETHER]
        predictions = model.infer([samples.to(device) for *_, samples in group])
        for (start, end, _), row in zip(group, predictions.tolist(), strict=True):
            values = [f"{low + (high - low) * value:.4f}" for value in row]
            yield [str(path), f"{start:.3f}", f"{end:.3f}", *values]


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict activation and valence of audio files.")
    parser.add_argument("model", help="the directory of a run of train.py, or a published emotion model")
    parser.add_argument("audio", nargs="+", help="audio files, or folders to search for them")
    parser.add_argument("--out", help="CSV file to write; otherwise the rows are printed")
    parser.add_argument("--window", type=float, default=20.0, help="longest stretch in seconds that gets one row")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    arguments = parser.parse_args()
    if not arguments.window >= 0.1:
        raise ValueError(f"--window: expected at least 0.1 seconds, found {arguments.window:g}")
    files = find_audio(arguments.audio)
    model = run.load_run(arguments.model, arguments.device)
    sys.stdout.reconfigure(errors="backslashreplace")  # a Windows pipe cannot carry every file's name
    out, failed = arguments.out, []
    try:
        with open(out, "w", newline="", encoding="utf-8") if out else nullcontext(sys.stdout) as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["file", "start", "end", *model.targets])
            for path in tqdm(files, unit="file", disable=None if out else True):
                try:
                    rows = list(predict_file(model, path, arguments.window))
                except (OSError, ValueError) as error:
                    failed.append(str(error))
                    continue
                writer.writerows(rows)
                stream.flush()
    except OSError as error:
        raise OSError(f"{out or 'stdout'}: cannot be written ({error.strerror})") from None
    if failed:
        sys.exit("\n".join([f"error: {len(failed)} of {len(files)} files have no prediction:", *failed]))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
