"""What `plots.py` promises: both files, the note in them, what is missing left out, marks that differ in grey."""

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import speech_like
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from report import plots

NOTE = "synthetic sounds"
TARGETS = ("activation", "valence")
NAMES = ["full", "full_amp", "full_checkpointing", "partial3", "partial3_amp", "partial3_cached", "partial6_cached"]
NAMES += ["lora_r8", "lora_last3_cached", "lora_last6_cached", "heads_only", "logmel"]
RANDOM = np.random.default_rng(0)
SCORES = RANDOM.uniform(0.3, 0.7, (12, 3, 2))
SCORES[3, 1:] = np.nan  # two seeds failed
SCORES[5] = np.nan  # all did


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def seconds_and_scores(epochs: int, start: float = 10.0) -> tuple[np.ndarray, np.ndarray]:
    return start * np.arange(1, epochs + 1), RANDOM.uniform(0, 1, (epochs, 2))


def cost(path: Path, count: int = 12, seeds: int = 3, note: str = NOTE) -> Figure:
    costs = np.geomspace(3, 5000, count)
    return plots.cost(NAMES[:count], costs, SCORES[:count, :seeds], TARGETS, "time (s)", {}, note, path)


def depth(path: Path, count: int = 12, seeds: int = 3, note: str = NOTE) -> Figure:
    return plots.depth(range(count), SCORES[:count, :seeds], TARGETS, note, path)


def curves(path: Path, count: int = 12, seeds: int = 3, note: str = NOTE) -> Figure:
    runs = [[seconds_and_scores(4 + seed, 2.0 + m) for seed in range(seeds)] for m in range(count)]
    return plots.curves(NAMES[:count], runs, TARGETS, note, path)


def scatter(path: Path, count: int = 12, size: int = 32, note: str = NOTE) -> Figure:
    labels = RANDOM.uniform(1, 7, size)
    predictions = [labels + RANDOM.normal(0, 1, size) for _ in range(count)]
    return plots.scatter(NAMES[:count], predictions, labels, "valence", [0.5] * count, note, path)


def layers(path: Path, count: int = 12, seeds: int = 3, note: str = NOTE) -> Figure:
    names = ["input", *map(str, range(count))]
    return plots.layers(names, np.linspace(1, 0.5, count + 1), np.linspace(0, 0.1, count), note, path)


def timeline(path: Path, count: int = 12, seeds: int = 3, note: str = NOTE, hop: float = 1.0) -> Figure:
    starts = hop * np.arange(count)
    waveform = speech_like(round(16_000 * (starts[-1] + 1))).numpy()
    spans, predictions = np.stack([starts, starts + 1], 1), RANDOM.uniform(2, 5, (count, 2))
    return plots.timeline(waveform, np.hstack([spans, predictions]), TARGETS, (1, 7), "speech.wav", note, path)


