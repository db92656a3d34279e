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


def bootstrap_ci(
    prediction: np.ndarray, target: np.ndarray, speakers: Sequence[str], draws: int = 2000, seed: int = 0
) -> list[float] | None:
    """95% percentile interval of the CCC of `(N,), (N,)`, drawing whole speakers with replacement.

    Utterances of a speaker are alike, so drawing utterances would give too narrow an interval. None for one speaker.
    """
    names, of = np.unique(np.asarray(speakers), return_inverse=True)
    if len(names) < 2:
        return None
    x, y = np.asarray(prediction, float), np.asarray(target, float)
    x, y = x - y.mean(), y - y.mean()  # moments of small numbers keep their digits
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1)
    sums = np.zeros((len(names), terms.shape[1]))
    np.add.at(sums, of, terms)  # CCC needs sums alone, so a draw is a weighted sum over speakers
    weights = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    n, x, y, xx, yy, xy = (weights @ sums).T
    x, y = x / n, y / n
    spread = (xx / n - x**2) + (yy / n - y**2) + (x - y) ** 2
    rounding = 1e-12 * (sums[:, 3] + sums[:, 4]).sum() / len(terms) + np.finfo(float).tiny
    values = 2 * (xy / n - x * y) / np.maximum(spread, rounding)  # 0, not noise over noise, for a constant draw
    return np.percentile(values, [2.5, 97.5]).tolist()
