"""IEMOCAP, of the University of Southern California."""

import re
from collections.abc import Iterator
from pathlib import Path

from corpora.tree import find, join, leave_session_out, numbers
from data import Notes, Utterance, reading

SESSIONS = 5
HIGH = 5.0  # the end of the scale
TURN = re.compile(r"\[[\d.]+ - [\d.]+\]\t(Ses\d\d\w+)\t\w+\t\[([\d.]+), ([\d.]+), ([\d.]+)\]")
SLACK = 0.5  # how far above 5 a mean of ratings is a slip and not another scale


def read_iemocap(folder: Path, fold: int, dev_set: str = "session") -> tuple[list[Utterance], Notes]:
    """IEMOCAP: labels 1..5, where a mean of ratings slightly above 5 counts as 5. Splits: see `leave_session_out`."""
    sessions = {number: find(folder, f"Session{number}") for number in range(1, SESSIONS + 1)}
    above = []

    def rows() -> Iterator[Utterance]:
        for session, place in sessions.items():
            for source in sorted(find(find(place, "dialog"), "EmoEvaluation").glob("[!.]*.txt")):
                with reading(source, "label file", errors="replace") as file:
                    turns = [match.groups() for line in file if (match := TURN.match(line))]
                if not turns:
                    raise ValueError(f"{source}: no turn, expected lines [start - end] TURN category [v, a, d]")
                for turn, valence, activation, dominance in turns:
                    labels = numbers([activation, valence, dominance], f"{source}: {turn}")
                    slips = {target: HIGH for target, value in labels.items() if HIGH < value <= HIGH + SLACK}
                    if slips:
                        above.append(f"{turn}.wav")
                    gender = turn.rpartition("_")[2][0]
                    split = leave_session_out(fold, SESSIONS, session, gender, dev_set)
                    yield Utterance(f"{turn}.wav", split, turn[:5] + gender, labels | slips)

    utterances, notes = join(folder, rows(), [find(find(place, "sentences"), "wav") for place in sessions.values()])
    return utterances, notes | ({f"labels slightly above {HIGH:g}, taken as {HIGH:g}": above} if above else {})
