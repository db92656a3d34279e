"""What `metrics` promises: CCC as published, a loss of the whole batch, and intervals that know of speakers."""

import numpy as np
import pytest
import torch

from metrics import bootstrap_ci, ccc, ccc_loss


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


def test_the_interval_is_the_one_of_resampled_speakers():
    """Sums over speakers with multinomial weights are the same draws as utterances gathered speaker by speaker."""
    x, y, of = clustered(np.random.default_rng(3), 6, 4)
    x, y, of = x[:-3], y[:-3], of[:-3]  # speakers of different size
    draws = np.random.default_rng(5).multinomial(6, np.full(6, 1 / 6), size=300)
    values = []
    for draw in draws:
        chosen = np.concatenate([np.flatnonzero(of == speaker) for speaker in np.repeat(np.arange(6), draw)])
        values.append(reference(x[chosen], y[chosen]))
    expected = np.percentile(values, [2.5, 97.5])
    assert bootstrap_ci(x, y, [f"s{s}" for s in of], draws=300, seed=5) == pytest.approx(expected, abs=1e-9)
    assert bootstrap_ci(x + 1e4, y + 1e4, of, draws=300, seed=5) == pytest.approx(expected, abs=1e-6)


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


def test_the_interval_holds_the_truth_about_as_often_as_it_says_and_only_by_speaker():
    """95% within what 40 speakers allow; drawing utterances would give an interval that is wrong twice as often."""
    rng, by_speaker, by_utterance = np.random.default_rng(7), 0, 0
    for _ in range(300):
        x, y, of = clustered(rng, 40, 8)
        low, high = bootstrap_ci(x, y, of, draws=400)
        by_speaker += low <= CLUSTERED_CCC <= high
        low, high = bootstrap_ci(x, y, np.arange(len(x)), draws=200)
        by_utterance += low <= CLUSTERED_CCC <= high
    assert 0.90 <= by_speaker / 300 <= 0.98
    assert by_utterance / 300 < 0.80
