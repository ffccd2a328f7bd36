import pytest
import torch
from torch.testing import assert_close

from consistency.noise import weightings
from consistency.noise.grids import karras_grid
from consistency.noise.levels import lognormal_index

SIGMA_HI = torch.tensor([0.002, 0.5, 2.0, 80.0])
SIGMA_LO = SIGMA_HI / 2


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (weightings.uniform, [1, 1, 1, 1]),
        (weightings.edm, [250_004, 8, 4.25, 4.00015625]),
        (weightings.snr, [250_000, 4, 0.25, 0.00015625]),
        (weightings.snr_plus_one, [250_001, 5, 1.25, 1.00015625]),
        (weightings.truncated_snr, [250_000, 4, 1, 1]),
        (weightings.inverse_gap, [1000, 4, 1, 0.025]),
    ],
)
def test_values(weighting, expected):
    weight = weighting(SIGMA_LO, SIGMA_HI)
    assert weight.shape == SIGMA_HI.shape
    assert_close(weight, torch.tensor(expected, dtype=torch.float32))


def test_edm_depends_on_the_data():
    assert_close(weightings.edm(SIGMA_LO, SIGMA_HI, sigma_data=1.0), weightings.snr_plus_one(SIGMA_LO, SIGMA_HI))


# iCT, Table 1: the mean weight grows 134-fold over the curriculum.
@pytest.mark.parametrize(
    ("num_levels", "first", "last", "mean"), [(11, 67.9313, 0.0288299, 8.42031), (1281, 25584.7, 2.93603, 1129.14)]
)
def test_ict_weights_on_its_grids(num_levels, first, last, mean):
    sigmas = karras_grid(num_levels)
    weight = weightings.inverse_gap(sigmas[:-1], sigmas[1:])
    assert float(weight[0]) == pytest.approx(first, rel=5e-6)
    assert float(weight[-1]) == pytest.approx(last, rel=5e-6)
    assert float((lognormal_index(sigmas) * weight).sum()) == pytest.approx(mean, rel=5e-6)
