"""Half precision is the network's alone; and what the loss scaler does, nothing else notices."""

import pytest
import torch
from test_required import Overflow, ScaledOnly

from consistency.methods.metrics import pseudo_huber
from consistency.noise.curricula import DoublingLevels, FixedDecay
from consistency.noise.levels import GridPairs, uniform_index
from consistency.noise.weightings import inverse_gap
from consistency.training.averaging import TargetEMA, WeightEMA
from given import AsGiven


def weights(method):
    return torch.cat([parameter.detach().flatten() for parameter in method.denoiser.parameters()])


def test_clipping_acts_on_unscaled_gradients(make_method, make_denoiser, train):
    """One threshold has one effect, with a scaler and without."""
    start, ends = make_denoiser().state_dict(), []
    for options in ({}, {"plugins": [ScaledOnly()]}):
        for threshold in (None, 1e-3):
            denoiser = make_denoiser()
            denoiser.load_state_dict(start)
            method = make_method(denoiser)
            train(method, steps=3, gradient_clip_val=threshold, **options)
            ends.append(weights(method))
    plain, clipped, scaled, scaled_and_clipped = ends
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scaled_and_clipped, clipped, rtol=1e-5, atol=1e-7)
    assert (plain - clipped).norm() > 1e-3
    begin = torch.cat([start[key].flatten() for key, _ in method.denoiser.named_parameters()])
    assert (clipped - begin).norm() <= 3 * 0.1 * 1e-3 * 1.01  # three steps of rate 0.1


def test_step_that_the_scaler_skips_moves_nothing(make_method, train, outputs):
    """Weights, averages, target and curriculum are those of a run in which the step never was."""
    method = make_method(levels=GridPairs(DoublingLevels(2, 16, 4), uniform_index), target_decay=FixedDecay(0.5))
    average, watch, seen = WeightEMA([0.9]), outputs(), []

    class Watch(TargetEMA):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            super().on_train_batch_end(trainer, pl_module, *rest)
            parts = (pl_module.denoiser, pl_module.target)
            seen.append([torch.cat([p.detach().flatten() for p in part.parameters()]).clone() for part in parts])
            seen[-1].append(torch.cat([value.flatten() for value in average.averages["ema0.9"].values()]))

    train(method, callbacks=[Overflow(2), average, Watch(), watch], plugins=[ScaledOnly()])
    assert len(seen) == 5
    for before, after in zip(seen[1], seen[2], strict=True):  # the third call was skipped
        assert torch.equal(before, after)
    for before, after in zip(seen[2], seen[3], strict=True):
        assert not torch.equal(before, after)
    levels = [output.schedule["num_levels"] for output in watch.seen]
    assert levels[2] == levels[3]  # its step comes again
    assert levels[0] < levels[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_around_the_network_is_float32(make_method, make_denoiser, fixed_random, dtype):
    """Levels, metric, weight and loss; the network itself is in half precision."""
    denoiser, seen = make_denoiser(), {}
    denoiser.network.register_forward_hook(lambda *args: seen.update(network=args[-1].dtype))

    def metric(a, b):
        seen["metric"] = (a.dtype, b.dtype)
        return pseudo_huber(a, b)

    def weighting(lo, hi):
        seen["levels"] = (lo.dtype, hi.dtype)
        return inverse_gap(lo, hi)

    x, hi, lo = torch.randn(2, 1, 4, 4), torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.9])
    method = make_method(denoiser, levels=AsGiven("pair"), metric=metric, weighting=weighting)
    with torch.autocast("cpu", dtype):
        loss = method.step(x, torch.full((2,), -1), 0, fixed_random((lo, hi), torch.randn_like(x))).loss
    both = (torch.float32, torch.float32)
    assert seen == {"network": dtype, "metric": both, "levels": both}
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in denoiser.parameters() if p.grad is not None)
