"""Pictures for a paper: plain values in, `<path>.png` (200 dpi) and `<path>.pdf` out.

M methods, S seeds, K targets; a score is a CCC, NaN where there is none. A method has the same mark, line and colour in
every picture; marks and lines alone tell twelve methods apart, so nothing is lost in grey. Widths are those of a column
and of a page, and letters are of 7 points, so that a picture is put in at its own size. Every picture takes, behind
what its function names, `note` and `path`: the note is written above all else and may be empty; see `picture`.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMN, PAGE = 3.5, 7.0  # inches
POINTS = 72  # an inch
LETTER = 3.6  # points, the mean width of one
DENSE = 2000  # points from which on their density is drawn
DENSITY = {"gridsize": 40, "cmap": "Greys", "bins": "log", "mincnt": 1, "vmin": 0.3, "linewidths": 0}
DOTS = 1400  # across a page at 200 dpi: as much as can be seen of a waveform
MARKS = ("o", "s", "^", "D", "v", "<")
LINES = ("-", "--", "-.", ":")
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, without yellow
GREY = "0.6"


def picture(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """A function that draws in the common style and then does what `finish` does, with `note` and `path` as last."""

    @wraps(draw)
    @matplotlib.style.context(Path(__file__).with_name("style.mplstyle"))
    def drawn(*arguments: Any) -> Figure:
        *values, note, path = arguments
        return finish(draw(*values), note, path)

    return drawn


def finish(figure: Figure, note: str, path: Path) -> Figure:
    """Make room for the note above all panels and for the names in them below, and write both files."""
    width, height = figure.get_size_inches()
    note = textwrap.fill(note, int(width * POINTS / LETTER))
    if note:
        figure.suptitle(note, style="italic")
    drawn = (zip(*axis.get_legend_handles_labels(), strict=True) for axis in figure.axes)
    named = {name: handle for pairs in drawn for handle, name in pairs}
    columns = max(1, int(width * POINTS / (LETTER * max(map(len, named), default=0) + 36)))  # 36: the line before each
    if named:
        figure.legend(named.values(), named, loc="outside lower center", ncols=columns)
    lines = note.count("\n") + 1 + -(-len(named) // columns)
    figure.set_figheight(height + lines * 10 / POINTS)
    for file in (path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "pdf")):
        try:
            figure.savefig(file)
        except OSError as error:
            raise OSError(f"{file}: cannot be written ({error.strerror})") from None
    return figure


@picture
def cost(
    names: Sequence[str], costs: np.ndarray, scores: np.ndarray, targets: Sequence[str], label: str, ceiling: Mapping
) -> Figure:
    """CCC `(M, S, K)`, mean and standard deviation over seeds, against a cost `(M,)` above 0 that `label` names.

    A panel per target, with the efficient frontier in it. A method without cost or score is left out. `ceiling` is by
    target how well the raters agree, a line across its panel; it may be empty.
    """
    figure, axes = panels(len(targets), size=3)
    means, deviations = mean_and_deviation(scores)
    there = np.flatnonzero(np.isfinite(costs) & np.isfinite(means).all(1))
    for k, (axis, target) in enumerate(zip(axes, targets, strict=True)):
        log_axis(axis, list(costs[there]), label)
        best = there[frontier(costs[there], means[there, k])]
        x, y = [*costs[best], axis.get_xlim()[1]], [*means[best, k], means[best[-1], k]]  # the last holds to the end
        axis.step(x, y, where="post", color=GREY, label="efficient frontier")
        for m in there:
            form = {**style(m), "linestyle": "none"}
            axis.errorbar(costs[m], means[m, k], deviations[m, k], **form, elinewidth=0.8, label=names[m])
        if target in ceiling:
            axis.axhline(ceiling[target], color=GREY, linestyle=":", label="raters' agreement")
        axis.set(title=target, ylabel="CCC")
    return figure


@picture
def depth(counts: Sequence[int], scores: np.ndarray, targets: Sequence[str]) -> Figure:
    """CCC `(M, S, K)` against the number of trainable layers `(M,)`: mean and deviation, each run as a small point."""
    figure, (axis,) = panels(1)
    order = np.argsort(counts)
    x, scores = np.asarray(counts)[order], np.asarray(scores)[order]
    means, deviations = mean_and_deviation(scores)
    beside = np.broadcast_to(x[:, None], scores.shape[:2]) + 0.02 * (np.ptp(x) or 1)
    for k, target in enumerate(targets):
        axis.plot(beside, scores[:, :, k], ".", color=style(k)["color"], markersize=4, alpha=0.5, markeredgewidth=0)
        axis.errorbar(x, means[:, k], deviations[:, k], **style(k), elinewidth=0.8, label=target)
    axis.set(xlabel="trainable layers", ylabel="CCC", xticks=np.unique(x))
    return figure


@picture
def curves(
    names: Sequence[str], curves: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], targets: Sequence[str]
) -> Figure:
    """Development CCC over training time: for each method and seed, seconds `(E,)` and scores `(E, K)` of its epochs.

    A thin line is a run; the thick one is the mean over seeds as far as all of them went.
    """
    figure, axes = panels(len(targets), size=2.8)
    every_second = [second for runs in curves for seconds, _ in runs for second in seconds]
    for k, (axis, target) in enumerate(zip(axes, targets, strict=True)):
        for m, (name, runs) in enumerate(zip(names, curves, strict=True)):
            for seconds, scores in runs if len(runs) > 1 else ():
                axis.plot(seconds, scores[:, k], color=style(m)["color"], linewidth=0.4, alpha=0.4)
            epochs = min(len(seconds) for seconds, _ in runs)
            x = np.mean([seconds[:epochs] for seconds, _ in runs], 0)
            y = np.mean([scores[:epochs, k] for _, scores in runs], 0)
            axis.plot(x, y, **style(m), markersize=3.5, label=name)
        log_axis(axis, every_second, "training time (s)")
        axis.set(title=target, ylabel="development CCC")
    return figure


@picture
def scatter(
    names: Sequence[str], predictions: Sequence[np.ndarray], labels: np.ndarray, target: str, scores: Sequence[float]
) -> Figure:
    """Predictions of M methods, `(N,)` each, against labels `(N,)`, a panel a method with its CCC `(M,)` above.

    From 2,000 points on, their density: the darker, the more (logarithmic).
    """
    columns = min(4, len(names))
    figure, axes = panels(len(names), columns, size=2, width=columns * PAGE / 4)
    everything = np.concatenate([labels, *predictions])
    margin = 0.04 * (np.ptp(everything) or 1)
    low, high = everything.min() - margin, everything.max() + margin
    for axis, name, predicted, score in zip(axes, names, predictions, scores, strict=True):
        if len(labels) < DENSE:
            axis.plot(labels, predicted, "o", color="black", markersize=2, markeredgewidth=0, alpha=0.35)
        else:
            axis.hexbin(labels, predicted, extent=(low, high, low, high), **DENSITY)
        axis.plot([low, high], [low, high], color=COLORS[2], linewidth=0.8)
        axis.set(title=f"{name}\nCCC {score:.3f}", xlim=(low, high), ylim=(low, high), aspect="equal")
        axis.locator_params(nbins=5)
    figure.supxlabel(f"{target}, labels")
    figure.supylabel(f"{target}, predictions")
    return figure


@picture
def labels(splits: Mapping[str, np.ndarray], targets: Sequence[str], label_range: Sequence[float]) -> Figure:
    """Labels and lengths of utterances: of each split `(N, K + 1)`, K targets and seconds, NaN where there is none.

    A panel for each, in % of the split, and one with the first target over the second: a point an utterance, or from
    2,000 on their density.
    """
    names, every = [*targets, "seconds"], np.concatenate(list(splits.values()))
    count = len(names) + (len(targets) > 1)
    figure, axes = panels(count, size=2, width=1.8 * count)
    edges = []
    for axis, name, values in zip(axes, names, every.T, strict=False):
        known, parts = ([0, 1], 24) if name == "seconds" else (label_range, 12)
        edges.append(np.linspace(np.nanmin([*values, *known]), np.nanmax([*values, *known]), parts + 1))
        axis.set(xlabel=name)
    axes[0].set(ylabel="% of the split")
    dense = np.isfinite(every[:, :2]).all(1).sum() >= DENSE
    for number, (split, rows) in enumerate(splits.items()):
        form = {**style(number), "markerfacecolor": "none"}
        for axis, values, between in zip(axes, rows.T, edges, strict=False):
            found = np.histogram(values[np.isfinite(values)], between)[0]
            axis.stairs(100 * found / max(1, found.sum()), between, color=form["color"], linestyle=form["linestyle"])
        axes[0].plot([], [], **form, label=f"{split} ({len(rows):,})")
        if len(targets) > 1 and not dense:
            axes[-1].plot(rows[:, 1], rows[:, 0], **{**form, "linestyle": "none"}, markersize=3)
    if len(targets) > 1:
        axes[-1].set(xlabel=targets[1], ylabel=targets[0], aspect="equal")
        if dense:
            cells = axes[-1].hexbin(every[:, 1], every[:, 0], **DENSITY)
            figure.colorbar(cells, ax=axes[-1], label="utterances").ax.set_ylim(bottom=1)
    return figure


@picture
def layers(names: Sequence[str], similarity: np.ndarray, change: np.ndarray) -> Figure:
    """What finetuning changed: similarity `(L + 1,)` of the hidden states, relative change `(L,)` of layers' weights.

    `names` `(L + 1,)` are the hidden states' names, the input of layer 0 first, then one for the output of each layer.
    """
    figure, (above, below) = panels(2, columns=1, size=1.6)
    x = np.arange(len(names))
    above.plot(x, similarity, **style(0))
    below.bar(x[1:], change, color="0.45")
    low = min(*similarity, 0.99)  # what differs by less than a hundredth should look alike
    margin = 0.08 * (1 - low)
    above.set(ylabel="similarity (CKA)", xticks=[], ylim=(low - margin, 1 + margin))
    shown = x[:: 1 if len(names) <= 16 else 2]
    below.set(ylabel="change of weights", xlabel="layer", xlim=above.get_xlim(), ylim=(0, None))
    below.set_xticks(shown, [names[i] for i in shown])
    return figure


@picture
def timeline(
    waveform: np.ndarray, windows: np.ndarray, targets: Sequence[str], label_range: tuple[float, float], title: str
) -> Figure:
    """A recording `(S,)`, and below it predictions for windows `(W, 2 + K)`: seconds from and to, then K targets.

    The last window ends with the recording. A window is a step; where windows overlap, a point in the middle of each.
    """
    figure, (above, below) = panels(2, columns=1, size=1.3, width=PAGE)
    spans, predictions = windows[:, :2], windows[:, 2:]
    seconds = spans[-1, 1]
    unit, name = (60, "min") if seconds >= 600 else (1, "s")
    lows, highs = envelope(waveform, DOTS)
    above.fill_between(np.linspace(0, seconds / unit, len(lows)), lows, highs, color="0.45", linewidth=0.3)
    above.set_title(title if len(title) < 72 else f"…{title[-70:]}", parse_math=False)  # what a page is wide
    above.set(ylabel="waveform", xlim=(0, seconds / unit), xticks=[])
    overlap = (spans[1:, 0] < spans[:-1, 1]).any()
    for k, (target, values) in enumerate(zip(targets, predictions.T, strict=True)):
        form = style(k)
        if overlap:
            below.plot(spans.mean(1) / unit, values, **form, markersize=3 if len(spans) <= 100 else 0, label=target)
        else:
            line = {"color": form["color"], "linestyle": form["linestyle"], "label": target}
            below.stairs(values, [*spans[:, 0] / unit, seconds / unit], baseline=None, **line)
    low, high = min(label_range[0], predictions.min()), max(label_range[1], predictions.max())
    margin = 0.04 * (high - low)
    below.set(xlabel=f"time ({name})", ylabel="prediction", xlim=above.get_xlim(), ylim=(low - margin, high + margin))
    below.set_yticks(np.linspace(*label_range, 3))
    figure.align_ylabels()
    return figure


@picture
def bars(
    methods: Sequence[tuple[str, str]], seconds: Sequence[tuple[float, float]], gigabytes: Sequence[tuple[float, float]]
) -> Figure:
    """Time and memory of M methods, `(name, side)` each, as bars, with a mark on each for what it needs at least."""
    starts = [side == "ours" != before for (_, side), (_, before) in zip(methods, methods[-1:] + methods, strict=False)]
    heights = -np.arange(len(methods)) - 0.5 * np.cumsum(starts)  # a gap after each peer
    shades = {"ours": "#1b4965", "peer": "#6fa8c9", "naive": "#d3d9de"}  # a dark, a middle and a light grey as well
    figure, axes = panels(2, size=0.8 - 0.19 * heights[-1])
    for axis, values in zip(axes, (seconds, gigabytes), strict=True):
        used, least = np.transpose(values)
        drawn = axis.barh(heights, used, height=0.8, color=[shades[side] for _, side in methods])
        for color, width in (("white", 3), ("black", 1.2)):
            axis.vlines(least, heights - 0.4, heights + 0.4, color=color, linewidth=width)
        axis.bar_label(drawn, [f"{float(format(value, '.3g')):,g}" for value in used], padding=3)
        axis.set_yticks(heights, [name for name, _ in methods] if axis is axes[0] else [""] * len(methods))
        axis.tick_params("y", length=0)
        axis.margins(x=0.15, y=0.02)
    positive = [value for pair in seconds for value in pair if value > 0]
    title = "s of training steps per hour of audio (logarithmic)\nmark: what is needed, at the matmul rate"
    axes[0].set(title=title, xscale="log", xlim=(0.5 * min(positive), 3 * max(positive)))
    axes[0].xaxis.set_major_formatter("{x:,g}")
    axes[1].set(title="peak memory, GB\nmark: weights, gradients and Adam's moments alone")
    return figure


def envelope(waveform: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest sample of `(S,)` in each of that many parts, at most S: no peak is lost."""
    parts = min(parts, len(waveform))
    starts = np.arange(parts) * len(waveform) // parts
    return np.minimum.reduceat(waveform, starts), np.maximum.reduceat(waveform, starts)


