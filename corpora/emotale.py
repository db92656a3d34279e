"""EmoTale, enacted emotional speech in Danish and English, of the Technical University of Denmark (ASRU 2025).

It has no licence: ask its authors before you publish more than scores. Three raters, though its readme tells of two.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch

from corpora.tree import find, join, numbers, read_table
from data import LABEL_COLUMNS, Notes, Utterance
from metrics import ccc

FOLDS, SPEAKERS = 6, 18
SCALE = [half / 2 for half in range(2, 11)]  # 1 to 5 in halves
RATERS = ("a1", "a2", "a3")
COLUMNS = [f"{rater}_{letter}" for rater in RATERS for letter in "AVD"]  # activation, valence, dominance
CLIP = re.compile(r"(?:DK|EN)_(\d{3})_[A-Z]_\d+\.wav")  # language, speaker, emotion, sentence
SOURCE = "EmoTale is at https://github.com/snehadas/EmoTale; clone it and cite its paper (ASRU 2025)"


def read_emotale(folder: Path, fold: int) -> tuple[list[Utterance], Notes]:
    """EmoTale: labels 1..5, the mean of the raters."""
    try:
        return join(find(folder, "annotations.csv"), read_clips(folder, fold), [find(folder, "wav")])
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}. {SOURCE}") from None


def read_clips(folder: Path, fold: int) -> Iterator[Utterance]:
    """Every clip, of 18 speakers, of whom each speaks both languages under one number.

    A fold tests on three speakers, in the order of their numbers; the next fold's, after the last one the first's,
    are for development.
    """
    clips = read_ratings(folder)
    speakers = sorted({speaker_of(file) for file in clips})
    if len(speakers) != SPEAKERS:
        raise ValueError(f"{folder}: annotations of {len(speakers)} speakers, expected {SPEAKERS}: an unknown version")
    fold_of = {speaker: number * FOLDS // SPEAKERS + 1 for number, speaker in enumerate(speakers)}
    splits = {fold: "test", fold % FOLDS + 1: "dev"}
    for file, ratings in clips.items():
        given = {target: [rater[target] for rater in ratings if target in rater] for target in LABEL_COLUMNS}
        labels = {target: fmean(values) for target, values in given.items() if values}
        yield Utterance(file, splits.get(fold_of[speaker_of(file)], "train"), speaker_of(file), labels)


def agreement(folder: Path) -> dict[str, list[float]]:
    """By target, the CCC of each rater with the mean of the others: what a model can be expected to reach."""
    whole = [clip for clip in read_ratings(folder).values() if all(len(rater) == len(LABEL_COLUMNS) for rater in clip)]
    if len(whole) < 2:
        return {}
    table = torch.tensor([[[rater[t] for t in LABEL_COLUMNS] for rater in ratings] for ratings in whole])  # (N, R, D)
    others = (table.sum(1, keepdim=True) - table) / (len(RATERS) - 1)
    return {target: ccc(table[..., k], others[..., k]).tolist() for k, target in enumerate(LABEL_COLUMNS)}


def read_ratings(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The ratings of each clip by each rater. Raises FileNotFoundError, or ValueError for an unknown version."""
    clips = {}
    for where, (file, *cells) in read_table(find(folder, "annotations.csv"), ("file", *COLUMNS)):
        if not CLIP.fullmatch(file):
            raise ValueError(f"{where}: file {file!r}, expected a name such as DK_004_A_5.wav: an unknown version")
        if file in clips:
            raise ValueError(f"{where}: {file} is there twice: an unknown version")
        clips[file] = [numbers(cells[at : at + 3], where) for at in range(0, len(cells), 3)]
        for value in (value for rater in clips[file] for value in rater.values()):
            if value not in SCALE:
                raise ValueError(f"{where}: rating {value:g}, expected 1 to 5 in halves: an unknown version")
    return clips


def speaker_of(file: str) -> str:
    return CLIP.fullmatch(file).group(1)
