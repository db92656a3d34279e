"""What the readers in `corpora` and the check promise, on trees made here as the corpora are published."""

import csv
import io
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import forget_plots, speech_like
from processes import python

import data
import run
from config import load_config, make_config
from corpora import check
from corpora import published as corpora

ROOT = Path(__file__).parents[1]


def touch(path: Path) -> Path:
    """An empty file: reading a corpus opens no audio."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def write(path: Path, lines: list[str], newline: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(newline.join([*lines, ""]).encode())
    return path


PODCAST_HEADER = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"
PODCAST_ROWS = [  # number, category, activation, valence, dominance, speaker, split
    ("0001_0008", "N", "2.2", "4.0", "2.6", "30", "Test1"),
    ("0002_0001", "A", "6.4", "1.6", "5.8", "31", "Train"),
    ("0002_0002", "X", "5.0", "3.2", "4.4", "Unknown", "Train"),
    ("0003_0001", "H", "4.8", "5.6", "4.2", "32", "Development"),
    ("0003_0002", "S", "2.0", "2.4", "2.8", "Unknown", "Development"),
    ("0004_0001", "O", "3.0", "3.4", "3.6", "33", "Test2"),
]


def podcast(
    root: Path, folder="Labels", file="labels_consensus.csv", development="Development", audio="Audios", newline="\n"
) -> Path:
    rows = [[*row[:6], "Female", row[6].replace("Development", development)] for row in PODCAST_ROWS]
    for number, *_ in rows:
        touch(root / audio / f"MSP-PODCAST_{number}.wav")
    write(
        root / folder / file, [PODCAST_HEADER, *(",".join([f"MSP-PODCAST_{r[0]}.wav", *r[1:]]) for r in rows)], newline
    )
    return root


def add_podcast_row(root: Path, row: str) -> None:
    with open(root / "Labels" / "labels_consensus.csv", "a", encoding="utf-8") as file:
        file.write(row + "\n")


def iemocap(root: Path) -> Path:
    """Per session two dialogues, in each a turn of both speakers, whoever gave the dialogue its letter."""
    header = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]"
    for session in range(1, 6):
        folder = root / f"Session{session}"
        for dialogue in (f"Ses0{session}F_impro01", f"Ses0{session}M_script01_1b"):
            lines = [header, ""]
            for letter, labels in (("F", "[1.5000, 2.5000, 3.5000]"), ("M", "[2.0000, 5.5000, 4.6667]")):
                turn = f"{dialogue}_{letter}000"
                lines += [
                    f"[6.2901 - 8.2357]\t{turn}\tneu\t{labels}",
                    "C-E2:\tNeutral;\t()",
                    "A-E3:\tval 3; act 2;",
                    "",
                ]
                wav = touch(folder / "sentences" / "wav" / dialogue / f"{turn}.wav")
                touch(wav.with_name(f"._{wav.name}"))
            emotions = folder / "dialog" / "EmoEvaluation"
            write(emotions / f"{dialogue}.txt", lines, newline="\r\n")
            write(emotions / f"._{dialogue}.txt", ["\0\5\26\7"])
            write(emotions / "Categorical" / f"{dialogue}_e2_cat.txt", [f"{dialogue}_F000\t:Neutral state; ()"])
    return root


def improv(root: Path, source="Evalution.txt", below="", angry=1.5, newline="\n") -> Path:
    blocks = []
    for session in range(1, 7):
        for speaker in (f"F0{session}", f"M0{session}"):
            turns = [("S01A", "S", "A", f"{angry:f}", "1.500000", "4.000000"), ("S02N", "R", "N", "3.0", "3.5", "NaN")]
            for sentence, scenario, category, *values in turns:
                name = f"IMPROV-{sentence}-{speaker}-{scenario}-FM01"
                touch(root / below / f"session{session}" / sentence / scenario / f"MSP-{name}.wav")
                a, v, d = values
                blocks += [f"UTD-{name}.avi; {category}; A:{a}; V:{v}; D:{d} ; N:4.200000;"]
                blocks += ["student-p8; Neutral; Concerned,; A:3.000000; V:3.000000; D:NaN; N:5.000000;", ""]
    unrated = "UTD-IMPROV-S03H-F01-P-MF02.avi; X; A:NaN; V:NaN; D:NaN ; N:NaN;"
    touch(root / below / "session1" / "S03H" / "P" / "MSP-IMPROV-S03H-F01-P-MF02.wav")
    write(root / source, [*blocks, unrated, ""], newline)
    return root


def muse(root: Path, below="SurveyInformation") -> Path:
    header = (
        "Sentence_name,Duration,Gender,Type,Ques_Type,Activation_Mean,Activation_SD,Valence_Mean,Valence_SD,"
        "Activation_Annotation,Valence_Annotation,C_Activation_Mean,C_Activation_SD,C_Valence_Mean,C_Valence_SD,"
        "C_Activation_Annotation,C_Valence_Annotation,S_Activation,S_Valence"
    )
    rows = [header]
    for speaker in range(1, 29):
        for kind, folder in (("NS", "NotStressed"), ("S", "Stressed")):
            name = f"{speaker:02d}_{kind}_1_0.wav"
            touch(root / folder / "Audio" / f"{folder} Question Monologue Audio" / name)
            rows.append(f"{name},4.5,F,{kind},P,6.5,1.1,3.25,0.9,6;7,3;4,8.0,1,8.5,1,8;8,8;9,5,5")
    write(root / below / "Emotion data from crowdsourcing (C is when annotators had access).csv", rows, "\r\n")
    return root


def disjoint(utterances: list[data.Utterance]) -> dict[str, set[str]]:
    """The named speakers of each split, of whom none may be in two."""
    speakers = {split: {u.speaker for u in utterances if u.split == split} - {"Unknown"} for split in data.SPLITS}
    assert all(speakers.values())
    assert sum(map(len, speakers.values())) == len(set.union(*speakers.values()))
    assert all(Path(utterance.path).is_file() for utterance in utterances)
    assert len({utterance.path for utterance in utterances}) == len(utterances)
    return speakers


def assert_right(utterances: list[data.Utterance], targets: list[str], name: str) -> None:
    """Nothing is wrong with the labels, but that these small trees have few."""
    problems = data.label_problems(utterances, targets, corpora.CORPORA[name].label_range)
    assert [problem for problem in problems if problem.kind != "constant labels"] == []


# ---------------------------------------------------------------- MSP-Podcast


@pytest.mark.parametrize(
    "spelling",
    [
        {"file": "labels_concensus.csv", "development": "Validation"},
        {"folder": "labels", "file": "labels_concensus.csv", "development": "Validation", "newline": "\r\n"},
        {"folder": "label", "development": "Development", "audio": "Audio"},
        {},
    ],
)
def test_msp_podcast_in_every_spelling(tmp_path, spelling):
    """1.6 to 2.0 name folder, file and split in their ways; labels go by column, and Test1 is the test set."""
    utterances = data.load_corpus("msp-podcast", str(podcast(tmp_path, **spelling)))
    assert [u.split for u in utterances] == ["test", "train", "train", "dev", "dev"]
    assert disjoint(utterances) == {"train": {"31"}, "dev": {"32"}, "test": {"30"}}
    assert utterances[1].labels == {"activation": 6.4, "valence": 1.6, "dominance": 5.8}
    assert_right(utterances, ["activation", "valence"], "msp-podcast")


def test_another_test_set_of_msp_podcast_can_be_chosen(tmp_path):
    """Test2 in the place of Test1, and an error for one without labels or of another name."""
    root = str(podcast(tmp_path))
    chosen = data.load_corpus("msp-podcast", root, test_set="Test2")
    assert [u.speaker for u in chosen if u.split == "test"] == ["33"] and len(chosen) == 5
    with pytest.raises(ValueError, match=r"test_set: .*labels_consensus\.csv has no labels of Test3; choose another"):
        data.load_corpus("msp-podcast", root, test_set="Test3")
    with pytest.raises(ValueError, match="test_set: found 'test1', expected one of Test1, Test2, Test3"):
        data.load_corpus("msp-podcast", root, test_set="test1")


def test_test3_may_be_listed_without_labels(tmp_path):
    """Rows with empty cells and files that no row names are left out; neither is an error."""
    root = podcast(tmp_path)
    touch(root / "Audios" / "MSP-PODCAST_test3_0001.wav")
    touch(root / "Audios" / "MSP-PODCAST_test3_0002.wav")
    add_podcast_row(root, "MSP-PODCAST_test3_0001.wav,,,,,,,Test3")
    utterances, notes = data.read_corpus("msp-podcast", str(root))
    assert len(utterances) == 5
    assert notes == {
        "audio without activation or valence, left out": ["MSP-PODCAST_test3_0001.wav"],
        "audio that the labels do not name, left out": ["MSP-PODCAST_test3_0002.wav"],
    }


def test_a_listed_file_that_does_not_exist_is_left_out_and_said_once(tmp_path, capsys):
    """As in MSP-Podcast 2.0; the second reading in a process says nothing."""
    root = podcast(tmp_path)
    add_podcast_row(root, "MSP-PODCAST_9999_0001.wav,N,4,4,4,31,Male,Train")
    assert len(data.load_corpus("msp-podcast", str(root))) == 5
    line = f"warning: {root}: labels without audio, left out: 1 (MSP-PODCAST_9999_0001.wav)\n"
    assert capsys.readouterr().err == line
    data.load_corpus("msp-podcast", str(root))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("MSP-PODCAST_0001_0008.wav,N,4,4,4,31,Male,Test9", "line 8: split 'Test9', expected .*an unknown version"),
        ("MSP-PODCAST_0001_0008.wav,N,high,4,4,31,Male,Train", "line 8: activation 'high' is not a number"),
        ("MSP-PODCAST_0001_0008.wav,N,4", "line 8: 3 cells, expected 8"),
    ],
)
def test_a_label_file_of_msp_podcast_that_is_not_as_published(tmp_path, row, message):
    """The file, the line, what was found and what was expected."""
    root = podcast(tmp_path)
    add_podcast_row(root, row)
    with pytest.raises(ValueError, match=rf"labels_consensus\.csv: {message}"):
        data.load_corpus("msp-podcast", str(root))


def test_a_label_file_without_a_column_is_of_an_unknown_version(tmp_path):
    source = podcast(tmp_path) / "Labels" / "labels_consensus.csv"
    source.write_text(source.read_text().replace("EmoAct", "Arousal"))
    with pytest.raises(ValueError, match=r"no column EmoAct; found .*'Arousal'.*: an unknown version"):
        data.load_corpus("msp-podcast", str(tmp_path))


# ---------------------------------------------------------------- IEMOCAP


@pytest.mark.parametrize("fold", range(1, 6))
def test_iemocap_holds_a_session_out(tmp_path, fold):
    """It is the test set; the next session, after the last the first, is the development set."""
    utterances = data.load_corpus("iemocap", str(iemocap(tmp_path)), fold=fold)
    assert len(utterances) == 20
    speakers = disjoint(utterances)
    following = fold % 5 + 1
    assert speakers["test"] == {f"Ses0{fold}F", f"Ses0{fold}M"}
    assert speakers["dev"] == {f"Ses0{following}F", f"Ses0{following}M"}
    assert len(speakers["train"]) == 6


def test_iemocap_can_part_the_two_speakers_of_the_session(tmp_path):
    """Then four sessions are left to train on."""
    speakers = disjoint(data.load_corpus("iemocap", str(iemocap(tmp_path)), fold=2, dev_set="speaker"))
    assert speakers["dev"] == {"Ses02F"} and speakers["test"] == {"Ses02M"} and len(speakers["train"]) == 8
    with pytest.raises(ValueError, match="dev_set: found 'turn', expected session or speaker"):
        data.load_corpus("iemocap", str(tmp_path), fold=2, dev_set="turn")


def test_labels_of_iemocap_are_valence_activation_dominance(tmp_path):
    """In this order in the file; the speaker is the turn's last letter, not the dialogue's; slips over 5 are 5."""
    utterances, notes = data.read_corpus("iemocap", str(iemocap(tmp_path)), fold=1)
    found = {Path(u.path).stem: u for u in utterances}
    woman, man = found["Ses01M_script01_1b_F000"], found["Ses01F_impro01_M000"]
    assert (woman.speaker, man.speaker) == ("Ses01F", "Ses01M")
    assert woman.labels == {"valence": 1.5, "activation": 2.5, "dominance": 3.5}
    assert man.labels == {"valence": 2.0, "activation": 5.0, "dominance": 4.6667}
    assert_right(utterances, ["activation", "valence", "dominance"], "iemocap")
    ((note, files),) = notes.items()
    assert note == "labels slightly above 5, taken as 5" and len(files) == 10


def test_a_label_far_above_the_scale_of_iemocap_stays_and_is_an_error(tmp_path):
    """A slip of half a point is one; more would be another scale."""
    source = iemocap(tmp_path) / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
    source.write_text(source.read_text().replace("5.5000", "5.6000"))
    utterances = data.load_corpus("iemocap", str(tmp_path), fold=1)
    with pytest.raises(ValueError, match=r"activation is 5\.6, outside `label_range` 1 to 5"):
        data.check_labels(utterances, ["activation"], corpora.CORPORA["iemocap"].label_range)


def test_a_label_file_of_iemocap_without_a_turn_is_an_error(tmp_path):
    write(iemocap(tmp_path) / "Session3" / "dialog" / "EmoEvaluation" / "Ses03F_impro09.txt", ["nothing"])
    with pytest.raises(ValueError, match=r"Ses03F_impro09\.txt: no turn, expected lines \[start - end\]"):
        data.load_corpus("iemocap", str(tmp_path), fold=1)


# ---------------------------------------------------------------- MSP-IMPROV


@pytest.mark.parametrize(("source", "below"), [("Evalution.txt", ""), ("Evaluation.txt", "Audio")])
@pytest.mark.parametrize("fold", [1, 6])
def test_msp_improv_in_both_layouts(tmp_path, fold, source, below, capsys):
    """Six folds by session; activation is turned round, NaN dominance is none, a turn without ratings is left out."""
    root = improv(tmp_path, source, below, newline="\r\n" if below else "\n")
    utterances = data.load_corpus("msp-improv", str(root), fold=fold)
    assert len(utterances) == 24
    speakers = disjoint(utterances)
    assert speakers["test"] == {f"F0{fold}", f"M0{fold}"}
    assert speakers["dev"] == {f"F0{fold % 6 + 1}", f"M0{fold % 6 + 1}"}
    angry, neutral = utterances[:2]
    assert Path(angry.path).name == "MSP-IMPROV-S01A-F01-S-FM01.wav"
    assert angry.labels == {"activation": 4.5, "valence": 1.5, "dominance": 4.0}
    assert neutral.labels == {"activation": 3.0, "valence": 3.5}
    error = capsys.readouterr().err
    assert error.count("warning") == 1 and "left out: 1 (MSP-IMPROV-S03H-F01-P-MF02.wav)" in error
    assert_right(utterances, ["activation", "valence"], "msp-improv")


@pytest.mark.parametrize(
    ("stored", "flip", "warned"), [(1.5, None, 0), (1.5, False, 1), (4.5, True, 1), (4.5, False, 0)]
)
def test_the_direction_of_activation_is_an_option_and_anger_shows_a_wrong_one(tmp_path, stored, flip, warned):
    """Where angry turns are not the more active, the warning names the key and its other value."""
    root = improv(tmp_path, angry=stored)
    utterances, notes = data.read_corpus("msp-improv", str(root), fold=1, flip_activation=flip)
    assert utterances[0].labels["activation"] == (stored if flip is False else 6 - stored)
    other = str(flip is False).lower()
    expected = f"angry turns are not more active than neutral ones (means 1.50 and 3.00): try flip_activation: {other}"
    assert [note for note in notes if "angry" in note] == [expected] * warned


def test_a_line_of_msp_improv_that_is_not_as_published_is_an_error(tmp_path):
    write(improv(tmp_path) / "Evalution.txt", ["UTD-IMPROV-S01A-F01-S-FM01.avi; N; 3; 3; 3"])
    with pytest.raises(ValueError, match=r"Evalution\.txt: line 1: expected UTD-IMPROV-\.\.\.avi; N; A:3\.0"):
        data.load_corpus("msp-improv", str(tmp_path), fold=1)


# ---------------------------------------------------------------- MuSE


@pytest.mark.parametrize("below", ["SurveyInformation", "Survey Information (Questions, Data etc)"])
def test_muse_is_split_by_speakers(tmp_path, below):
    """28 speakers in 18, 5 and 5; the labels are those of sentences in random order, not in context (C_)."""
    utterances = data.load_corpus("muse", str(muse(tmp_path, below)))
    assert len(utterances) == 56
    speakers = disjoint(utterances)
    assert [len(speakers[split]) for split in data.SPLITS] == [18, 5, 5]
    assert speakers["test"] == {"05", "10", "15", "20", "25"}
    assert all(u.labels == {"activation": 6.5, "valence": 3.25} for u in utterances)
    assert_right(utterances, ["activation", "valence"], "muse")


# ---------------------------------------------------------------- keys and places


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "iemocap", "root": "."}, "fold: found None, expected 1 to 5: the part that is held out for testing"),
        ({"name": "iemocap", "root": ".", "fold": 6}, "fold: found 6, expected 1 to 5"),
        ({"name": "msp-improv", "root": ".", "fold": 0}, "fold: found 0, expected 1 to 6"),
        ({"name": "msp-podcast", "root": ".", "fold": 1}, "fold: corpus 'msp-podcast' has no use for it, found 1"),
        ({"name": "iemocap", "root": ".", "test_set": "Test1"}, "test_set: corpus 'iemocap' has no use for it"),
        ({"name": "msp-improv", "root": ".", "dev_set": "speaker"}, "dev_set: corpus 'msp-improv' has no use"),
        ({"name": "muse", "root": ".", "flip_activation": False}, "flip_activation: corpus 'muse' has no use"),
        ({"name": "muse", "manifest": "m.csv"}, "manifest: corpus 'muse' has no use for it, found 'm.csv'"),
        ({"name": "muse"}, "data_root: found nothing; set it to the folder of corpus 'muse'"),
    ],
)
def test_keys_that_a_corpus_needs_or_would_ignore(arguments, message):
    """A fold that there is not, and no key without effect."""
    with pytest.raises(ValueError, match=message):
        data.load_corpus(**arguments)


@pytest.mark.parametrize("name", ["msp-podcast", "iemocap", "msp-improv", "muse"])
def test_a_wrong_root_says_what_was_looked_for_and_what_is_there(tmp_path, name):
    """For the folder above, an empty one, and one that does not exist."""
    fold = {"fold": 1} if corpora.CORPORA[name].folds else {}
    touch(tmp_path / "downloads" / "a.zip")
    looked_for = {"msp-podcast": "Audios or Audio", "iemocap": "Session1", "msp-improv": "Evalution.txt or Evaluation"}
    message = f"looked for {looked_for.get(name, 'a folder with `Emotion data from')}.*, found "
    with pytest.raises(FileNotFoundError, match=message + r"downloads; check the key `data_root`"):
        data.load_corpus(name, str(tmp_path), **fold)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=message + "nothing"):
        data.load_corpus(name, str(tmp_path / "empty"), **fold)
    with pytest.raises(FileNotFoundError, match="absent: no such folder; check the key `data_root`"):
        data.load_corpus(name, str(tmp_path / "absent"), **fold)


@pytest.mark.parametrize("make", [podcast, iemocap, improv, muse])
def test_labels_without_any_audio_are_an_error(tmp_path, make):
    """Not an empty corpus."""
    name = {"podcast": "msp-podcast", "improv": "msp-improv"}.get(make.__name__, make.__name__)
    for wav in make(tmp_path).rglob("*.wav"):
        wav.unlink()
    fold = {"fold": 1} if corpora.CORPORA[name].folds else {}
    with pytest.raises(ValueError, match=r"no labels of the 0 WAV files below .*\(\d+ names without a file"):
        data.load_corpus(name, str(tmp_path), **fold)


def test_the_configuration_reaches_the_corpus(tmp_path):
    """Every key of a corpus is one of `Config`, and `run.corpus_keys` passes them all on."""

    def load(keys: dict) -> list[data.Utterance]:
        return data.load_corpus(**run.corpus_keys(make_config(keys, "test")))

    keys = {"corpus": "iemocap", "data_root": str(iemocap(tmp_path)), "fold": 3, "dev_set": "speaker"}
    utterances = load(keys)
    assert {u.speaker for u in utterances if u.split == "test"} == {"Ses03M"}
    improv_keys = {"corpus": "msp-improv", "data_root": str(improv(tmp_path / "i", angry=4.5)), "fold": 1}
    flipped = load(improv_keys)
    kept = load(improv_keys | {"flip_activation": False})
    assert (flipped[0].labels["activation"], kept[0].labels["activation"]) == (1.5, 4.5)
    podcast_keys = {"corpus": "msp-podcast", "data_root": str(podcast(tmp_path / "p")), "test_set": "Test2"}
    utterances = load(podcast_keys)
    assert [u.speaker for u in utterances if u.split == "test"] == ["33"]


def test_files_are_found_by_listing_folders(tmp_path, monkeypatch):
    """Never by asking for each: 264,705 questions to a file server take minutes."""
    root = str(podcast(tmp_path))
    monkeypatch.setattr(os.path, "exists", lambda path: pytest.fail(f"asked for {path}"))
    monkeypatch.setattr(os.path, "isfile", lambda path: pytest.fail(f"asked for {path}"))
    assert len(data.load_corpus("msp-podcast", root)) == 5


# ---------------------------------------------------------------- corpora.check


def sound(seconds: float = 0.4, seed: int = 0, rate: int = 16_000, level: float = 0.5) -> np.ndarray:
    waveform = speech_like(int(seconds * rate), seed).numpy()
    return level * waveform / np.abs(waveform).max()


@pytest.fixture
def good(tmp_path) -> Path:
    """A corpus with nothing wrong: the folder of a manifest of 8 utterances by 8 speakers."""
    rows = []
    for number, split in enumerate(["train"] * 4 + ["dev", "test"] * 2):
        soundfile.write(tmp_path / f"{number}.wav", sound(seed=number, rate=44_100), 44_100)
        rows.append(f"{number}.wav,{split},s{number},{2 + 0.5 * number},{6 - 0.5 * number}")
    write(tmp_path / "manifest.csv", ["path,split,speaker,activation,valence", *rows])
    return tmp_path


def add(folder: Path, row: str) -> None:
    with open(folder / "manifest.csv", "a", encoding="utf-8") as file:
        file.write(row + "\n")


def unpadded(report: str) -> str:
    """A report whose tables have a blank on either side of a cell."""
    return re.sub(r" +\|", " |", report)


def report_on(keys: list[str], out: Path | None = None) -> tuple[int, str]:
    """Exit code and report, through the function behind the command."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        code = check.check_corpus(str(ROOT / "configs" / "logmel.yaml"), keys, str(out) if out else None)
    return code, unpadded(printed.getvalue())


