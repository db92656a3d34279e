"""What `report.statistics` promises: p-values that hold their level, and agree with what can be done by hand."""

import numpy as np
import pytest

from metrics import bootstrap, interval
from report.statistics import bootstrap_p, holm, paired_t_test


def two_methods(rng: np.random.Generator, count: int, better: float = 0.0) -> np.ndarray:
    """The draws of the difference of two methods, the second with errors smaller by a share."""
    y, common = rng.standard_normal(count), 0.3 * rng.standard_normal(count)
    errors = 0.5 * rng.standard_normal((2, count)) * [[1], [1 - better]]
    values = bootstrap(0.6 * y + common + errors, y, np.arange(count), 500, seed=int(rng.integers(2**31)))
    return values[:, 1] - values[:, 0]


def test_the_paired_bootstrap_holds_its_level_and_finds_what_is_there():
    """Between equals p is below 0.05 once in twenty times; errors of a third are found nearly always."""
    rng = np.random.default_rng(0)
    equal = np.array([bootstrap_p(two_methods(rng, 200), 200) for _ in range(400)])
    assert 0.03 <= (equal < 0.05).mean() <= 0.08  # 0.05 and 2.75 standard errors of 400 trials above
    assert 0.4 <= (equal < 0.5).mean() <= 0.6
    different = np.array([bootstrap_p(two_methods(rng, 200, 2 / 3), 200) for _ in range(50)])
    assert (different < 0.05).mean() > 0.9


def test_p_is_below_a_twentieth_where_the_interval_excludes_zero():
    """One expansion for both, whatever the number of groups."""
    values = np.sort(np.random.default_rng(0).standard_normal(100_000))
    for groups in (6, 10, 1000):
        low, _ = interval(values, groups)
        assert bootstrap_p(values - low + 0.05, groups) < 0.05 < bootstrap_p(values - low - 0.05, groups)
        assert bootstrap_p(values - low, groups) == pytest.approx(0.05, rel=0.02)


def test_p_is_never_zero_and_one_for_equals():
    """The smallest p follows from the number of draws."""
    assert bootstrap_p(np.ones(999), 10**9) == pytest.approx(2 / 1000, rel=1e-3)
    assert bootstrap_p(-np.ones(999), 10**9) == pytest.approx(2 / 1000, rel=1e-3)
    assert bootstrap_p(np.zeros(999), 30) == 1
    assert bootstrap_p(np.ones(999), 1) is None


def test_the_t_test_over_seeds_is_students():
    """By hand: differences 0.1, 0.2, 0.3 have mean 0.2 and standard error 0.1 / sqrt(3); two degrees of freedom."""
    t = 0.2 / (0.1 / 3**0.5)
    by_hand = 1 - t / (t**2 + 2) ** 0.5  # Student's distribution with two degrees of freedom, both tails
    assert paired_t_test([0.5, 0.7, 0.9], [0.4, 0.5, 0.6]) == pytest.approx(by_hand)
    assert paired_t_test([0.4, 0.5, 0.6], [0.5, 0.7, 0.9]) == pytest.approx(by_hand)


def test_the_t_test_is_undefined_for_one_pair_and_for_pairs_that_differ_alike():
    """A standard error of nothing, or of zero."""
    assert paired_t_test([0.5], [0.4]) is None
    assert paired_t_test([0.5, 0.6], [0.5, 0.6]) is None
    assert paired_t_test([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) is None


def test_holm_is_the_worked_example():
    """Holm (1979): times 4, 3, 2, 1 in order of size; never below a smaller one's, never above 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.6]) == [1.0, None, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([None, None]) == [None, None]
    assert holm([]) == []
