"""What the reader of EmoTale promises, on a tree of the same form with ratings made here."""

import csv
from pathlib import Path

import audmetric
import numpy as np
import pytest
import soundfile
from processes import python

import data
from corpora import emotale
from corpora.published import CORPORA

ROOT = Path(__file__).parents[1]
NUMBERS = [f"{number:03d}" for number in (1, *range(3, 20))]  # there is no speaker 002


def make(root: Path, sound: bool = False) -> Path:
    """18 speakers, of whom four speak Danish alone; two emotions and one sentence each; three raters."""
    rng = np.random.default_rng(0)
    (root / "wav").mkdir(parents=True)
    rows = []
    for speaker in NUMBERS:
        for language in ("DK", "EN") if speaker not in ("014", "015", "018", "019") else ("DK",):
            for emotion in "AS":
                file = f"{language}_{speaker}_{emotion}_1.wav"
                truth = rng.uniform(1, 5, 3)
                raters = [np.clip(np.round(2 * (truth + rng.normal(0, 0.5, 3))) / 2, 1, 5) for _ in range(3)]
                rows.append([file, *(cell for rater in raters for cell in (*rater, emotion)), emotion])
                samples = 0.1 * rng.standard_normal(4800) if sound else np.zeros(0)
                soundfile.write(root / "wav" / file, samples, 48_000)
    header = ["file", *(f"a{r}_{kind}" for r in (1, 2, 3) for kind in ("A", "V", "D", "cat")), "gt_emotion"]
    with open(root / "annotations.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return root


@pytest.fixture
def tree(tmp_path) -> Path:
    return make(tmp_path / "EmoTale")


def edit(tree: Path, old: str, new: str) -> None:
    path = tree / "annotations.csv"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def rows(tree: Path) -> list[dict[str, str]]:
    with open(tree / "annotations.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("fold", range(1, 7))
def test_a_fold_is_three_speakers_and_the_next_fold_develops(tree, fold):
    """By their numbers, in both languages; after the last fold comes the first."""
    utterances = data.load_corpus("emotale", str(tree), fold=fold)
    assert len(utterances) == 64
    speakers = {split: {u.speaker for u in utterances if u.split == split} for split in data.SPLITS}
    parts = [set(NUMBERS[at : at + 3]) for at in range(0, 18, 3)]
    assert speakers["test"] == parts[fold - 1] and speakers["dev"] == parts[fold % 6]
    assert speakers["train"] == set(NUMBERS) - speakers["test"] - speakers["dev"]
    data.check_labels(utterances, ["activation", "valence", "dominance"], CORPORA["emotale"].label_range)


def test_every_utterance_is_tested_once_over_the_folds(tree):
    assert CORPORA["emotale"].folds == 6
    tested = [
        u.path for fold in range(1, 7) for u in data.load_corpus("emotale", str(tree), fold=fold) if u.split == "test"
    ]
    assert len(tested) == len(set(tested)) == 64


def test_labels_are_the_mean_of_the_raters(tree):
    """Arousal, valence and dominance by name."""
    (first,) = [u for u in data.load_corpus("emotale", str(tree), fold=1) if Path(u.path).name == "DK_001_A_1.wav"]
    row = next(row for row in rows(tree) if row["file"] == "DK_001_A_1.wav")
    for target, letter in (("activation", "A"), ("valence", "V"), ("dominance", "D")):
        assert first.labels[target] == pytest.approx(np.mean([float(row[f"a{r}_{letter}"]) for r in (1, 2, 3)]))


def test_the_agreement_of_the_raters_is_that_of_another_implementation(tree):
    """Each against the mean of the two others, over all clips."""
    found = emotale.agreement(tree)
    for target, letter in (("activation", "A"), ("valence", "V"), ("dominance", "D")):
        ratings = np.array([[float(row[f"a{r}_{letter}"]) for r in (1, 2, 3)] for row in rows(tree)])
        for rater in range(3):
            others = np.delete(ratings, rater, axis=1).mean(axis=1)
            expected = audmetric.concordance_cc(ratings[:, rater], others)
            assert found[target][rater] == pytest.approx(expected, abs=1e-5)


def test_a_clip_without_ratings_is_left_out_and_a_rater_who_gave_none_is_not_counted(tree):
    """The note names the clip; the labels of the other are the mean of two raters."""
    row = next(row for row in rows(tree) if row["file"] == "DK_003_A_1.wav")
    cells = ",".join(row.values())
    edit(tree, cells, "DK_003_A_1.wav" + "," * (len(row) - 1))
    other = next(row for row in rows(tree) if row["file"] == "DK_001_A_1.wav")
    without = other | {"a3_A": "", "a3_V": "", "a3_D": ""}
    edit(tree, ",".join(other.values()), ",".join(without.values()))
    utterances, notes = data.read_corpus("emotale", str(tree), fold=1)
    assert notes == {"audio without activation or valence, left out": ["DK_003_A_1.wav"]}
    (found,) = [u for u in utterances if Path(u.path).name == "DK_001_A_1.wav"]
    assert found.labels["valence"] == pytest.approx((float(other["a1_V"]) + float(other["a2_V"])) / 2)
    assert len(emotale.agreement(tree)["valence"]) == 3


def test_missing_clips_are_named_and_none_at_all_is_an_error(tree):
    """The error tells where the corpus comes from, and to cite it."""
    (tree / "wav" / "DK_001_A_1.wav").unlink()
    _, notes = data.read_corpus("emotale", str(tree), fold=2)
    assert notes == {"labels without audio, left out": ["DK_001_A_1.wav"]}
    for path in (tree / "wav").iterdir():
        path.unlink()
    with pytest.raises(
        ValueError, match=r"no labels of the 0 WAV files .*github\.com/snehadas/EmoTale; clone it and cite"
    ):
        data.load_corpus("emotale", str(tree), fold=1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a3_V", "r3_V", r"no column a3_V; found .*: an unknown version"),
        ("DK_001_A_1.wav", "clip1.wav", r"line 2: file 'clip1\.wav', expected a name such as DK_004_A_5\.wav"),
        ("DK_001_S_1.wav", "DK_001_A_1.wav", r"line 3: DK_001_A_1\.wav is there twice"),
        ("_019_", "_018_", r"is there twice: an unknown version"),
        ("_019_A", "_002_A", r"annotations of 19 speakers, expected 18: an unknown version"),
    ],
)
def test_annotations_of_another_version(tree, old, new, message):
    """One error with the file and the line."""
    edit(tree, old, new)
    with pytest.raises(ValueError, match=message):
        data.load_corpus("emotale", str(tree), fold=1)


@pytest.mark.parametrize("value", ["5.5", "0.5", "3.2", "high"])
def test_a_rating_that_is_off_the_scale(tree, value):
    row = rows(tree)[0]
    edit(tree, ",".join(row.values()), ",".join((row | {"a2_V": value}).values()))
    with pytest.raises(
        ValueError, match=r"line 2: (rating .*, expected 1 to 5 in halves|valence 'high' is not a number)"
    ):
        data.load_corpus("emotale", str(tree), fold=1)


@pytest.mark.parametrize("fold", [None, 0, 7])
def test_a_fold_that_there_is_not(tree, fold):
    with pytest.raises(ValueError, match=rf"fold: found {fold}, expected 1 to 6"):
        data.load_corpus("emotale", str(tree), fold=fold)


def test_a_folder_without_the_corpus_says_where_it_is(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"looked for annotations\.csv, found nothing; .*github\.com/snehadas/EmoTale"
    ):
        data.load_corpus("emotale", str(tmp_path), fold=1)


def test_the_check_reports_the_agreement_of_the_raters(tmp_path):
    """Through the command: the ceiling of every score."""
    tree = make(tmp_path / "EmoTale", sound=True)
    words = [
        str(ROOT / "configs" / "logmel.yaml"),
        "corpus=emotale",
        f"data_root={tree}",
        "fold=1",
        "--out",
        str(tmp_path / "out"),
    ]
    done = python("-m", "corpora.check", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    low, *_, high = sorted(emotale.agreement(tree)["valence"])
    assert f"valence 0.{100 * sum(emotale.agreement(tree)['valence']) / 3:.0f} ({low:.2f} to {high:.2f})" in done.stdout
    assert "Raters, each against the mean of the others, CCC: activation" in done.stdout
