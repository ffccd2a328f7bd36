from functools import partial
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.testing import assert_close

from consistency.methods.metrics import l2
from consistency.methods.training import ConsistencyTraining
from consistency.noise.curricula import FixedDecay, FixedLevels
from consistency.noise.levels import GridPairs, uniform_index
from consistency.noise.weightings import uniform
from consistency.training.averaging import TargetEMA, WeightEMA


@pytest.fixture
def make_method(make_denoiser):
    def make(target_decay=None):
        return ConsistencyTraining(
            make_denoiser(),
            levels=GridPairs(FixedLevels(4), uniform_index),
            metric=l2,
            weighting=uniform,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            target_decay=target_decay,
        )

    return make


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Watch(Callback):
    """Flattened online, target and averaged weights at the start and after every micro-batch."""

    def __init__(self, average=None):
        self.average, self.online, self.target, self.averaged = average, [], [], []

    def on_train_start(self, trainer, pl_module):
        self.online.append(flat(pl_module.denoiser.parameters()))
        if pl_module.target is not None:
            self.target.append(flat(pl_module.target.parameters()))
        if self.average is not None:
            self.averaged.append(flat(self.average.averages[self.average.names[0]].values()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.on_train_start(trainer, pl_module)


def mix(decay, average, value):
    return (decay * average.double() + (1 - decay) * value.double()).float()


def test_target_moves_by_one_minus_mu(make_method, fit):
    method, watch = make_method(FixedDecay(0.75)), Watch()
    fit(method, callbacks=[TargetEMA(), watch])
    assert torch.equal(watch.target[0], watch.online[0])
    # Mixed with the weights *after* the step.
    assert_close(watch.target[1], mix(0.75, watch.target[0], watch.online[1]), rtol=1e-6, atol=1e-7)
    assert not torch.equal(watch.target[1], watch.target[0])


def test_target_takes_the_decay_of_the_step_just_done(make_method, fit):
    decays = [0.9, 0.0, 0.5]
    method, watch = make_method(decays.__getitem__), Watch()
    fit(method, steps=3, callbacks=[TargetEMA(), watch])
    for step, decay in enumerate(decays):
        assert_close(
            watch.target[step + 1], mix(decay, watch.target[step], watch.online[step + 1]), rtol=1e-6, atol=1e-7
        )
    assert torch.equal(watch.target[2], watch.online[2])


def test_three_sets_of_weights_differ_after_a_step(make_method, fit):
    average = WeightEMA([0.9], warmup=False)
    method, watch = make_method(FixedDecay(0.5)), Watch(average)
    fit(method, callbacks=[TargetEMA(), average, watch])
    raw, target, averaged = watch.online[1], watch.target[1], watch.averaged[1]
    for one, other in ((raw, target), (raw, averaged), (target, averaged)):
        assert not torch.allclose(one, other, rtol=0, atol=1e-5)
    assert_close(averaged, mix(0.9, watch.online[0], raw), rtol=1e-6, atol=1e-7)


def test_nothing_is_averaged_between_accumulated_micro_batches(make_method, fit):
    average = WeightEMA([0.9])
    method, watch = make_method(FixedDecay(0.5)), Watch(average)
    fit(method, steps=2, accumulate=3, callbacks=[TargetEMA(), average, watch])
    for weights in (watch.online, watch.target, watch.averaged):
        moved = [not torch.equal(a, b) for a, b in pairwise(weights)]
        assert moved == [False, False, True, False, False, True]
    assert_close(watch.target[6], mix(0.5, watch.target[3], watch.online[6]), rtol=1e-6, atol=1e-7)


def test_warm_up(make_method, fit):
    average = WeightEMA([0.15])
    method, watch = make_method(), Watch(average)
    fit(method, steps=3, callbacks=[average, watch])
    # (1 + k) / (10 + k) until it exceeds the rate.
    for step, beta in enumerate([1 / 10, 0.15, 0.15]):
        expected = mix(beta, watch.averaged[step], watch.online[step + 1])
        assert_close(watch.averaged[step + 1], expected, rtol=1e-6, atol=1e-7)


def test_several_rates(make_method, fit):
    average = WeightEMA([0.5, 0.0, 0.9999], warmup=False)
    method, watch = make_method(), Watch(average)
    fit(method, callbacks=[average, watch])
    assert list(average.averages) == ["ema0.5", "ema0", "ema0.9999"]
    for name, decay in average.decays.items():
        expected = mix(decay, watch.online[0], watch.online[1])
        assert_close(flat(average.averages[name].values()), expected, rtol=1e-6, atol=1e-7)


def test_target_callback_leaves_methods_without_a_target_alone(make_method, fit):
    method = make_method()
    fit(method, callbacks=[TargetEMA()])
    assert method.target is None


def test_applied_swaps_the_averages_in_and_the_raw_weights_back(make_method, fit):
    average = WeightEMA([0.9, 0.5], warmup=False)
    method = make_method()
    fit(method, callbacks=[average])
    x, sigma = torch.randn(2, 1, 4, 4), torch.ones(2)
    raw, before = flat(method.denoiser.parameters()), method.denoiser(x, sigma)
    for asked, expected in ((None, "ema0.9"), ("ema0.5", "ema0.5")):
        with average.applied(method, asked) as name:
            assert name == expected
            assert torch.equal(flat(method.denoiser.parameters()), flat(average.averages[name].values()))
            assert not torch.equal(method.denoiser(x, sigma), before)
        assert torch.equal(flat(method.denoiser.parameters()), raw)
    with pytest.raises(KeyboardInterrupt), average.applied(method):
        raise KeyboardInterrupt
    assert torch.equal(flat(method.denoiser.parameters()), raw)


def test_averages_continue_from_their_checkpoint(make_method, fit, tmp_path):
    average = WeightEMA([0.9])
    method = make_method()
    fit(method, callbacks=[average])
    torch.save(average.state_dict(), tmp_path / "state.pt")
    saved = flat(average.averages["ema0.9"].values())
    again = WeightEMA([0.9])
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    watch = Watch(again)
    fit(method, callbacks=[again, watch])
    assert torch.equal(watch.averaged[0], saved)
    # The second step ever: the warm-up goes on too.
    assert_close(watch.averaged[1], mix(2 / 11, saved, watch.online[1]), rtol=1e-6, atol=1e-7)


def test_target_continues_from_its_checkpoint(make_method, fit):
    decays = [0.9, 0.25]
    method = make_method(decays.__getitem__)
    fit(method, callbacks=[TargetEMA()])
    again, watch = make_method(decays.__getitem__), Watch()
    again.load_state_dict(method.state_dict())
    fit(again, callbacks=[TargetEMA(), watch])
    assert_close(watch.target[1], mix(0.25, watch.target[0], watch.online[1]), rtol=1e-6, atol=1e-7)


def test_rate_that_the_checkpoint_lacks_is_refused(make_method, fit):
    method = make_method()
    fit(method, callbacks=[WeightEMA([0.9])])
    with pytest.raises(ValueError, match=r"no average ema0\.5"):
        fit(method, callbacks=[WeightEMA([0.5])])


def test_half_life_counts_images(make_method, fit):
    # Four images a step: the weights of two steps ago count half after a half-life of 8 images.
    average = WeightEMA(half_lives=[8], warmup=False)
    method, watch = make_method(), Watch(average)
    fit(method, steps=2, callbacks=[average, watch])
    assert average.names == ["ema_0.008kimg"]
    for step in range(2):
        expected = mix(0.5**0.5, watch.averaged[step], watch.online[step + 1])
        assert_close(watch.averaged[step + 1], expected, rtol=1e-6, atol=1e-7)


def test_half_life_does_not_depend_on_how_images_are_batched(make_method, fit):
    averages = []
    for batch_size, steps in ((4, 4), (8, 2)):
        average = WeightEMA(half_lives=[8], warmup=False)
        method = make_method()
        method.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
        before = flat(method.denoiser.parameters()).clone()
        average.averages = {"ema_0.008kimg": {k: v.detach() + 1 for k, v in method.denoiser.named_parameters()}}
        fit(method, steps=steps, batch_size=batch_size, callbacks=[average])
        averages.append(flat(average.averages["ema_0.008kimg"].values()) - before)
    assert_close(averages[0], torch.full_like(averages[0], 0.25), rtol=1e-4, atol=1e-5)  # 16 images: two half-lives
    assert_close(averages[0], averages[1], rtol=1e-4, atol=1e-5)


def test_half_life_ramps_up_with_the_images_seen(make_method, fit):
    average = WeightEMA(half_lives=[0.3])
    method, watch = make_method(), Watch(average)
    fit(method, steps=3, callbacks=[average, watch])
    # 5 % of 0, 4 and 8 images, at most 0.3.
    for step, half_life in enumerate([1e-8, 0.2, 0.3]):
        expected = mix(0.5 ** (4 / half_life), watch.averaged[step], watch.online[step + 1])
        assert_close(watch.averaged[step + 1], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(watch.averaged[1], watch.online[1])


def test_names_of_half_lives():
    average = WeightEMA([0.999], half_lives=[500_000, 25e6, 3.1e6])
    assert average.names == ["ema0.999", "ema_500kimg", "ema_25Mimg", "ema_3.1Mimg"]


@pytest.mark.parametrize("decays", [[1.0], [-0.1], [0.9, 0.9]])
def test_refuses_rates(decays):
    with pytest.raises(ValueError, match="decays"):
        WeightEMA(decays)


@pytest.mark.parametrize("half_lives", [[0], [-1], [5e5, 5e5]])
def test_refuses_half_lives(half_lives):
    with pytest.raises(ValueError, match="half_lives"):
        WeightEMA(half_lives=half_lives)


def test_refuses_nothing_at_all():
    with pytest.raises(ValueError, match="no average was asked for"):
        WeightEMA([])


def test_after_a_change_of_batch_rates_are_those_of_the_first(make_method, train):
    """Twice the batch: an average per step goes as far with each image as it did."""
    method, average = make_method(), WeightEMA([0.9], warmup=False)
    method.progress.batch_size = 8
    method.progress.set_extra_state({"step": 0, "images_seen": 0, "batch_size": 4, "first_batch_size": 4})
    start = [parameter.detach().clone() for parameter in method.denoiser.parameters()]
    train(method, steps=1, batch_size=8, callbacks=[average])
    for old, new, mean in zip(start, method.denoiser.parameters(), average.averages["ema0.9"].values(), strict=True):
        torch.testing.assert_close(mean, 0.81 * old + 0.19 * new.detach(), rtol=1e-5, atol=1e-7)