def check_manifest(folder: Path, *more: str) -> tuple[int, str, list[dict[str, str]]]:
    """Exit code, report and problems of a manifest."""
    out = folder / "out"
    keys = ["corpus=manifest", f"manifest={folder / 'manifest.csv'}", "label_range=[1, 7]", *more]
    code, report = report_on(keys, out)
    with open(out / "problems.csv", newline="", encoding="utf-8") as file:
        return code, report, list(csv.DictReader(file))


def test_a_good_corpus_is_counted_and_drawn(good):
    """The numbers of every split, of every speaker, and a picture in two formats."""
    pytest.importorskip("matplotlib")
    code, report, problems = check_manifest(good)
    assert (code, problems) == (0, [])
    assert "No problem was found." in report
    assert (
        "| train | 4 | 4 | 1 (1 to 1) | 0.00 | 0.4 (0.4 to 0.4) | 2.75 (2.00 to 3.50) | 5.25 (4.50 to 6.00) |" in report
    )
    assert "| all | 8 | 8 |" in report
    assert unpadded((good / "out" / "report.md").read_text(encoding="utf-8")).strip() in report
    speakers = (good / "out" / "speakers.csv").read_text(encoding="utf-8").splitlines()
    assert len(speakers) == 9 and speakers[1] == "train,s0,1,0.0001"
    assert (good / "out" / "labels.png").read_bytes().startswith(b"\x89PNG")
    assert (good / "out" / "labels.pdf").read_bytes().startswith(b"%PDF")


