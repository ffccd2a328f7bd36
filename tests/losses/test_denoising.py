import pytest
import torch
from torch.testing import assert_close

from consistency.losses.denoising import denoising_loss
from consistency.models.denoiser import Denoiser
from consistency.noise import weightings

WEIGHTINGS = {
    "karras": weightings.edm,
    "snr": weightings.snr,
    "snr+1": weightings.snr_plus_one,
    "truncated-snr": weightings.truncated_snr,
    "uniform": weightings.uniform,
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_matches_openai(golden, tiny_network, name):
    tensors, _ = golden("openai_losses")
    model = Denoiser(tiny_network(shift=0.001), boundary=0.0, noise_scale=250.0)
    sigma = tensors["edm_sigmas"]
    weight = WEIGHTINGS[name](sigma, sigma)
    loss = denoising_loss(model, tensors["x_start"], tensors["noise"], sigma, weight=weight)
    assert_close(loss, tensors[f"edm_{name}"], rtol=5e-5, atol=0)


def test_is_its_formula_per_sample():
    images, noise = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    sigma, weight, labels = torch.tensor([0.1, 1.0, 10.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 2])
    calls = []

    def identity(x, sigma, labels):
        calls.append((sigma, labels))
        return x

    loss = denoising_loss(identity, images, noise, sigma, weight=weight, labels=labels)
    assert_close(loss, weight * sigma**2 * noise.square().mean(dim=(1, 2, 3)))
    assert calls == [(sigma, labels)]


def test_perfect_denoiser_has_no_loss():
    images = torch.randn(3, 1, 2, 2)
    loss = denoising_loss(lambda *_: images, images, torch.randn_like(images), torch.ones(3), weight=torch.ones(3))
    assert torch.equal(loss, torch.zeros(3))
