import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM
from consistency.noise.grids import descending_with_zero, karras_grid
from consistency.ops import randn_of_seeds
from consistency.sampling.samplers import (
    ConsistencySampler,
    OdeSampler,
    sample_ancestral,
    sample_dpm2,
    sample_euler,
    sample_heun,
    sample_multistep,
    sample_onestep,
)

ODE_SAMPLERS = [sample_euler, sample_heun, sample_dpm2, sample_ancestral]


def posterior_mean(mu, sd):
    """The exact denoiser of data N(mu, sd^2)."""

    def denoiser(x, sigma, labels=None):
        return mu + (x - mu) * (sd**2 / (sigma**2 + sd**2)).view(-1, 1, 1, 1)

    return denoiser


def counted(denoiser):
    seen = []

    def wrapped(x, sigma, labels=None):
        assert sigma.shape == (len(x),)
        seen.append(float(sigma[0]))
        return denoiser(x, sigma, labels)

    return wrapped, seen


def numbered_noise(seed):
    """The golden files' noise: draw j comes from PCG64(seed + 1000 j)."""
    seeds = iter(range(seed, 10**9, 1000))

    def randn_like(x):
        draw = np.random.Generator(np.random.PCG64(next(seeds))).standard_normal(tuple(x.shape), np.float32)
        return torch.from_numpy(draw).to(x)

    return randn_like


@pytest.fixture
def openai(golden):
    tensors, note = golden("openai_samplers")
    return tensors, posterior_mean(note["mu"], note["sd"]), note


# OpenAI's grids are float32; its ancestral sampler loses more in the last levels.
@pytest.mark.parametrize("num_steps", [5, 18, 40])
@pytest.mark.parametrize(
    ("name", "sampler", "seed", "rtol"),
    [
        ("euler", sample_euler, 1, 5e-5),
        ("heun", sample_heun, 1, 5e-5),
        ("heun_churn", sample_heun, 2, 5e-5),
        ("dpm2", sample_dpm2, 1, 5e-5),
        ("ancestral", sample_ancestral, 1, 1e-4),
    ],
)
def test_ode_samplers_match_openai(openai, name, sampler, seed, rtol, num_steps):
    tensors, denoiser, note = openai
    options = note["churn"] if name == "heun_churn" else {}
    start = tensors["x_T"].double()
    images = sampler(denoiser, start, descending_with_zero(num_steps), randn_like=numbered_noise(seed), **options)
    assert_close(images.float(), tensors[f"{name}_{num_steps}"], rtol=rtol, atol=1e-6)


def test_churn_changes_the_sample(openai):
    # Otherwise the comparison above would say nothing about churn.
    tensors, *_ = openai
    assert not torch.allclose(tensors["heun_18"], tensors["heun_churn_18"], rtol=1e-2)


def test_onestep_matches_openai(openai):
    tensors, denoiser, _ = openai
    images = sample_onestep(denoiser, tensors["x_T"].double(), torch.tensor([80.0, 1.0], dtype=torch.float64))
    assert_close(images.float(), tensors["onestep"], rtol=5e-5, atol=0)


@pytest.mark.parametrize(("from_top", "num_levels"), [((0, 22), 40), ((0, 17, 25), 40), ((0, 106), 201)])
def test_multistep_matches_openai(openai, from_top, num_levels):
    tensors, denoiser, _ = openai
    sigmas = karras_grid(num_levels).flip(0)[list(from_top)]
    images = sample_multistep(denoiser, tensors["x_T"].double(), sigmas, randn_like=numbered_noise(3))
    name = "_".join(map(str, (*from_top, num_levels - 1)))
    assert_close(images.float(), tensors[f"multistep_{name}_of_{num_levels}"], rtol=5e-5, atol=1e-6)


