from functools import partial

import pytest
import torch
from torch.testing import assert_close

from consistency.methods.distillation import ConsistencyDistillation
from consistency.methods.metrics import l1, l2, pseudo_huber
from consistency.methods.training import ConsistencyTraining
from consistency.models.averages import frozen_copy
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM
from consistency.noise import weightings
from consistency.noise.curricula import FixedDecay
from consistency.noise.grids import karras_grid
from consistency.ops import add_noise
from consistency.sampling.steps import heun_step
from given import AsGiven

PARTS = {
    "levels": AsGiven("pair"),
    "weighting": weightings.uniform,
    "optimizer": torch.optim.SGD,
}


def training(online, target=None, *, metric=l2, **options):
    """CT with a target of its own, or with the online network as its target."""
    method = ConsistencyTraining(online, metric=metric, **{**PARTS, **options})
    method.target = target
    return method


@pytest.fixture
def scene(fixed_random):
    """Images, noise and a pair of levels for each image, which a test may change before it asks for `random`."""

    class Scene:
        images, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
        sigma_lo, sigma_hi = torch.linspace(0.1, 2, 3), torch.linspace(0.2, 5, 3)
        labels = torch.full((3,), -1)

        @property
        def x_hi(self):
            return add_noise(self.images, self.noise, self.sigma_hi)

        @property
        def x_lo(self):
            return add_noise(self.images, self.noise, self.sigma_lo)

        def step(self, method):
            return method.step(self.images, self.labels, 0, fixed_random((self.sigma_lo, self.sigma_hi), self.noise))

    return Scene()


@pytest.mark.parametrize(("name", "metric"), [("l1", l1), ("l2", l2)])
@pytest.mark.parametrize("num_levels", [18, 151])
@pytest.mark.parametrize("kind", ["ct", "cd"])
def test_matches_openai(golden, tiny_network, fixed_random, kind, num_levels, name, metric):
    tensors, _ = golden("openai_losses")
    parts = {**PARTS, "metric": metric, "target_decay": FixedDecay(0.5)}
    networks = {role: tiny_network(scale, shift=0.001) for role, scale in (("online", 1), ("target", 0.9))}
    if kind == "ct":
        method = ConsistencyTraining(Denoiser(networks["online"], EDM(boundary=0.002, noise_scale=250.0)), **parts)
    else:
        teacher = Denoiser(tiny_network(0.8, shift=0.001), EDM(noise_scale=250.0))
        method = ConsistencyDistillation(teacher, solver=heun_step, **parts)
        method.denoiser.network.load_state_dict(networks["online"].state_dict())
    method.target.network.load_state_dict(networks["target"].state_dict())
    from_top = tensors[f"indices_{num_levels}"]
    sigmas = karras_grid(num_levels).float()
    sigma_hi, sigma_lo = sigmas[num_levels - 1 - from_top], sigmas[num_levels - 2 - from_top]
    images = tensors["x_start"]
    labels = torch.full((len(images),), -1)
    step = method.step(images, labels, 0, fixed_random((sigma_lo, sigma_hi), tensors["noise"]))
    # OpenAI's float32 grid is off by up to 4e-5; near-equal predictions add rounding of their own.
    assert_close(step.loss, tensors[f"{kind}_{name}_{num_levels}"], rtol=5e-5, atol=1e-7)


def test_online_network_sees_the_larger_level(make_denoiser, record, scene):
    online = make_denoiser(num_classes=3)
    target = frozen_copy(online)
    seen_online, seen_target = record(online), record(target)
    scene.labels = torch.tensor([0, 1, 2])
    step = scene.step(training(online, target))
    assert len(seen_online) == len(seen_target) == 1
    assert torch.equal(seen_online[0].sigma, scene.sigma_hi)
    assert torch.equal(seen_online[0].x, scene.x_hi)
    assert torch.equal(seen_target[0].sigma, scene.sigma_lo)
    assert torch.equal(seen_target[0].x, scene.x_lo)
    assert seen_online[0].labels is seen_target[0].labels is scene.labels
    assert torch.equal(step.sigma, scene.sigma_hi)
    assert step.log == {"num_levels": 18}


