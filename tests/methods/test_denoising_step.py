import pytest
import torch
from torch.testing import assert_close

from consistency.methods.edm import EDM
from consistency.models import parametrization
from consistency.models.denoiser import Denoiser
from consistency.noise import weightings
from given import AsGiven

WEIGHTINGS = {
    "karras": weightings.edm,
    "snr": weightings.snr,
    "snr+1": weightings.snr_plus_one,
    "truncated-snr": weightings.truncated_snr,
    "uniform": weightings.uniform,
}


class Answers:
    """In place of a denoiser: a function of the noisy images, and a list of its calls."""

    boundary = 0.0

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, x, sigma, labels, **extra):
        self.calls.append((sigma, labels, extra))
        return self.answer(x)


def edm(denoiser, weighting=weightings.uniform):
    return EDM(denoiser, levels=AsGiven("level"), weighting=weighting, optimizer=torch.optim.SGD)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_matches_openai(golden, tiny_network, fixed_random, name):
    tensors, _ = golden("openai_losses")
    model = Denoiser(tiny_network(shift=0.001), parametrization.EDM(noise_scale=250.0))
    images, sigma = tensors["x_start"], tensors["edm_sigmas"]
    random, labels = fixed_random(sigma, tensors["noise"]), torch.full((len(images),), -1)
    loss = edm(model, WEIGHTINGS[name]).step(images, labels, 0, random).loss
    assert_close(loss, tensors[f"edm_{name}"], rtol=5e-5, atol=0)


def test_is_its_formula_per_sample(fixed_random):
    images, noise = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    sigma, weight, labels = torch.tensor([0.1, 1.0, 10.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 2])
    asked, identity = [], Answers(lambda x: x)

    def weighting(*levels):
        asked.append(levels)
        return weight

    step = edm(identity, weighting).step(images, labels, 0, fixed_random(sigma, noise))
    assert_close(step.loss, weight * sigma**2 * noise.square().mean(dim=(1, 2, 3)))
    assert identity.calls == [(sigma, labels, {})]
    assert asked == [(sigma, sigma)]
    assert step.sigma is sigma
    assert step.log == {}


def test_network_is_told_what_was_done_to_the_images(fixed_random):
    images, done, model = torch.randn(3, 1, 2, 2), torch.randn(3, 9), Answers(lambda x: x)
    random, labels = fixed_random(torch.ones(3), torch.randn_like(images)), torch.zeros(3, dtype=torch.int64)
    edm(model).step(images, labels, 0, random, augment_labels=done)
    assert model.calls[0][2] == {"augment_labels": done}


def test_perfect_denoiser_has_no_loss(fixed_random):
    images = torch.randn(3, 1, 2, 2)
    random = fixed_random(torch.ones(3), torch.randn_like(images))
    loss = edm(Answers(lambda _: images)).step(images, torch.full((3,), -1), 0, random).loss
    assert torch.equal(loss, torch.zeros(3))