# Data N(0, 0.5^2), from x = 80 at level 80; the exact flow ends at 0.499990235.
@pytest.mark.parametrize(
    ("sampler", "num_steps", "expected"),
    [
        (sample_euler, 18, 0.423031436),
        (sample_heun, 18, 0.527624637),
        (sample_dpm2, 18, 0.509593534),
        (sample_ancestral, 18, 0.003124878),
        (sample_euler, 40, 0.464850774),
        (sample_heun, 40, 0.504876865),
        (sample_dpm2, 40, 0.501811341),
        (sample_ancestral, 40, 0.003124878),
    ],
)
def test_closed_form(sampler, num_steps, expected):
    start = torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    image = sampler(posterior_mean(0.0, 0.5), start, descending_with_zero(num_steps), randn_like=torch.zeros_like)
    assert float(image) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1), (sample_heun, 2), (sample_dpm2, 2)])
def test_ode_samplers_approach_the_exact_flow(sampler, order):
    start = torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    errors = [
        abs(float(sampler(posterior_mean(0.0, 0.5), start, descending_with_zero(num))) - 0.499990235)
        for num in (50, 200)
    ]
    assert errors[0] / errors[1] == pytest.approx(4**order, rel=0.2)


@pytest.mark.parametrize(
    ("sampler", "evaluations"), [(sample_euler, 18), (sample_heun, 35), (sample_dpm2, 36), (sample_ancestral, 18)]
)
def test_number_of_evaluations(sampler, evaluations):
    denoiser, seen = counted(posterior_mean(0.0, 0.5))
    sampler(denoiser, torch.randn(2, 1, 2, 2), descending_with_zero(18))
    assert len(seen) == evaluations
    assert seen[0] == 80
    assert min(seen) > 0  # a network cannot see ln 0


def test_ancestral_noise_of_one_step():
    # From 80 to the next of 40 levels: down to 60.29, then up by 34.47.
    asked = []

    def randn_like(x):
        asked.append(x.clone())
        return torch.ones_like(x)

    def zero(x, sigma, labels):
        inputs.append(x)
        return torch.zeros_like(x)

    inputs, start = [], torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    sigmas = torch.tensor([80.0, 69.450946, 0.0], dtype=torch.float64)
    sample_ancestral(zero, start, sigmas, randn_like=randn_like)
    assert float(asked[0]) == pytest.approx(60.292924, abs=2e-6)
    assert float(inputs[1]) == pytest.approx(60.292924 + 34.470237, abs=2e-6)


def test_multistep_renoises_to_the_boundary_level():
    inputs = []

    def zero(x, sigma, labels=None):
        inputs.append((x, float(sigma[0])))
        return torch.zeros_like(x)

    start = torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    sigmas = torch.tensor([80.0, 1.3823680], dtype=torch.float64)
    image = sample_multistep(zero, start, sigmas, randn_like=torch.ones_like)
    assert [sigma for _, sigma in inputs] == [80.0, 1.3823680]
    assert float(inputs[1][0]) == pytest.approx(math.sqrt(1.3823680**2 - 0.002**2), abs=1e-12)
    assert float(inputs[1][0]) == pytest.approx(1.382366510, abs=1e-7)
    assert float(image) == 0


