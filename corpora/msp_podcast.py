"""MSP-Podcast 1.6 to 2.0, of the University of Texas at Dallas."""

from collections.abc import Iterator
from pathlib import Path

from corpora.tree import find, join, numbers, read_table
from data import Notes, Utterance

COLUMNS = ("FileName", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Split_Set")
SPLITS = {"train": "train", "validation": "dev", "development": "dev"}
TESTS = ("Test1", "Test2", "Test3")


def read_msp_podcast(folder: Path, test_set: str = "Test1") -> tuple[list[Utterance], Notes]:
    """MSP-Podcast 1.6 to 2.0: train, development and one of its test sets; labels 1..7."""
    audio = find(folder, "Audios", "Audio")
    source = find(find(folder, "Labels", "Label"), "labels_consensus.csv", "labels_concensus.csv")
    if test_set not in TESTS:
        raise ValueError(f"test_set: found {test_set!r}, expected one of {', '.join(TESTS)}")
    splits = SPLITS | {test.lower(): "test" if test == test_set else "" for test in TESTS}

    def rows() -> Iterator[Utterance]:
        for where, (file, *cells, speaker, split) in read_table(source, COLUMNS):
            if split.lower() not in splits:
                raise ValueError(f"{where}: split {split!r}, expected one of {', '.join(splits)}: an unknown version")
            yield Utterance(file, splits[split.lower()], speaker, numbers(cells, where))

    utterances, notes = join(source, rows(), [audio])
    if not any(utterance.split == "test" for utterance in utterances):
        raise ValueError(f"test_set: {source} has no labels of {test_set}; choose another of Test1, Test2 and Test3")
    return utterances, notes
