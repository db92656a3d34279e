"""The corpora that can be named in a configuration, and the one function that reads them. No audio is opened.

Splits are those that were published, else whole sessions or speakers, so that no speaker is in two of them.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from corpora.demo import synthesize_demo
from corpora.emotale import agreement, read_emotale
from corpora.iemocap import read_iemocap
from corpora.msp_improv import read_msp_improv
from corpora.msp_podcast import read_msp_podcast
from corpora.muse import read_muse
from data import Notes, Utterance, read_manifest, require_used


class Corpus(NamedTuple):
    """How a corpus is read from its folder: `reader(folder, **keys)` with those of its `keys` that are set."""

    reader: Callable[..., tuple[list[Utterance], Notes]]
    label_range: tuple[float, float]
    keys: tuple[str, ...] = ()  # of the configuration, beside data_root
    folds: int = 0  # parts of which each is held out once for testing; 0: the split is fixed
    agreement: Callable[[Path], dict[str, list[float]]] | None = None  # of each rater with the mean of the others, CCC


CORPORA = {
    "demo": Corpus(lambda folder: (read_manifest(synthesize_demo(folder)), {}), (1.0, 7.0)),
    "msp-podcast": Corpus(read_msp_podcast, (1.0, 7.0), ("test_set",)),
    "emotale": Corpus(read_emotale, (1.0, 5.0), ("fold",), folds=6, agreement=agreement),
    "iemocap": Corpus(read_iemocap, (1.0, 5.0), ("fold", "dev_set"), folds=5),
    "msp-improv": Corpus(read_msp_improv, (1.0, 5.0), ("fold", "flip_activation"), folds=6),
    "muse": Corpus(read_muse, (1.0, 9.0)),
}


def read(name: str, keys: dict[str, str | int | None]) -> tuple[list[Utterance], Notes]:
    """The utterances of a corpus, and what a user should know of them: what was left out or is odd, with the files.

    Raises FileNotFoundError or ValueError for a name, a key or files that are not as expected.
    """
    if name not in CORPORA:
        names = ["manifest", *CORPORA]
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"corpus: {name!r} is unknown, expected one of {', '.join(names)}{hint}")
    corpus = CORPORA[name]
    require_used(name, keys, ["data_root", *corpus.keys])
    given = {key: value for key, value in keys.items() if value is not None}
    root = given.pop("data_root", "data/demo" if name == "demo" else None)
    if root is None:
        raise ValueError(f"data_root: found nothing; set it to the folder of corpus {name!r}")
    if name != "demo" and not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such folder; check the key `data_root`")
    if corpus.folds and (fold := keys.get("fold")) not in range(1, corpus.folds + 1):
        raise ValueError(f"fold: found {fold!r}, expected 1 to {corpus.folds}: the part that is held out for testing")
    return corpus.reader(Path(root), **given)
