"""MuSE, of the University of Michigan."""

from pathlib import Path

from corpora.tree import find, join, not_found, numbers, read_table
from data import Notes, Utterance


def read_muse(folder: Path) -> tuple[list[Utterance], Notes]:
    """MuSE: labels 1..9, ratings of sentences heard in random order.

    No split was published. Ours goes by speakers in the order of their names: of five the fourth is for development
    and the fifth for testing, which makes 18, 5 and 5 of 28.
    """
    sources = sorted(folder.glob("*/Emotion data from crowdsourcing*.csv"))
    if not sources:
        raise not_found(folder, "a folder with `Emotion data from crowdsourcing ... .csv`")
    audio = [find(find(folder, kind), "Audio") for kind in ("NotStressed", "Stressed")]
    table = list(read_table(sources[0], ("", "Activation_Mean", "Valence_Mean")))
    speakers = sorted({file[:2] for _, (file, *_) in table})
    split = {speaker: ("train", "train", "train", "dev", "test")[at % 5] for at, speaker in enumerate(speakers)}
    rows = (
        Utterance(file.removesuffix(".wav") + ".wav", split[file[:2]], file[:2], numbers(cells, where))
        for where, (file, *cells) in table
    )
    return join(sources[0], rows, audio)
