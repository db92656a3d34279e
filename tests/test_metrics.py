"""What `metrics` promises: CCC as published, a loss of the whole batch, and intervals that know of speakers."""

import numpy as np
import pytest
import torch

from metrics import bootstrap, bootstrap_ci, ccc, ccc_loss, interval


def reference(x: np.ndarray, y: np.ndarray) -> float:
    """Lin (1989), as it is printed, in float64."""
    covariance = np.mean((x - x.mean()) * (y - y.mean()))
    return 2 * covariance / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def pairs(count: int, columns: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    return 0.5 * y + 0.3 * torch.randn(count, columns, generator=generator, dtype=torch.float64) + 0.2, y


# ---------------------------------------------------------------- the measure


@pytest.mark.parametrize("count", [2, 3, 17, 1000])
def test_ccc_is_the_published_formula_in_each_column(count):
    """Population moments, to rounding in float64."""
    x, y = pairs(count, 3)
    expected = [reference(x[:, k].numpy(), y[:, k].numpy()) for k in range(3)]
    assert ccc(x, y).numpy() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", [2, 17, 1000])
def test_ccc_is_audmetrics(count):
    """The value other publications report."""
    audmetric = pytest.importorskip("audmetric")
    x, y = pairs(count)
    expected = [audmetric.concordance_cc(y[:, k].numpy(), x[:, k].numpy()) for k in range(2)]
    assert ccc(x, y).numpy() == pytest.approx(expected, abs=1e-12)


def test_ccc_in_fp32_keeps_its_digits_far_from_zero():
    """Moments are taken about the mean, so an offset of both sides changes nothing but the rounding of the data."""
    x, y = pairs(500)
    x, y = (x + 1000).float(), (y + 1000).float()
    assert ccc(x, y).numpy() == pytest.approx(ccc(x.double(), y.double()).numpy(), abs=1e-5)


def test_ccc_is_one_for_equality_alone_and_minus_one_for_its_mirror():
    """It lies between; the sides are interchangeable."""
    x, y = pairs(50)
    y = y - y.mean(0)
    torch.testing.assert_close(ccc(y, y), torch.ones(2).double())
    torch.testing.assert_close(ccc(-y, y), -torch.ones(2).double())
    assert torch.equal(ccc(x, y), ccc(y, x))
    assert (ccc(x, y).abs() < 1).all()


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (0.5, 0), (2, 0), (1, 1), (0.3, -2), (-1, 0.5)])
def test_scale_and_offset_cost_what_the_formula_says(scale, offset):
    """Correlation stays 1 for each of these: CCC is `2 a v / (v + a^2 v + (mean difference)^2)`."""
    _, y = pairs(200, 1)
    variance, mean = y.var(correction=0), y.mean()
    expected = 2 * scale * variance / (variance + scale**2 * variance + (scale * mean + offset - mean) ** 2)
    assert ccc(scale * y + offset, y).item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 11, 33, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 1e-3, 1234.567])
def test_a_constant_side_gives_zero_and_a_finite_gradient(count, value):
    """Exactly 0, though the mean of equal numbers is rounded: also where both sides are the same constant."""
    constant = torch.full((count, 1), value, requires_grad=True)
    varied = torch.rand(count, 1, generator=torch.Generator().manual_seed(1))
    for x, y in ((constant, varied), (varied, constant), (constant, torch.full((count, 1), value))):
        score = ccc(x, y)
        assert score.item() == 0
        (gradient,) = torch.autograd.grad(score.sum(), constant)
        assert gradient.isfinite().all()


def test_the_gradient_is_the_formulas():
    """Against finite differences, in float64, for both sides."""
    x, y = (side.requires_grad_() for side in pairs(9))
    assert torch.autograd.gradcheck(ccc, (x, y))


def test_shapes_that_differ_are_an_error():
    """`(N, 1)` with `(N,)` would be spread to `(N, N)` without a word."""
    with pytest.raises(ValueError, match=r"prediction is \(4, 1\), target is \(4,\); expected the same"):
        ccc(torch.rand(4, 1), torch.rand(4))


# ---------------------------------------------------------------- the loss


def test_the_loss_is_one_minus_the_mean_over_targets():
    """In fp32, whatever comes in, and with a gradient for each prediction."""
    x, y = pairs(20)
    torch.testing.assert_close(ccc_loss(x, y), (1 - ccc(x, y).mean()).float())
    half = x.bfloat16().requires_grad_()
    loss = ccc_loss(half, y)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, 1 - ccc(half.detach().float(), y.float()).mean())
    assert (half.grad != 0).all()


def test_the_loss_of_a_batch_is_not_the_mean_over_its_parts():
    """Why micro-batches need the whole batch: each part has means of its own."""
    x, y = pairs(32)
    parts = torch.stack([ccc_loss(a, b) for a, b in zip(x.split(8), y.split(8), strict=True)]).mean()
    assert abs(ccc_loss(x, y) - parts) > 1e-2


# ---------------------------------------------------------------- its uncertainty


