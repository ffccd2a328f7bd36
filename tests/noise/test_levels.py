import pytest
import torch
from torch.testing import assert_close

from consistency.noise.curricula import DoublingLevels, FixedLevels
from consistency.noise.grids import karras_grid
from consistency.noise.levels import FixedLevel, GridPairs, LogNormal, RatioPairs, lognormal_index, uniform_index


def evenly(count):
    """u in the middle of `count` equal intervals: what is computed of it has the distribution, without chance."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_index_distribution_of_ict_on_11_levels():
    expected = [0.062633, 0.181737, 0.245501, 0.213494, 0.142446, 0.080605, 0.041080, 0.019580, 0.008944, 0.003980]
    probabilities = lognormal_index(karras_grid(11))
    assert_close(probabilities, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-7)


def test_index_distribution_of_ict_on_1281_levels():
    probabilities = lognormal_index(karras_grid(1281))
    assert probabilities.shape == (1280,)
    assert int(probabilities.argmax()) == 329
    for n, expected in {0: 1.49821e-4, 1: 1.53132e-4, 329: 1.955689e-3, 1279: 2.01095e-5}.items():
        assert float(probabilities[n]) == pytest.approx(expected, rel=5e-6)


def test_index_distribution_moves_with_its_mean():
    # +1.1 is the sign error of public re-implementations.
    probabilities = lognormal_index(karras_grid(11), mean=1.1)
    assert float(probabilities[0]) == pytest.approx(0.004839, abs=6e-7)
    assert float(probabilities[-1]) == pytest.approx(0.038994, abs=6e-7)


@pytest.mark.parametrize("index", [uniform_index, lognormal_index])
@pytest.mark.parametrize("num_levels", [2, 3, 1281])
def test_index_distributions_are_distributions(index, num_levels):
    probabilities = index(karras_grid(num_levels))
    assert probabilities.shape == (num_levels - 1,)
    assert (probabilities > 0).all()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)


def test_uniform_index_is_flat():
    assert set(uniform_index(karras_grid(5)).tolist()) == {0.25}


@pytest.mark.parametrize("index", [uniform_index, lognormal_index])
def test_grid_pairs_are_neighbours_drawn_with_the_index_distribution(index):
    sigmas, num = karras_grid(11).float(), 40_000
    sigma_lo, sigma_hi = GridPairs(FixedLevels(11), index)(0, evenly(num))
    n = torch.searchsorted(sigmas, sigma_lo)
    assert torch.equal(sigmas[n], sigma_lo)
    assert torch.equal(sigmas[n + 1], sigma_hi)
    frequencies = torch.bincount(n, minlength=10).double() / num
    assert_close(frequencies, index(karras_grid(11)), rtol=0, atol=1 / num)


def test_grid_pairs_reach_both_ends():
    sigma_lo, sigma_hi = GridPairs(FixedLevels(40), uniform_index)(0, evenly(4000))
    assert sigma_lo.min() == torch.tensor(0.002)
    assert sigma_hi.max() == 80
    assert float(sigma_hi.min()) == pytest.approx(0.00367659, rel=1e-5)
    assert float(sigma_lo.max()) == pytest.approx(69.450946, rel=1e-6)
    assert sigma_lo.dtype == sigma_hi.dtype == torch.float32


def test_two_levels_have_one_pair():
    sigma_lo, sigma_hi = GridPairs(FixedLevels(2), lognormal_index)(0, evenly(5))
    assert set(sigma_hi.tolist()) == {80}
    assert torch.equal(sigma_lo, torch.full((5,), 0.002))


def test_grid_follows_the_curriculum():
    draw = GridPairs(DoublingLevels(start=1, end=4, total_steps=3), uniform_index, sigma_min=1, sigma_max=5, rho=1)
    for step, num_levels in enumerate([2, 3, 5]):
        sigma_lo, sigma_hi = draw(step, evenly(100))
        assert_close(sigma_hi - sigma_lo, torch.full((100,), 4 / (num_levels - 1)))
        assert draw.describe(step) == {"num_levels": num_levels}


def test_lognormal_moments():
    log_sigma = LogNormal(mean=-1.2, std=1.2)(0, evenly(40_000)).log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=1e-4)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=1e-3)


def test_lognormal_quantiles():
    u = torch.tensor([0.0, 0.5, 0.8413447460685429, 1 - 2.0**-53], dtype=torch.float64)
    lowest, median, above, highest = LogNormal(mean=-1.2, std=1.2)(0, u).log().tolist()
    assert median == pytest.approx(-1.2, abs=1e-6)
    assert above == pytest.approx(0.0, abs=1e-6)  # one standard deviation
    assert lowest == pytest.approx(-1.2 - 1.2 * 8.29, abs=0.02)  # u = 0 is drawn, rarely, and must not be sigma = 0
    assert highest == pytest.approx(-1.2 + 1.2 * 8.21, abs=0.02)


@pytest.mark.parametrize("levels", [GridPairs(FixedLevels(7), lognormal_index), RatioPairs(steps_per_stage=1)])
def test_levels_rise_with_u_up_to_its_ends(levels):
    u = torch.cat([torch.zeros(1), evenly(1000), torch.tensor([1 - 2.0**-53], dtype=torch.float64)])
    for sigma in levels(3, u):
        assert torch.isfinite(sigma).all()
        assert (sigma.diff() >= 0).all()
    assert levels(3, u)[0].dtype == torch.float32


def test_one_level_for_all():
    assert torch.equal(FixedLevel(0.3)(0, evenly(3)), torch.full((3,), 0.3))


# ECT with q = 2, k = 8, b = 1: sigma_lo / sigma_hi by stage.
@pytest.mark.parametrize(
    ("stage", "sigma", "ratio"),
    [
        (0, 0.1, 0.0),
        (0, 1.0, 0.0),
        (0, 5.0, 0.47323),
        (0, 80.0, 0.5),
        (1, 0.1, 0.0),
        (1, 1.0, 0.21212),
        (1, 80.0, 0.75),
        (2, 0.01, 0.37750),
        (7, 0.01, 0.98055),
        (7, 80.0, 0.99609),
    ],
)
def test_ratios_of_ect(stage, sigma, ratio):
    draw = RatioPairs(steps_per_stage=100)
    for step in (100 * stage, 100 * stage + 99):
        assert float(draw.ratio(torch.tensor(sigma), step)) == pytest.approx(ratio, abs=6e-6)
        assert draw.describe(step) == {"stage": stage}


def test_one_hour_recipe_of_ect_starts_at_stage_seven():
    sigma = torch.logspace(-3, 2, 20)
    fast, slow = RatioPairs(steps_per_stage=1, q=256), RatioPairs(steps_per_stage=1)
    assert_close(fast.ratio(sigma, 0), slow.ratio(sigma, 7), rtol=0, atol=0)


def test_ratio_pairs():
    draw = RatioPairs(steps_per_stage=10)
    sigma_lo, sigma_hi = draw(0, evenly(40_000))
    assert float(sigma_hi.log().mean()) == pytest.approx(-1.1, abs=0.05)
    assert float(sigma_hi.log().std()) == pytest.approx(2.0, abs=0.05)
    assert (sigma_lo < sigma_hi).all()
    assert (sigma_lo[sigma_hi <= 1] == 0).all()
    assert (sigma_lo[sigma_hi > 2] > 0).all()
    assert_close(sigma_lo, sigma_hi * draw.ratio(sigma_hi, 0))


def test_constant_ratios():
    assert float(RatioPairs(steps_per_stage=1, q=4, k=0).ratio(torch.tensor(0.01), 1)) == 0.9375


@pytest.mark.parametrize(
    ("options", "message"), [({"steps_per_stage": 0}, "steps_per_stage"), ({"steps_per_stage": 1, "q": 1}, "q must")]
)
def test_ratio_pairs_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        RatioPairs(**options)
