import pytest
import torch
from torch.testing import assert_close

from consistency.noise.grids import check_range, descending_with_zero, karras_grid

# EDM Eq. 5 in float64, increasing.
GRID_18 = [
    *(0.002, 0.00752802, 0.0229345, 0.0599473, 0.139516, 0.296442, 0.585348, 1.08817, 1.92334),
    *(3.25682, 5.31519, 8.40094, 12.9101, 19.3525, 28.3746, 40.7856, 57.586, 80.0),
]
GRID_11 = [0.002, 0.0167208, 0.0850872, 0.318283, 0.965417, 2.51522, 5.83895, 12.3816, 24.4083, 45.3137, 80.0]


@pytest.mark.parametrize("expected", [GRID_11, GRID_18], ids=len)
def test_values(expected):
    assert_close(karras_grid(len(expected)), torch.tensor(expected, dtype=torch.float64), rtol=5e-6, atol=1e-9)


# Indices of OpenAI's code count from the top of the same grid.
@pytest.mark.parametrize(
    ("from_top", "sigma"), [(1, 69.450946), (16, 5.38), (20, 2.2404398), (21, 1.7672028), (22, 1.382368), (39, 0.002)]
)
def test_openai_indices_of_40_levels(from_top, sigma):
    assert float(karras_grid(40)[39 - from_top]) == pytest.approx(sigma, rel=1e-6)


# Nearest grid points to the mid levels that iCT publishes for two-step sampling.
@pytest.mark.parametrize(("n", "sigma"), [(492, 0.820867), (571, 1.525766), (466, 0.660979), (513, 0.973183)])
def test_ict_mid_levels_lie_on_the_last_grid(n, sigma):
    assert float(karras_grid(1281)[n]) == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("num_levels", [2, 3, 18, 1281])
def test_increasing_with_exact_ends(num_levels):
    sigmas = karras_grid(num_levels)
    assert sigmas.shape == (num_levels,)
    assert sigmas.dtype == torch.float64
    assert (sigmas.diff() > 0).all()
    assert sigmas[0] == 0.002
    assert sigmas[-1] == 80
    # The grid is used in float32: the lower end must still be the boundary of the model, bit for bit.
    assert sigmas.float()[0] == torch.tensor(0.002)


def test_rho_one_is_linear():
    assert_close(karras_grid(5, sigma_min=1, sigma_max=3, rho=1), torch.linspace(1, 3, 5, dtype=torch.float64))


def test_sampler_levels_are_the_same_grid_reversed_and_a_zero():
    sigmas = descending_with_zero(18)
    assert_close(sigmas[:-1].flip(0), karras_grid(18), rtol=0, atol=0)
    assert sigmas[-1] == 0


def test_one_sampler_step_starts_at_sigma_max():
    assert descending_with_zero(1, sigma_max=50).tolist() == [50, 0]


@pytest.mark.parametrize("num_steps", [5, 18, 40])
def test_sampler_levels_match_openai(golden, num_steps):
    theirs = golden("openai_samplers")[0][f"sigmas_{num_steps}"]
    assert_close(descending_with_zero(num_steps).float(), theirs, rtol=5e-5, atol=0)


@pytest.mark.parametrize("num_levels", [1, 0, -3])
def test_refuses_a_grid_without_a_gap(num_levels):
    with pytest.raises(ValueError, match=f"at least 2.*got {num_levels}"):
        karras_grid(num_levels)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (1, 1), (2, 1)])
def test_refuses_levels_out_of_order(low, high):
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        check_range(low, high)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        karras_grid(4, sigma_min=low, sigma_max=high)
