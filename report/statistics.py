"""Is one method better than another? p-values from bootstrap draws and over seeds, and their correction."""

from collections.abc import Sequence

import numpy as np


def bootstrap_p(differences: np.ndarray, groups: int) -> float | None:
    """Two-sided p of a difference being zero, from its bootstrap draws `(draws,)` of this many groups.

    Twice the share of draws on the rarer side of zero, taken back through the expansion of `metrics.interval`: p is
    below 0.05 where the interval excludes zero. The estimate itself counts as one of the draws (Davison and Hinkley
    1997, section 4.4), so p is never 0. None for fewer than two groups.
    """
    if groups < 2:
        return None
    from scipy.special import ndtri, stdtr

    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    share = min(0.5, (rarer + 1) / (len(differences) + 1))
    return float(2 * stdtr(groups - 1, np.sqrt((groups - 1) / groups) * ndtri(share)))


def paired_t_test(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Two-sided p of Student's t-test over pairs, `(S,), (S,)`; None for one pair, or where all differ by the same."""
    if len(one) < 2 or np.ptp(np.subtract(one, other)) < 1e-12:
        return None
    from scipy.stats import ttest_rel

    return float(ttest_rel(one, other).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected so that one false finding in the whole family is as rare as in one test (Holm 1979).

    The i-th smallest of m, counted from 0, is multiplied by m - i; none may then be below a smaller one's. None is no
    member of the family, and stays.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected, least = list(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        corrected[place] = least = max(least, min(1.0, p * (len(order) - rank)))
    return corrected