def test_multistep_with_the_exact_function_keeps_the_distribution():
    # f of data N(0, 0.5^2) maps every level to that of sigma_min; re-noising must not widen it.
    def exact(x, sigma, labels=None):
        return x * ((0.25 + 0.002**2) / (0.25 + sigma**2)).sqrt().view(-1, 1, 1, 1)

    start = 80 * torch.randn(20_000, 1, 1, 1)
    images = sample_multistep(exact, start, torch.tensor([80.0, 5.0, 0.5]))
    assert float(images.std()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("levels", [[], [0.8, 80.0], [80.0, 80.0], [80.0, 1.0, 2.0], [80.0, 0.002], [80.0, 0.0]])
def test_multistep_refuses_levels(levels):
    with pytest.raises(ValueError, match="must decrease"):
        sample_multistep(posterior_mean(0.0, 0.5), torch.zeros(1, 1, 1, 1), torch.tensor(levels, dtype=torch.float64))


@pytest.mark.parametrize("sampler", ODE_SAMPLERS)
@pytest.mark.parametrize("levels", [[80.0], [0.0, 80.0], [80.0, 1.0], [80.0, 1.0, 1.0, 0.0]])
def test_ode_samplers_refuse_levels(sampler, levels):
    with pytest.raises(ValueError, match="must decrease and end in 0"):
        sampler(posterior_mean(0.0, 0.5), torch.zeros(1, 1, 1, 1), torch.tensor(levels))


@pytest.mark.parametrize("solver", [*ODE_SAMPLERS, partial(sample_heun, s_churn=40.0)])
def test_images_depend_on_their_own_seeds_only(solver, make_denoiser):
    model = make_denoiser(boundary=0.0)
    samples = {}
    for seeds in ([3, 4], [9, 3, 5]):
        randn_like = randn_of_seeds(seeds, model.image_shape)
        noise = randn_like(torch.empty(len(seeds), *model.image_shape, dtype=torch.float64))
        samples[len(seeds)] = OdeSampler(solver, num_steps=4)(model, noise, randn_like=randn_like)
    assert_close(samples[2][0], samples[3][1], rtol=1e-5, atol=1e-5)
    assert samples[2].dtype == torch.float64


def test_multistep_images_depend_on_their_own_seeds_only(make_denoiser):
    model = make_denoiser()
    samples = {}
    for seeds in ([3, 4], [9, 3, 5]):
        randn_like = randn_of_seeds(seeds, model.image_shape)
        noise = randn_like(torch.empty(len(seeds), *model.image_shape))
        samples[len(seeds)] = ConsistencySampler([2.0, 0.5])(model, noise, randn_like=randn_like)
    assert_close(samples[2][0], samples[3][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sampler", [ConsistencySampler(), ConsistencySampler([0.821]), OdeSampler(sample_heun, num_steps=3)]
)
def test_samplers_start_at_the_models_own_sigma_max(sampler, make_unet, record):
    model = Denoiser(make_unet(num_classes=2), EDM(boundary=0.01), sigma_min=0.01, sigma_max=50.0)
    calls, noise, labels = record(model), torch.randn(2, *model.image_shape), torch.tensor([0, 1])
    images = sampler(model, noise, labels)
    assert images.shape == noise.shape
    assert not images.requires_grad
    assert_close(calls[0].x, 50 * noise)
    assert calls[0].sigma.tolist() == [50, 50]
    assert all(call.labels is labels for call in calls)
    if isinstance(sampler, ConsistencySampler):
        assert len(calls) == 1 + len(sampler.mid_sigmas)


def test_consistency_sampler_renoises_with_the_models_sigma_min(make_unet, record):
    model = Denoiser(make_unet(), EDM(boundary=0.3), sigma_min=0.3)
    calls = record(model)
    noise = torch.randn(1, *model.image_shape)
    ConsistencySampler([0.5])(model, noise, randn_like=torch.ones_like)
    first = model(80 * noise, torch.tensor([80.0]))
    assert_close(calls[1].x - first, torch.full_like(first, 0.4), rtol=1e-4, atol=1e-4)


def test_ode_sampler_covers_the_models_range(make_unet, record):
    model = Denoiser(make_unet(), EDM(), sigma_min=0.01, sigma_max=50.0)
    calls = record(model)
    OdeSampler(sample_euler, num_steps=4, rho=3.0)(model, torch.randn(1, *model.image_shape))
    expected = karras_grid(4, sigma_min=0.01, sigma_max=50.0, rho=3.0).flip(0).float()
    assert_close(torch.cat([call.sigma for call in calls]), expected)


def test_ode_sampler_refuses_zero_steps():
    with pytest.raises(ValueError, match="at least 1"):
        OdeSampler(sample_euler, num_steps=0)