def write_wav(waveform, rate=16_000):
    return lambda path: soundfile.write(path, waveform, rate)


PROBLEMS = {  # kind: exit code, how to make the file, the row of the manifest, what is said
    "missing": (2, lambda path: None, "bad.wav,train,s9,4,4", "no such audio file"),
    "unreadable": (2, lambda path: path.write_text("text" * 99), "bad.wav,train,s9,4,4", "not audio that can be read"),
    "too short": (2, write_wav(sound(0.02)), "bad.wav,train,s9,4,4", "320 samples at 16 kHz, expected at least 400"),
    "too long": (1, write_wav(sound(61.0)), "bad.wav,train,s9,4,4", "61.0 s, expected at most 60 s"),
    "silent": (1, write_wav(0.2 + np.zeros(8000)), "bad.wav,train,s9,4,4", "silent: every sample is 0.2"),
    "clipped": (1, write_wav(np.clip(sound(level=3), -1, 1)), "bad.wav,train,s9,4,4", "% of the samples are at full"),
    "duplicate": (1, write_wav(sound(rate=44_100), 44_100), "bad.wav,train,s9,4,4", "in train, sounds as .*0.wav"),
    "duplicate in two splits": (
        2,
        write_wav(sound(rate=44_100), 44_100),
        "bad.wav,test,s9,4,4",
        "in test, .* in train",
    ),
    "no label": (2, write_wav(sound(seed=9)), "bad.wav,train,s9,4,", "no label for target 'valence'"),
    "label outside the range": (2, write_wav(sound(seed=9)), "bad.wav,train,s9,4,7.5", "valence is 7.5, outside"),
    "speaker overlap": (2, write_wav(sound(seed=9)), "bad.wav,test,s0,4,4", "speaker 's0' is in train and test"),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_each_problem_is_named_with_its_file_and_its_severity(good, undrawn, kind):
    """One problem among good files, and nothing else is found."""
    code, make, row, detail = PROBLEMS[kind]
    make(good / "bad.wav")
    add(good, row)
    found, report, (problem,) = check_manifest(good)
    assert found == code
    assert problem["severity"] == ("error" if code == 2 else "warning") and problem["problem"] == kind
    assert problem["file"] == ("" if kind == "speaker overlap" else str(good / "bad.wav"))
    assert f"| {problem['severity']} | {kind} | 1 |" in report
    assert re.search(detail, problem["detail"])


def test_silence_is_no_duplicate_and_a_peak_is_no_clipping(good, undrawn):
    """Two silent files are alike without being copies; a normalised file reaches full scale once."""
    peak = sound(1.0, seed=9)
    peak[100] = 1.0
    soundfile.write(good / "peak.wav", peak, 16_000)
    for name in ("a.wav", "b.wav"):
        soundfile.write(good / name, np.zeros(8000), 16_000)
        add(good, f"{name},train,{name},4,4")
    add(good, "peak.wav,train,s9,4,4")
    _, _, problems = check_manifest(good)
    assert [problem["problem"] for problem in problems] == ["silent", "silent"]


def test_errors_come_first_and_a_long_list_is_cut_in_the_report_alone(good, undrawn):
    """The CSV has all."""
    for number in range(30):
        soundfile.write(good / f"quiet{number}.wav", np.zeros(8000), 16_000)
        add(good, f"quiet{number}.wav,train,q,4,4")
    add(good, "absent.wav,train,q,4,4")
    code, report, problems = check_manifest(good)
    assert code == 2 and len(problems) == 31 and problems[0]["problem"] == "missing"
    assert "| warning | silent | 30 |" in report and report.count("\n- silent: ") == 19
    assert "\n- and 11 more" in report


def test_an_empty_split_and_allowed_speakers(good, undrawn):
    """A split without utterances is an error; a speaker in two is none if the configuration allows it."""
    manifest = good / "manifest.csv"
    manifest.write_text(re.sub(",dev,s[46]", ",test,s0", manifest.read_text()))
    code, _, problems = check_manifest(good, "allow_speaker_overlap=true")
    assert code == 2 and [problem["problem"] for problem in problems] == ["empty split"]


def test_what_a_reader_leaves_out_is_a_warning_with_its_files(tmp_path):
    """A published corpus through the same check; its files have no sound here, so that they are errors too."""
    root = podcast(tmp_path)
    touch(root / "Audios" / "extra.wav")
    keys = ["corpus=msp-podcast", f"data_root={root}", f"output_dir={tmp_path / 'runs'}", "test_set=Test2"]
    code, report = report_on(keys)
    assert code == 2 and report.startswith("# msp-podcast test_set=Test2\n")
    assert "| error | unreadable | 5 |" in report
    assert "| warning | audio that the labels do not name, left out | 1 |" in report
    assert (tmp_path / "runs" / "check" / "msp-podcast_test_set=Test2" / "problems.csv").is_file()


def test_the_report_needs_no_matplotlib(good, monkeypatch):
    """Which is there for pictures only."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    forget_plots(monkeypatch)
    code, report, _ = check_manifest(good)
    assert code == 0 and "no picture, since matplotlib is not installed" in report
    assert not (good / "out" / "labels.png").exists()


def test_a_report_that_cannot_be_written_is_printed(good):
    """Decoding a corpus takes long; then one line says what failed, and the exit code is that of an error."""
    (good / "out" / "problems.csv").mkdir(parents=True)
    keys = ["corpus=manifest", f"manifest={good / 'manifest.csv'}", "label_range=[1, 7]"]
    done = python("-m", "corpora.check", ROOT / "configs" / "logmel.yaml", *keys, "--out", good / "out")
    assert done.returncode == 2 and "| all | 8 | 8 |" in unpadded(done.stdout)
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(good / "out" / "problems.csv") in said


def test_the_command_prints_the_report_and_exits_by_severity(good):
    """And bad input is one line, of the same severity as an error in the corpus."""
    config = str(ROOT / "configs" / "logmel.yaml")
    keys = ["corpus=manifest", "manifest=manifest.csv", "label_range=[1, 7]"]
    add(good, "absent.wav,train,s9,4,4")
    done = python("-m", "corpora.check", config, *keys, "--out", "found", cwd=good)
    assert done.returncode == 2 and "| error | missing | 1 |" in unpadded(done.stdout)
    assert "found: report.md, problems.csv, speakers.csv" in done.stdout
    wrong = python("-m", "corpora.check", config, "corpus=iemocap", "fold=1", "data_root=nowhere", cwd=good)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: nowhere: no such folder; check the key `data_root`\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file system takes no such name")
def test_the_report_has_names_of_files_as_they_are(tmp_path):
    """Those that are not UTF-8, and on a terminal of ASCII those that it cannot show; in the tables too."""
    root = podcast(tmp_path)
    for name in (b"\xff.wav", "é.wav".encode()):
        Path(os.fsdecode(os.fsencode(root / "Audios") + b"/" + name)).touch()
    words = [
        str(ROOT / "configs" / "logmel.yaml"),
        "corpus=msp-podcast",
        f"data_root={root}",
        "--out",
        str(tmp_path / "o"),
    ]
    done = python("-m", "corpora.check", *words, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    left_out, said = b"audio that the labels do not name, left out", os.fsencode(done.stdout)
    assert b"- " + left_out + b": \xff.wav" in said and left_out + b": \\xe9.wav" in said
    table = (tmp_path / "o" / "problems.csv").read_bytes()
    assert b'left out",\xff.wav,' in table and 'left out",é.wav,'.encode() in table


def test_the_readme_names_every_corpus_and_its_command_has_valid_keys():
    """Its table is that of `CORPORA`, and the keys of its command belong to that corpus."""
    text = (ROOT / "docs" / "corpora.md").read_text(encoding="utf-8")
    for name, corpus in corpora.CORPORA.items():
        for key in corpus.keys:
            assert re.search(rf"^\| `{name}` \|.*`{key}`", text, re.MULTILINE), (name, key)
    (words,) = re.findall(r"^python -m corpora\.check (.*)$", text, re.MULTILINE)
    config = load_config(ROOT / words.split()[0], words.split()[1:])
    assert {word.partition("=")[0] for word in words.split()[1:]} == {"corpus", "data_root", "fold"}
    assert config.fold in range(1, corpora.CORPORA[config.corpus].folds + 1)


def test_the_demo_is_named_as_such(tmp_path):
    """Wherever its numbers are printed."""
    keys = [f"data_root={tmp_path / 'demo'}"]
    code, report = report_on(keys, tmp_path / "out")
    assert code == 0 and report.startswith(f"# {run.DEMO_NOTE}\n")