def frontier(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The methods, cheapest first, than which no other is better at most as dear, or as good and cheaper."""
    dearer, better = np.subtract.outer(costs, costs), np.subtract.outer(scores, scores)  # (M, M), row than column
    beaten = (dearer >= 0) & (better <= 0) & ((dearer > 0) | (better < 0))
    return sorted(np.flatnonzero(~beaten.any(1)), key=lambda m: costs[m])


def mean_and_deviation(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the seeds that are there, `(M, S, K) -> (M, K)` each, NaN below 1 and 2."""
    present = np.ma.masked_invalid(np.asarray(scores, float))
    return present.mean(1).filled(np.nan), present.std(1, ddof=1).filled(np.nan)


# --- what the pictures share -----------------------------------------------------------------------------------------


def style(number: int) -> dict[str, object]:
    """Mark, line and colour of a method: six full marks, then the same six hollow."""
    color, hollow = COLORS[number % len(COLORS)], number // len(MARKS) % 2
    mark = {"marker": MARKS[number % len(MARKS)], "markerfacecolor": "white" if hollow else color}
    return {**mark, "color": color, "linestyle": LINES[number % len(LINES)]}


def panels(count: int, columns: int = 0, size: float = 2.4, width: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of `size` inches in height."""
    columns = columns or count
    rows = -(-count // columns)
    figure = Figure(figsize=(width or min(columns * COLUMN, PAGE), rows * size))
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def log_axis(axis: Axes, values: Sequence[float], label: str) -> None:
    """A logarithmic x axis from one round number to another, with plain numbers at its ticks."""
    if not values or min(values) <= 0:
        raise ValueError(f"{label}: expected values above 0, found {min(values, default='none')}")
    steps = np.outer(10.0 ** np.arange(-9, 12), (1, 2, 5)).ravel()
    low, high = steps[steps <= min(values) / 1.05].max(), steps[steps >= max(values) * 1.05].min()
    ticks = steps[(low <= steps) & (steps <= high)]
    if len(ticks) > 8:
        ticks = np.intersect1d(ticks, steps[::3])  # 1, 10, 100
    elif len(ticks) < 3:
        unit = 10 ** np.floor(np.log10(low))
        ticks = np.arange(low, high + unit / 2, unit)  # 2, 3, 4, 5
    axis.set(xscale="log", xlim=(low, high), xlabel=label)
    axis.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
    axis.set_xticks([], minor=True)