def clustered(rng: np.random.Generator, speakers: int, each: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and predictions that share an effect of their speaker: `var(y) = 2`, `x = y / 2 + 0.2 + ...`."""
    of = np.repeat(np.arange(speakers), each)
    y = rng.standard_normal(speakers)[of] + rng.standard_normal(len(of))
    x = 0.5 * y + 0.2 + 0.8 * rng.standard_normal(speakers)[of] + 0.2 * rng.standard_normal(len(of))
    return x, y, of


CLUSTERED_CCC = 2 * 0.5 * 2 / (2 + (0.25 * 2 + 0.64 + 0.04) + 0.2**2)  # of the whole population


def test_a_draw_is_the_ccc_of_the_drawn_speakers_utterances():
    """Weighted sums are the same as utterances gathered speaker by speaker; an offset of both sides costs no digits."""
    x, y, of = clustered(np.random.default_rng(3), 6, 4)
    x, y, of = np.stack([x, x**2])[:, :-3], y[:-3], of[:-3]  # speakers of different size
    draws = np.random.default_rng(5).integers(6, size=(300, 6))
    expected = []
    for draw in draws:
        chosen = np.concatenate([np.flatnonzero(of == speaker) for speaker in draw])
        expected.append([reference(run[chosen], y[chosen]) for run in x])
    assert bootstrap(x, y, [f"s{s}" for s in of], 300, seed=5) == pytest.approx(np.array(expected), abs=1e-9)
    assert bootstrap(x + 1e6, y + 1e6, of, 300, seed=5) == pytest.approx(np.array(expected), abs=1e-6)


def test_draws_are_made_in_parts_and_are_the_same_in_whole():
    """100,000 utterances drawn one by one for 10,000 draws would be 8 GB; 14 parts here, the last of another size."""
    rng = np.random.default_rng(0)
    y = rng.standard_normal(30_000)
    x = y + rng.standard_normal(30_000)
    values = bootstrap([x], y, np.arange(len(y)), 450, seed=2)[:, 0]
    for draw, chosen in enumerate(np.random.default_rng(2).integers(len(y), size=(450, len(y)))):
        if draw in (0, 33, 34, 35, 449):
            assert values[draw] == pytest.approx(reference(x[chosen], y[chosen]), abs=1e-9)


def test_runs_share_their_draws_and_an_interval_is_that_of_their_mean():
    """So that differences are paired; identical runs have the interval of one."""
    x, y, of = clustered(np.random.default_rng(4), 12, 5)
    assert (np.ptp(bootstrap([x, x, x], y, of, 50), axis=1) == 0).all()
    assert bootstrap_ci(np.stack([x, x, x]), y, of) == pytest.approx(bootstrap_ci(x, y, of), abs=1e-12)
    runs = np.stack([x, 0.7 * x, y])
    assert bootstrap_ci(runs, y, of) == interval(bootstrap(runs, y, of).mean(1), 12)


def test_the_order_of_rows_does_not_matter():
    """Speakers are drawn in the order of their names."""
    x, y, of = clustered(np.random.default_rng(6), 9, 6)
    order = np.random.default_rng(1).permutation(len(y))
    assert bootstrap_ci(x[order], y[order], of[order]) == pytest.approx(bootstrap_ci(x, y, of), abs=1e-9)


def test_the_interval_of_a_mean_is_as_wide_as_students():
    """What the expansion is for, and what it comes to: with many groups it is the percentile interval."""
    values = np.random.default_rng(0).standard_normal(1_000_000)  # of a mean with standard error sqrt((n - 1) / n)
    for groups, quantile in ((5, 2.776), (10, 2.262), (30, 2.045)):
        low, high = interval(values, groups)
        assert high - low == pytest.approx(2 * quantile * (groups / (groups - 1)) ** 0.5, rel=0.02)
    assert interval(values, 10**9) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-4)
    assert interval(values, 1) is None


def test_the_interval_is_the_same_in_every_run_and_knows_its_seed():
    """Plain numbers, as JSON wants them, in order, around the score."""
    x, y, of = clustered(np.random.default_rng(0), 20, 5)
    low, high = bootstrap_ci(x, y, of)
    assert [low, high] == bootstrap_ci(x, y, of) != bootstrap_ci(x, y, of, seed=1)
    assert type(low) is float
    assert low < reference(x, y) < high


def test_one_speaker_has_no_interval():
    """There is nothing to draw from."""
    x, y, _ = clustered(np.random.default_rng(0), 1, 30)
    assert bootstrap_ci(x, y, ["a"] * 30) is None


def test_draws_of_equal_constants_count_as_zero():
    """Half of the draws from two such speakers hold one value alone: rounding over rounding must not be a CCC."""
    y = np.repeat([0.1, 0.7], 7)
    low, high = bootstrap_ci(y, y, np.repeat(["a", "b"], 7))
    assert low == pytest.approx(0, abs=1e-3)
    assert high == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("speakers", "low", "high"), [(4, 0.83, 0.93), (8, 0.90, 0.97), (40, 0.91, 0.98)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(speakers, low, high):
    """95% within what 400 corpora tell, and a little less with few speakers, as its docstring says."""
    rng, held = np.random.default_rng(7), 0
    for _ in range(400):
        x, y, of = clustered(rng, speakers, 8)
        bottom, top = bootstrap_ci(x, y, of, draws=1000)
        held += bottom <= CLUSTERED_CCC <= top
    assert low <= held / 400 <= high


def test_utterances_in_the_place_of_speakers_would_give_intervals_that_are_too_narrow():
    """Why whole speakers are drawn: the same count with utterances is wrong in more than a fifth of corpora."""
    rng, held = np.random.default_rng(7), 0
    for _ in range(200):
        x, y, _ = clustered(rng, 40, 8)
        bottom, top = bootstrap_ci(x, y, np.arange(len(x)), draws=200)
        held += bottom <= CLUSTERED_CCC <= top
    assert held / 200 < 0.80
