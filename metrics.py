"""Concordance correlation coefficient (CCC): the measure, the loss, and its uncertainty. Pure functions."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def ccc(prediction: Tensor, target: Tensor) -> Tensor:
    """CCC of each column, `(N, K), (N, K) -> (K,)`, with gradient.

    `2 cov(x, y) / (var(x) + var(y) + (mean(x) - mean(y))^2)` with population moments (Lin 1989). 1 is agreement, not
    just correlation: scale and offset count. A constant side gives 0. Raises ValueError for two different shapes.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {tuple(prediction.shape)}, target is {tuple(target.shape)}; expected the same")
    x, y = prediction - prediction[:1], target - target[:1]  # a constant side is now exactly zero, and so its mean
    offset = prediction[0] + x.mean(0) - target[0] - y.mean(0)
    x, y = x - x.mean(0), y - y.mean(0)
    covariance = (x * y).mean(0)
    spread = (x * x).mean(0) + (y * y).mean(0) + offset**2
    return 2 * covariance / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def ccc_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - CCC, averaged over the targets. Not a mean over utterances: pass the whole batch, in fp32."""
    return 1 - ccc(prediction.float(), target.float()).mean()


def bootstrap(
    predictions: np.ndarray, target: np.ndarray, groups: Sequence, draws: int = 10_000, seed: int = 0
) -> np.ndarray:
    """CCC of each of R runs in each bootstrap draw: predictions `(R, N)`, target and groups `(N,)` -> `(draws, R)`.

    A draw takes as many groups as there are, whole and with replacement. All runs see the same draws, so a difference
    of columns is a paired one. CCC needs sums alone, and a draw is a weighted sum over groups.
    """
    names, of = np.unique(np.asarray(groups), return_inverse=True)
    y = np.asarray(target, float)
    x, y = np.asarray(predictions, float) - y.mean(), y - y.mean()  # moments of small numbers keep their digits
    terms = np.concatenate([np.ones((1, len(y))), [y, y * y], x, x * x, x * y]).T
    sums = np.zeros((len(names), terms.shape[1]))
    np.add.at(sums, of, terms)
    rounding = 1e-12 * (np.mean(y * y) + np.mean(x * x, 1)) + np.finfo(float).tiny
    values, random = np.empty((draws, len(x))), np.random.default_rng(seed)
    for start in range(0, draws, step := max(1, 2**20 // len(names))):  # in parts, of 8 MB whatever the corpus
        count = min(step, draws - start)
        drawn = random.integers(len(names), size=(count, len(names))) + len(names) * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)
        n, y_sum, yy, *of_runs = np.split(weights @ sums, [1, 2, 3, 3 + len(x), 3 + 2 * len(x)], axis=1)
        y_mean, (x_mean, xx, xy) = y_sum / n, (part / n for part in of_runs)
        spread = (xx - x_mean**2) + (yy / n - y_mean**2) + (x_mean - y_mean) ** 2  # 0, not noise, for a constant draw
        values[start : start + count] = 2 * (xy - x_mean * y_mean) / np.maximum(spread, rounding)
    return values


def interval(values: np.ndarray, groups: int) -> list[float] | None:
    """95% interval of a statistic from its bootstrap draws `(draws,)` of this many groups; None for fewer than two.

    The expanded percentile interval (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.3):
    percentiles at `Phi(sqrt(n / (n - 1)) t(0.025, n - 1))`, so that for a mean it is as wide as the t interval. With
    simulated speakers it held the true CCC in 92 to 96% of corpora of 8 to 64, and in 87 to 91% of 4.
    """
    if groups < 2:
        return None
    from scipy.special import ndtr, stdtrit

    tail = ndtr(np.sqrt(groups / (groups - 1)) * stdtrit(groups - 1, 0.025))
    return np.quantile(values, [tail, 1 - tail]).tolist()


def bootstrap_ci(
    prediction: np.ndarray, target: np.ndarray, speakers: Sequence, draws: int = 10_000, seed: int = 0
) -> list[float] | None:
    """95% interval of the CCC of `(N,), (N,)`, or of its mean over the runs of `(S, N)`, drawing whole speakers.

    Utterances of a speaker are alike, so drawing utterances would give too narrow an interval. None for one speaker.
    """
    values = bootstrap(np.atleast_2d(prediction), target, speakers, draws, seed)
    return interval(values.mean(1), len(set(speakers)))
