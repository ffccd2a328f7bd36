import pytest
import torch
from torch.testing import assert_close

from consistency.losses.consistency import consistency_loss
from consistency.losses.metrics import l1, l2, pseudo_huber
from consistency.models.averages import frozen_copy
from consistency.models.denoiser import Denoiser
from consistency.noise.grids import karras_grid
from consistency.ops import append_dims
from consistency.sampling.steps import heun_step


def pair(batch=3, size=4):
    """x_hi, x_lo, sigma_hi, sigma_lo of one trajectory."""
    images, noise = torch.randn(batch, 1, size, size), torch.randn(batch, 1, size, size)
    sigma_lo, sigma_hi = torch.linspace(0.1, 2, batch), torch.linspace(0.2, 5, batch)
    x_hi, x_lo = (images + append_dims(sigma, 4) * noise for sigma in (sigma_hi, sigma_lo))
    return {"x_hi": x_hi, "x_lo": x_lo, "sigma_hi": sigma_hi, "sigma_lo": sigma_lo}


@pytest.mark.parametrize(("name", "metric"), [("l1", l1), ("l2", l2)])
@pytest.mark.parametrize("num_levels", [18, 151])
@pytest.mark.parametrize("kind", ["ct", "cd"])
def test_matches_openai(golden, tiny_network, kind, num_levels, name, metric):
    tensors, _ = golden("openai_losses")
    online, target = (Denoiser(tiny_network(scale, shift=0.001), noise_scale=250.0) for scale in (1.0, 0.9))
    teacher = Denoiser(tiny_network(0.8, shift=0.001), boundary=0.0, noise_scale=250.0)
    images, noise = tensors["x_start"], tensors["noise"]
    from_top = tensors[f"indices_{num_levels}"]
    sigmas = karras_grid(num_levels).float()
    sigma_hi, sigma_lo = sigmas[num_levels - 1 - from_top], sigmas[num_levels - 2 - from_top]
    x_hi = images + append_dims(sigma_hi, 4) * noise
    x_lo = images + append_dims(sigma_lo, 4) * noise if kind == "ct" else heun_step(teacher, x_hi, sigma_hi, sigma_lo)
    loss = consistency_loss(
        online, target, x_hi=x_hi, x_lo=x_lo, sigma_hi=sigma_hi, sigma_lo=sigma_lo, metric=metric, weight=torch.ones(6)
    )
    # OpenAI's float32 grid is off by up to 4e-5; near-equal predictions add rounding of their own.
    assert_close(loss, tensors[f"{kind}_{name}_{num_levels}"], rtol=5e-5, atol=1e-7)


def test_online_network_sees_the_larger_level(make_denoiser, record):
    online = make_denoiser(num_classes=3)
    target = frozen_copy(online)
    seen_online, seen_target = record(online), record(target)
    arguments, labels = pair(), torch.tensor([0, 1, 2])
    consistency_loss(online, target, **arguments, metric=l2, weight=torch.ones(3), labels=labels)
    assert len(seen_online) == len(seen_target) == 1
    assert torch.equal(seen_online[0].sigma, arguments["sigma_hi"])
    assert torch.equal(seen_online[0].x, arguments["x_hi"])
    assert torch.equal(seen_target[0].sigma, arguments["sigma_lo"])
    assert torch.equal(seen_target[0].x, arguments["x_lo"])
    assert seen_online[0].labels is seen_target[0].labels is labels


def test_is_weight_times_metric_per_sample(make_denoiser):
    online, target = make_denoiser(), make_denoiser()
    arguments, weight = pair(), torch.tensor([1.0, 10.0, 100.0])
    loss = consistency_loss(online, target, **arguments, metric=l1, weight=weight)
    prediction = online(arguments["x_hi"], arguments["sigma_hi"])
    reference = target(arguments["x_lo"], arguments["sigma_lo"])
    assert loss.shape == (3,)
    assert_close(loss, weight * l1(prediction, reference))


def test_no_gradient_reaches_a_target_of_its_own(make_denoiser):
    online, target = make_denoiser(), make_denoiser()
    consistency_loss(online, target, **pair(), metric=l2, weight=torch.ones(3)).sum().backward()
    assert all(parameter.grad is None for parameter in target.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in online.parameters())


def test_gradient_stops_at_the_target_when_it_is_the_online_network(make_denoiser):
    online = make_denoiser()
    twin = frozen_copy(online)
    gradients = []
    for target in (online, twin):
        online.zero_grad()
        torch.manual_seed(1)
        consistency_loss(online, target, **pair(), metric=l2, weight=torch.ones(3)).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in online.parameters()])
    for with_itself, with_twin in zip(*gradients, strict=True):
        assert torch.equal(with_itself, with_twin)


@pytest.mark.parametrize("own_target", [True, False])
def test_both_passes_share_one_dropout_mask(make_denoiser, own_target):
    online = make_denoiser(dropout=0.5).train()
    target = frozen_copy(online) if own_target else online
    x, sigma = torch.randn(3, 1, 4, 4), torch.full((3,), 2.0)
    outputs = []

    def metric(a, b):
        outputs.extend([a, b])
        return l1(a, b)

    for _ in range(2):
        consistency_loss(online, target, x, x, sigma, sigma, metric=metric, weight=torch.ones(3))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3])
    # The mask is real, and fresh in every step.
    assert not torch.equal(outputs[0], outputs[2])


def test_target_level_zero_means_the_clean_image(make_denoiser, record):
    # ECT in its first stages: sigma_lo = 0 where sigma_hi is low.
    online, arguments = make_denoiser(boundary=0.0), pair()
    arguments["sigma_lo"][:2] = 0
    calls = record(online)
    weight = 1 / (arguments["sigma_hi"] - arguments["sigma_lo"])
    references = []

    def metric(a, b):
        references.append(b)
        return pseudo_huber(a, b, c=0)

    loss = consistency_loss(online, online, **arguments, metric=metric, weight=weight)
    assert all((call.sigma > 0).all() for call in calls)  # ln 0 reaches no network
    assert torch.equal(references[0][:2], arguments["x_lo"][:2])
    with torch.no_grad():
        prediction = online(arguments["x_hi"], arguments["sigma_hi"])
        reference = online(arguments["x_lo"][2:], arguments["sigma_lo"][2:])
    assert_close(references[0][2:], reference)
    assert_close(loss[:2], (prediction - arguments["x_lo"])[:2].flatten(1).norm(dim=1) / arguments["sigma_hi"][:2])
    loss.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in online.parameters())


def test_no_gap_left_to_close_gives_no_gradient(make_denoiser):
    # Where online and target agree exactly, the root in the plain norm must not turn into NaN.
    online = make_denoiser()
    x, sigma = torch.randn(2, 1, 4, 4), torch.ones(2)
    loss = consistency_loss(
        online, online, x, x, sigma, sigma, metric=lambda a, b: pseudo_huber(a, b, c=0), weight=torch.ones(2)
    )
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(2))
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in online.parameters())
