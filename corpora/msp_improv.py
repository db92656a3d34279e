"""MSP-IMPROV, of the University of Texas at Dallas."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from corpora.tree import find, join, leave_session_out, numbers
from data import Notes, Utterance, reading

SESSIONS = 6
TURN = re.compile(
    r"UTD-(IMPROV-S\d\d\w-([FM]\d\d)-\w-\w+)\.avi\s*;\s*(\w)\s*;"
    r"\s*A:([\d.]+|NaN)\s*;\s*V:([\d.]+|NaN)\s*;\s*D:([\d.]+|NaN)\s*;"
)


def read_msp_improv(folder: Path, fold: int, flip_activation: bool = True) -> tuple[list[Utterance], Notes]:
    """MSP-IMPROV: labels 1..5, activation as 6 - A if it is flipped. Splits: see `leave_session_out`.

    Laboratories differ on whether it was stored from high to low, so it is noted if angry turns are not more active.
    """
    source = find(folder, "Evalution.txt", "Evaluation.txt")
    activations = defaultdict(list)  # by category

    def rows() -> Iterator[Utterance]:
        with reading(source, "label file", errors="replace") as file:
            for line, text in enumerate(file, 1):
                if not text.startswith("UTD-"):
                    continue  # a rater, or nothing
                if not (match := TURN.match(text)):
                    raise ValueError(f"{source}: line {line}: expected UTD-IMPROV-...avi; N; A:3.0; V:3.0; D:3.0; ...")
                turn, speaker, category, *cells = match.groups()
                labels = numbers(cells, f"{source}: line {line}")
                if "activation" in labels:
                    labels["activation"] = 6 - labels["activation"] if flip_activation else labels["activation"]
                    activations[category].append(labels["activation"])
                split = leave_session_out(fold, SESSIONS, int(speaker[1:]), speaker[0])
                yield Utterance(f"MSP-{turn}.wav", split, speaker, labels)

    utterances, notes = join(source, rows(), [folder])
    angry, neutral = (fmean(activations[category] or [math.nan]) for category in "AN")
    if angry <= neutral:
        means, other = f"means {angry:.2f} and {neutral:.2f}", str(not flip_activation).lower()
        notes[f"angry turns are not more active than neutral ones ({means}): try flip_activation: {other}"] = []
    return utterances, notes