def test_is_weight_times_metric_per_sample(make_denoiser, scene):
    online, target, weight = make_denoiser(), make_denoiser(), torch.tensor([1.0, 10.0, 100.0])
    asked = []

    def weighting(sigma_lo, sigma_hi):
        asked.append((sigma_lo, sigma_hi))
        return weight

    loss = scene.step(training(online, target, metric=l1, weighting=weighting)).loss
    assert loss.shape == (3,)
    assert_close(loss, weight * l1(online(scene.x_hi, scene.sigma_hi), target(scene.x_lo, scene.sigma_lo)))
    ((lo, hi),) = asked
    assert torch.equal(lo, scene.sigma_lo)
    assert torch.equal(hi, scene.sigma_hi)


def test_no_gradient_reaches_a_target_of_its_own(make_denoiser, scene):
    online, target = make_denoiser(), make_denoiser()
    scene.step(training(online, target)).loss.sum().backward()
    assert all(parameter.grad is None for parameter in target.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in online.parameters())


def test_no_gradient_flows_through_the_neighbour(make_denoiser, scene):
    online, target, other = make_denoiser(), make_denoiser(), make_denoiser(boundary=0.0)

    class Solved(ConsistencyTraining):
        def neighbour(self, x, z, sigma_hi, sigma_lo, labels):
            return heun_step(other, add_noise(x, z, sigma_hi), sigma_hi, sigma_lo, labels)

    method = Solved(online, metric=l2, **PARTS)
    method.target = target
    seen = []
    target.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    scene.step(method).loss.sum().backward()
    assert_close(seen[0], heun_step(other, scene.x_hi, scene.sigma_hi, scene.sigma_lo, None).detach())
    assert all(parameter.grad is None for parameter in other.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in online.parameters())


def test_gradient_stops_at_the_target_when_it_is_the_online_network(make_denoiser, scene):
    online = make_denoiser()
    twin = frozen_copy(online)
    gradients = []
    for target in (None, twin):
        online.zero_grad()
        scene.step(training(online, target)).loss.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in online.parameters()])
    for with_itself, with_twin in zip(*gradients, strict=True):
        assert torch.equal(with_itself, with_twin)


@pytest.mark.parametrize("own_target", [True, False])
def test_both_passes_share_one_dropout_mask(make_denoiser, scene, own_target):
    online = make_denoiser(dropout=0.5).train()
    scene.sigma_lo = scene.sigma_hi = torch.full((3,), 2.0)
    outputs = []

    def metric(a, b):
        outputs.extend([a, b])
        return l1(a, b)

    method = training(online, frozen_copy(online) if own_target else None, metric=metric)
    for _ in range(2):
        scene.step(method)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3])
    # The mask is real, and fresh in every step.
    assert not torch.equal(outputs[0], outputs[2])


def test_target_level_zero_means_the_clean_image(make_denoiser, scene):
    # ECT in its first stages: sigma_lo = 0 where sigma_hi is low.
    online = make_denoiser(boundary=0.0)
    scene.sigma_lo[:2] = 0
    told, references = [], []
    online.network.register_forward_pre_hook(lambda _, args: told.append(args[1]))

    def metric(a, b):
        references.append(b)
        return pseudo_huber(a, b, c=0)

    loss = scene.step(training(online, metric=metric, weighting=weightings.inverse_gap)).loss
    assert len(told) == 2
    assert all(c_noise.isfinite().all() for c_noise in told)  # ln 0 reaches no network
    assert torch.equal(references[0][:2], scene.images[:2])
    with torch.no_grad():
        prediction = online(scene.x_hi, scene.sigma_hi)
        reference = online(scene.x_lo[2:], scene.sigma_lo[2:])
    assert_close(references[0][2:], reference)
    assert_close(loss[:2], (prediction - scene.images)[:2].flatten(1).norm(dim=1) / scene.sigma_hi[:2])
    loss.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in online.parameters())


@pytest.mark.parametrize("level", [0.001, 0.002])
def test_target_level_at_or_below_the_boundary_means_its_input(make_denoiser, scene, level):
    online = make_denoiser(boundary=0.002)
    scene.sigma_lo[:2] = level
    references = []

    def metric(a, b):
        references.append(b)
        return l2(a, b)

    scene.step(training(online, metric=metric))
    assert torch.equal(references[0][:2], scene.x_lo[:2])
    assert not torch.equal(references[0][2], scene.x_lo[2])


def test_no_gap_left_to_close_gives_no_gradient(make_denoiser, scene):
    # Where online and target agree exactly, the root in the plain norm must not turn into NaN.
    online = make_denoiser()
    scene.sigma_lo = scene.sigma_hi = torch.ones(3)
    loss = scene.step(training(online, metric=partial(pseudo_huber, c=0))).loss
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(3))
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in online.parameters())
