import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from consistency.models.denoiser import Denoiser, consistency_scalings, edm_scalings


# sigma: c_skip, c_out, c_in. EDM Table 1; CM App. C.
@pytest.mark.parametrize(
    ("scalings", "sigma", "skip", "out", "c_in"),
    [
        (edm_scalings, 0.002, 0.999984, 0.001999984, 1.999984),
        (edm_scalings, 0.5, 0.5, 0.353553391, 1.41421356),
        (edm_scalings, 80.0, 3.906097e-5, 0.499990235, 0.01249976),
        (consistency_scalings, 0.002, 1.0, 0.0, 1.999984),
        (consistency_scalings, 0.5, 0.502004, 0.352139177, 1.41421356),
        (consistency_scalings, 80.0, 3.906293e-5, 0.499977735, 0.01249976),
    ],
)
def test_scalings(scalings, sigma, skip, out, c_in):
    computed = scalings(torch.tensor([sigma], dtype=torch.float64))
    for value, expected in zip(computed, (skip, out, c_in), strict=True):
        assert float(value) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.616])
def test_edm_scalings_give_the_network_unit_variance(sigma_data):
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)
    c = edm_scalings(sigma, sigma_data=sigma_data)
    assert_close(c.input**2 * (sigma**2 + sigma_data**2), torch.ones_like(sigma))
    # Var of the network's target, (x - c_skip (x + sigma z)) / c_out.
    assert_close(((1 - c.skip) ** 2 * sigma_data**2 + (c.skip * sigma) ** 2) / c.out**2, torch.ones_like(sigma))


# Beside the papers' 0.5 some values of sd with sd^2 / (0 + sd^2) = 1 - 6e-8 in float32.
@pytest.mark.parametrize("sigma_data", [0.5, 0.48, 0.617, 0.65, 1.0])
@pytest.mark.parametrize("boundary", [0.002, 0.003, 0.01])
def test_boundary_condition_is_exact(make_unet, boundary, sigma_data):
    model = Denoiser(make_unet(), boundary=boundary, sigma_data=sigma_data)
    x = 3 * torch.randn(4, 1, 4, 4)
    assert torch.equal(model(x, torch.full((4,), boundary)), x)
    assert not torch.equal(model(x, torch.full((4,), 2 * boundary)), x)


def test_edm_has_no_boundary_at_sigma_min(make_denoiser):
    x = torch.randn(4, 1, 4, 4)
    assert not torch.equal(make_denoiser(boundary=0.0)(x, torch.full((4,), 0.002)), x)


class Recorder(nn.Module):
    in_channels, image_size, num_classes = 1, 4, 0

    def forward(self, x, c_noise, labels):
        self.x, self.c_noise, self.labels = x, c_noise, labels
        return torch.ones_like(x)


@pytest.mark.parametrize("noise_scale", [0.25, 250.0])
def test_c_noise(noise_scale):
    sigma = torch.tensor([0.002, 0.1, 0.5, 1.0, 80.0])
    network = Recorder()
    Denoiser(network, noise_scale=noise_scale)(torch.zeros(5, 1, 4, 4), sigma)
    expected = torch.tensor([-1.5536520, -0.5756463, -0.1732868, 0.0, 1.0955067]) * noise_scale / 0.25
    assert_close(network.c_noise, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("boundary", [0.0, 0.002])
def test_forward_is_its_formula(boundary):
    sigma, x = torch.tensor([0.01, 0.5, 80.0]), torch.randn(3, 1, 4, 4)
    network = Recorder()
    out = Denoiser(network, boundary=boundary)(x, sigma)
    for row in range(3):
        c = consistency_scalings(sigma[row], boundary=boundary)
        assert_close(network.x[row], c.input * x[row])
        assert_close(out[row], c.skip * x[row] + c.out)


def test_output_is_float32_whatever_the_precision_of_the_network(make_denoiser):
    model, x = make_denoiser(), torch.randn(2, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, torch.full((2,), 0.002))
    assert out.dtype == torch.float32
    assert torch.equal(out, x)
    assert model(x.double(), torch.ones(2, dtype=torch.float64)).dtype == torch.float32


def test_labels_reach_only_conditional_networks():
    network, x, sigma = Recorder(), torch.zeros(2, 1, 4, 4), torch.ones(2)
    Denoiser(network)(x, sigma, torch.tensor([0, 1]))
    assert network.labels is None
    network.num_classes = 2
    Denoiser(network)(x, sigma, torch.tensor([0, 1]))
    assert network.labels.tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_refuses_levels_of_another_shape(make_denoiser, shape):
    with pytest.raises(ValueError, match=r"sigma must have shape \[2\]"):
        make_denoiser()(torch.zeros(2, 1, 4, 4), torch.ones(shape))


@pytest.mark.parametrize("options", [{"sigma_data": 0}, {"sigma_min": 0}, {"sigma_min": 90.0}])
def test_refuses_impossible_levels(options):
    with pytest.raises(ValueError, match="sigma"):
        Denoiser(Recorder(), **options)


def test_config_rebuilds_the_model(make_unet):
    model = Denoiser(
        make_unet(num_classes=3, fourier_scale=0.02),
        boundary=0.01,
        sigma_data=0.6,
        sigma_min=0.01,
        sigma_max=50.0,
        noise_scale=250.0,
    )
    again = Denoiser.from_config(model.config)
    again.load_state_dict(model.state_dict())
    x, sigma, labels = torch.randn(3, 1, 4, 4), torch.tensor([0.01, 1.0, 50.0]), torch.tensor([0, 1, 2])
    assert torch.equal(again(x, sigma, labels), model(x, sigma, labels))
    assert again.config == model.config
    assert again.image_shape == (1, 4, 4)
    assert again.num_classes == 3


def test_state_of_another_model_is_refused(make_denoiser):
    # The weights would fit: only the stated configuration tells f from D.
    with pytest.raises(ValueError, match=r"boundary is 0\.002 here, 0\.0 there"):
        make_denoiser(boundary=0.002).load_state_dict(make_denoiser(boundary=0.0).state_dict())


def test_log_of_sigma_is_taken_in_float32(make_denoiser):
    network = Recorder()
    sigma = torch.tensor([1e-3, 79.0])
    with torch.autocast("cpu", torch.bfloat16):
        Denoiser(network, noise_scale=250.0)(torch.zeros(2, 1, 4, 4), sigma)
    assert_close(network.c_noise, torch.tensor([250 * math.log(1e-3), 250 * math.log(79.0)]), rtol=1e-6, atol=0)