def words(figure: Figure) -> list[tuple[str, Bbox]]:
    """What is drawn and where; ticks beyond an axis's limits exist but are not drawn."""
    found, draw = [], Text.draw

    def record(text: Text, *arguments) -> None:
        draw(text, *arguments)
        if text.get_visible() and text.get_text().strip():
            found.append((text.get_text(), text.get_window_extent()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        FigureCanvasAgg(figure).draw()
    return found


def texts(figure: Figure) -> list[str]:
    return [word for word, _ in words(figure)]


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize("picture", [cost, depth, curves, scatter, layers, timeline])
def test_both_files_appear_with_the_note_and_no_word_is_cut_or_covered(tmp_path, picture, count):
    """With one method, two and twelve; a point of a name stays in it, as in lora.v2."""
    figure = picture(tmp_path / "lora.v2", count)
    assert {path.name for path in tmp_path.iterdir()} == {"lora.v2.png", "lora.v2.pdf"}
    assert (tmp_path / "lora.v2.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "lora.v2.pdf").read_bytes().startswith(b"%PDF")
    assert NOTE in checked(figure)


def checked(figure: Figure) -> list[str]:
    """What is drawn: none of it is cut off or covered."""
    found, page = words(figure), figure.bbox
    assert [word for word, box in found if Bbox.intersection(box, page).size.tolist() != box.size.tolist()] == []
    for (word, box), (other, its) in itertools.combinations(found, 2):
        assert not box.overlaps(its), f"{word} and {other} lie on each other"
    return [word for word, _ in found]


@pytest.mark.parametrize("picture", [cost, depth, curves, scatter, layers, timeline])
def test_the_note_may_be_empty(tmp_path, picture):
    figure = picture(tmp_path / "picture", 2, note="")
    assert NOTE not in checked(figure)


def test_layers_that_did_not_change_look_alike(tmp_path):
    """The scale does not blow up what is nothing, nor have values above 1."""
    figure = plots.layers(["input", "0", "1"], np.ones(3), np.zeros(2), NOTE, tmp_path / "picture")
    checked(figure)
    low, high = figure.axes[0].get_ylim()
    assert low < 0.99
    assert 1 < high < 1.001


@pytest.mark.parametrize("picture", [cost, depth])
def test_one_seed_has_no_error_bars(tmp_path, undrawn, picture):
    """Three have one each; a method of which one seed alone is left has none either."""

    def bars(figure: Figure) -> int:
        containers = [container for axis in figure.axes for container in axis.containers]
        segments = [segment for c in containers for lines in c.lines[2] for segment in lines.get_segments()]
        return sum(len(segment) > 0 and bool(np.isfinite(segment).all()) for segment in segments)

    assert bars(picture(tmp_path / "one", 3, seeds=1)) == 0
    assert bars(picture(tmp_path / "three", 3)) == 2 * 3
    assert bars(picture(tmp_path / "failed", 4)) == 2 * 3


def test_a_method_without_scores_is_left_out_of_the_cost(tmp_path, undrawn):
    """And keeps no place in the legend; the others keep their marks."""
    found = texts(cost(tmp_path / "picture"))
    assert [name for name in NAMES if name not in found] == [NAMES[5]]


def test_a_cost_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"time \(s\): expected values above 0, found 0"):
        plots.cost(["a"], np.array([0.0]), SCORES[:1], TARGETS, "time (s)", {}, NOTE, tmp_path / "picture")
    with pytest.raises(ValueError, match="found none"):
        plots.cost(["a"], np.array([1.0]), SCORES[5:6], TARGETS, "time (s)", {}, NOTE, tmp_path / "picture")


def test_the_frontier_by_hand():
    """Cheapest first; the dearer with no better score, the equal at a higher cost and the worse at an equal one go."""
    costs = [5, 1, 3, 3, 8, 2, 9]
    scores = [0.6, 0.2, 0.5, 0.4, 0.6, 0.1, 0.9]
    assert plots.frontier(costs, scores) == [1, 2, 0, 6]
    assert plots.frontier([1, 1], [0.5, 0.5]) == [0, 1]  # neither beats the other
    assert plots.frontier([], []) == []


def test_mean_and_deviation_are_over_the_seeds_that_are_there():
    scores = np.array([[[0.2], [0.4], [np.nan]], [[0.3], [np.nan], [np.nan]], [[np.nan]] * 3])
    mean, deviation = plots.mean_and_deviation(scores)
    assert mean[:, 0] == pytest.approx([0.3, 0.3, np.nan], nan_ok=True)
    assert deviation[:, 0] == pytest.approx([0.02**0.5, np.nan, np.nan], nan_ok=True)


def test_twelve_methods_differ_without_colour():
    """By mark and filling, and by the line beside."""
    styles = [plots.style(number) for number in range(12)]
    assert len({(s["marker"], s["markerfacecolor"] == "white") for s in styles}) == 12
    assert len({s["linestyle"] for s in styles[:4]}) == 4


def test_curves_end_where_the_first_seed_stopped_and_runs_go_on(tmp_path, undrawn):
    """Seeds of 4, 5 and 6 epochs: the mean has four points, of mean seconds; each run its own."""
    runs = [[seconds_and_scores(4, 10), seconds_and_scores(5, 11), seconds_and_scores(6, 12)], [seconds_and_scores(3)]]
    figure = plots.curves(NAMES[:2], runs, TARGETS, NOTE, tmp_path / "picture")
    lines = figure.axes[1].get_lines()
    mean = next(line for line in lines if line.get_label() == "full")
    assert mean.get_xdata() == pytest.approx([11, 22, 33, 44])
    assert mean.get_ydata() == pytest.approx(np.mean([scores[:4, 1] for _, scores in runs[0]], 0))
    assert sorted(len(line.get_xdata()) for line in lines) == [3, 4, 4, 5, 6]


def test_many_predictions_are_drawn_as_density(tmp_path):
    """30,000 points would make a PDF that no viewer scrolls through."""
    few, many = scatter(tmp_path / "few", 2), scatter(tmp_path / "many", 2, size=30_000)
    assert [len(axis.collections) for axis in (*few.axes, *many.axes)] == [0, 0, 1, 1]
    assert (tmp_path / "many.pdf").stat().st_size < 500_000
    assert "full_amp\nCCC 0.500" in texts(many)


@pytest.mark.parametrize("targets", [("valence",), TARGETS, (*TARGETS, "dominance")])
@pytest.mark.parametrize("size", [10, 3000])
def test_labels_of_few_and_of_many_utterances(tmp_path, size, targets):
    """Points or their density; a split and a label may be missing, and what lies outside the range is shown."""
    train = RANDOM.uniform(1, 9, (size, len(targets) + 1))
    train[0, 0] = np.nan
    splits = {"train": train, "dev": train[:0], "test": np.full((1, len(targets) + 1), np.nan)}
    figure = plots.labels(splits, targets, (1, 7), NOTE, tmp_path / "labels")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.pdf", "labels.png"]
    assert {*targets, "seconds", f"train ({size:,})", "dev (0)", "test (1)", NOTE} <= set(checked(figure))
    stairs = figure.axes[0].patches[0].get_data()
    assert stairs.values.sum() == pytest.approx(100)
    assert stairs.edges[[0, -1]].tolist() == [1, max(7, np.nanmax(train[:, 0]))]
    if len(targets) > 1:
        plane = figure.axes[len(targets) + 1]
        assert len(plane.collections) == (size == 3000) and len(plane.lines) == (0 if size == 3000 else 3)


@pytest.mark.parametrize("hop", [1.0, 0.25])
def test_predictions_over_time_have_the_scale_of_the_labels(tmp_path, hop):
    """A step as long as its window, or a point in the middle of each window where they overlap; under the waveform."""
    figure = timeline(tmp_path / "picture", 5, hop=hop)
    above, below = figure.axes
    end = 4 * hop + 1
    assert above.get_xlim() == below.get_xlim() == (0, end)
    assert below.get_ylim() == pytest.approx((1 - 0.24, 7 + 0.24))
    if hop == 1:
        steps = [patch.get_data() for patch in below.patches]
        assert [step.edges.tolist() for step in steps] == [[0, 1, 2, 3, 4, 5]] * 2
        assert [len(step.values) for step in steps] == [5, 5]
    else:
        assert [line.get_xdata().tolist() for line in below.lines] == [[0.5, 0.75, 1, 1.25, 1.5]] * 2
    assert {*TARGETS, "speech.wav", "time (s)"} <= set(texts(figure))


def test_no_prediction_lies_outside_of_the_picture(tmp_path, undrawn):
    """The head is not bound to the range of the labels."""
    windows = np.array([[0, 0.5, 0.2, 4], [0.5, 1, 3, 9]])
    figure = plots.timeline(np.zeros(16_000), windows, TARGETS, (1, 7), "a", NOTE, tmp_path / "picture")
    low, high = figure.axes[1].get_ylim()
    assert low < 0.2 < 9 < high


def test_an_hour_is_a_small_picture_in_which_no_click_is_lost(tmp_path):
    """58 million samples: one of them is seen; the axis is in minutes."""
    waveform, starts = np.zeros(3600 * 16_000, np.float32), np.arange(3596)
    waveform[1_234_567] = -0.7
    lows, highs = plots.envelope(waveform, 1400)
    assert (len(lows), lows.min(), highs.max()) == (1400, np.float32(-0.7), 0)
    assert lows.argmin() == 1_234_567 * 1400 // len(waveform)
    predictions, spans = RANDOM.uniform(2, 5, (3596, 3)), np.stack([starts, starts + 5], 1)
    names = (*TARGETS, "dominance")
    figure = plots.timeline(waveform, np.hstack([spans, predictions]), names, (1, 7), "a", NOTE, tmp_path / "picture")
    assert figure.axes[1].get_xlim() == (0, 60)
    assert "time (min)" in texts(figure)
    assert (tmp_path / "picture.pdf").stat().st_size < 300_000


def test_the_envelope_by_hand():
    """Of parts as equal as can be; each sample for itself where there are fewer than parts."""
    waveform = np.array([1, 5, 2, -3, 0, 4, 6])
    lows, highs = plots.envelope(waveform, 3)
    assert (lows.tolist(), highs.tolist()) == ([1, -3, 0], [5, 2, 6])
    assert [part.tolist() for part in plots.envelope(waveform, 10)] == [waveform.tolist()] * 2


@pytest.mark.parametrize("title", ["a$b$.wav", "x^{_$\\frac$.wav", "long" * 60 + ".wav"])
def test_any_name_of_a_file_is_a_title(tmp_path, title):
    """No formula, and not beyond the page."""
    windows = np.array([[0, 1, 3, 4]])
    figure = plots.timeline(np.ones(16_000), windows, TARGETS, (1, 7), title, NOTE, tmp_path / "picture")
    assert any(word.endswith(title[-50:]) for word in checked(figure))


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.34, 4.6], ["0.2", "0.5", "1", "2", "5"]),
        ([11, 5457], ["10", "100", "1,000", "10,000"]),
        ([3100, 4442], ["2,000", "3,000", "4,000", "5,000"]),
        ([1.13, 1.44], ["1", "2"]),
        ([1.0], ["0.5", "1", "2"]),
    ],
)
def test_a_logarithmic_axis_has_plain_numbers(values, ticks):
    """And all values well inside."""
    axis = Figure().subplots()
    plots.log_axis(axis, values, "seconds")
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ticks
    low, high = axis.get_xlim()
    assert low < min(values) / 1.04
    assert high > max(values) * 1.04


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=r"missing.picture\.png: cannot be written"):
        layers(tmp_path / "missing" / "picture", 2)


def test_the_agreement_of_raters_is_a_line_in_the_panel_of_its_target(tmp_path, undrawn):
    """And in the legend; a target without it has none."""
    costs, ceiling = np.geomspace(3, 50, 2), {"activation": 0.77}
    figure = plots.cost(NAMES[:2], costs, SCORES[:2], TARGETS, "time (s)", ceiling, "", tmp_path / "cost")
    lines = [[line for line in axis.lines if line.get_label() == "raters' agreement"] for axis in figure.axes]
    assert [len(found) for found in lines] == [1, 0]
    assert set(lines[0][0].get_ydata()) == {0.77}
    assert "raters' agreement" in [text.get_text() for text in figure.legends[0].get_texts()]
