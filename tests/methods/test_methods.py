from functools import partial

import pytest
import torch
from torch.testing import assert_close

from consistency.methods.distillation import ConsistencyDistillation
from consistency.methods.edm import EDM
from consistency.methods.metrics import l2, pseudo_huber
from consistency.methods.training import ConsistencyTraining
from consistency.models import parametrization
from consistency.models.denoiser import Denoiser
from consistency.noise import weightings
from consistency.noise.curricula import DoublingLevels, FixedDecay, FixedLevels
from consistency.noise.grids import karras_grid
from consistency.noise.levels import GridPairs, LogNormal, RatioPairs, lognormal_index, uniform_index
from consistency.sampling import wrappers
from consistency.sampling.steps import euler_step, heun_step
from consistency.training.averaging import TargetEMA

sgd = partial(torch.optim.SGD, lr=0.1)
PAIRS = {"levels": GridPairs(FixedLevels(40), uniform_index), "metric": l2, "weighting": weightings.uniform}


def training(denoiser, **options):
    return ConsistencyTraining(denoiser, **{**PAIRS, "optimizer": sgd, **options})


def distillation(teacher, **options):
    return ConsistencyDistillation(teacher, **{**PAIRS, "solver": heun_step, "optimizer": sgd, **options})


@pytest.fixture
def teacher(make_denoiser):
    return make_denoiser(boundary=0.0)


@pytest.fixture
def make_method(teacher, make_denoiser):
    def make(kind, **options):
        return distillation(teacher, **options) if kind == "cd" else training(make_denoiser(), **options)

    return make


def parameters(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("kind", ["ct", "cd"])
def test_online_network_reaches_sigma_max_and_target_sigma_min(make_method, fit, record, kind):
    # Swapped, the model would never be trained where it is sampled.
    method = make_method(kind, target_decay=FixedDecay(0.5))
    online, target = record(method.denoiser), record(method.target)
    fit(method, batch_size=1000, callbacks=[TargetEMA()])
    sigma_hi, sigma_lo, sigmas = online[0].sigma, target[0].sigma, karras_grid(40).float()
    assert (sigma_hi > sigma_lo).all()
    assert (sigma_hi.min(), sigma_hi.max()) == (sigmas[1], sigmas[-1])
    assert (sigma_lo.min(), sigma_lo.max()) == (sigmas[0], sigmas[-2])


def test_training_pairs_share_image_and_noise(make_denoiser, fit, record):
    method = training(make_denoiser(), target_decay=FixedDecay(0.5))
    online, target = record(method.denoiser), record(method.target)
    images = torch.rand(64, 1, 4, 4) * 2 - 1
    fit(method, batch_size=64, images=images, callbacks=[TargetEMA()])
    (hi,), (lo,) = online, target
    # Each pair lies on one line x + sigma z.
    noise = (hi.x - images) / hi.sigma.view(-1, 1, 1, 1)
    assert_close(lo.x, images + lo.sigma.view(-1, 1, 1, 1) * noise, rtol=1e-4, atol=1e-4)
    # Low levels lose the noise to rounding when it is divided out again.
    noise = noise[hi.sigma > 0.1]
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    assert float(noise.mean()) == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize(("solver", "evaluations"), [(euler_step, 1), (heun_step, 2)])
def test_distillation_asks_the_teacher_for_the_target_input(teacher, fit, record, solver, evaluations):
    method = distillation(teacher, solver=solver, target_decay=FixedDecay(0.5))
    online, target, asked = record(method.denoiser), record(method.target), record(method.teacher)
    fit(method, batch_size=16, callbacks=[TargetEMA()])
    (hi,), (lo,) = online, target
    assert len(asked) == evaluations
    for call, sigma in zip(asked, (hi.sigma, lo.sigma), strict=False):
        assert torch.equal(call.sigma, sigma)
    # The teacher's own plain parametrization, at the student's input.
    assert_close(lo.x, solver(teacher.eval(), hi.x, hi.sigma, lo.sigma))


def test_labels_reach_all_three_networks(make_denoiser, fit, record):
    method = distillation(make_denoiser(boundary=0.0, num_classes=3), target_decay=FixedDecay(0.5))
    calls = [record(network) for network in (method.denoiser, method.target, method.teacher)]
    labels = torch.tensor([0, 1, 2, 1])
    fit(method, labels=labels, images=torch.zeros(4, 1, 4, 4), callbacks=[TargetEMA()])
    for seen in calls:
        assert all(torch.equal(call.labels, labels) for call in seen)
        assert seen


def test_distillation_starts_from_the_teacher(teacher):
    method = distillation(teacher, target_decay=FixedDecay(0.5), dropout=0.3)
    for network in (method.denoiser, method.target, method.teacher):
        assert equal(parameters(network), parameters(teacher))
    assert (method.denoiser.boundary, method.target.boundary, method.teacher.boundary) == (0.002, 0.002, 0.0)
    assert method.denoiser.network.config["dropout"] == 0.3
    # Copies: the teacher that was passed in stays as it is.
    assert next(teacher.parameters()).data_ptr() != next(method.denoiser.parameters()).data_ptr()
    assert next(teacher.parameters()).requires_grad


def test_distillation_keeps_the_teachers_settings(make_unet):
    own = parametrization.EDM(sigma_data=0.6, noise_scale=250.0)
    teacher = Denoiser(make_unet(num_classes=3), own, sigma_min=0.01, sigma_max=50.0, label_dropout=0.1)
    levels = GridPairs(FixedLevels(4), uniform_index, sigma_min=0.01, sigma_max=50.0)
    method = distillation(teacher, levels=levels)
    assert method.denoiser.parametrization == parametrization.EDM(sigma_data=0.6, boundary=0.01, noise_scale=250.0)
    same = {"network", "sigma_min", "sigma_max", "label_dropout"}
    assert {key: method.denoiser.config[key] for key in same} == {key: teacher.config[key] for key in same}
    assert (method.denoiser.kind, method.teacher.kind) == ("consistency", "diffusion")
    with pytest.raises(ValueError, match="noise range"):
        distillation(teacher)


@pytest.mark.parametrize("mode", [True, False])
def test_teacher_stays_in_eval_mode(make_denoiser, mode):
    method = distillation(make_denoiser(boundary=0.0, dropout=0.5), target_decay=FixedDecay(0.5)).train(mode)
    assert method.denoiser.training == method.target.training == mode
    assert not any(module.training for module in method.teacher.modules())


def test_modes_and_gradients_during_a_fit(make_denoiser, fit, record):
    teacher = make_denoiser(boundary=0.0, dropout=0.5).train()
    method = distillation(teacher, target_decay=FixedDecay(0.5), dropout=0.5)
    before = parameters(method.teacher)
    calls = [record(network) for network in (method.denoiser, method.target, method.teacher)]
    fit(method, steps=2, callbacks=[TargetEMA()])
    assert [{call.training for call in seen} for seen in calls] == [{True}, {True}, {False}]
    assert equal(parameters(method.teacher), before)
    for network in (method.target, method.teacher):
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["ct", "cd"])
def test_only_the_online_network_is_optimised(make_method, kind):
    method = make_method(kind, target_decay=FixedDecay(0.5))
    optimizer = method.configure_optimizers()["optimizer"]
    optimised = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in method.denoiser.parameters()}


@pytest.mark.parametrize("kind", ["ct", "cd"])
def test_no_decay_means_no_copy(make_method, fit, record, kind):
    method = make_method(kind)
    assert method.target is None
    calls = record(method.denoiser)
    fit(method)
    # Online and target are the same network: two calls, the larger level first.
    assert len(calls) == 2
    assert (calls[0].sigma > calls[1].sigma).all()


@pytest.mark.parametrize("kind", ["ct", "cd"])
def test_target_that_nothing_moves_is_refused(make_method, fit, kind):
    with pytest.raises(ValueError, match="no TargetEMA callback"):
        fit(make_method(kind, target_decay=FixedDecay(0.5)))


def test_distillation_refuses_a_consistency_model_as_teacher(make_denoiser):
    with pytest.raises(ValueError, match="must be a diffusion model"):
        distillation(make_denoiser(boundary=0.002))


def test_edm_refuses_a_consistency_function(make_denoiser):
    with pytest.raises(ValueError, match="boundary"):
        EDM(make_denoiser(boundary=0.002), levels=LogNormal(), weighting=weightings.edm, optimizer=sgd)


@pytest.mark.parametrize("kind", ["ct", "cd"])
def test_single_levels_are_refused_where_pairs_are_needed(make_method, kind):
    with pytest.raises(ValueError, match=r"levels is LogNormal; allowed with Consistency\w+: uniform_index, .*pairs"):
        make_method(kind, levels=LogNormal())


@pytest.mark.parametrize("levels", [RatioPairs(steps_per_stage=2), PAIRS["levels"]])
def test_edm_refuses_pairs(teacher, levels):
    with pytest.raises(ValueError, match=rf"levels is {type(levels).__name__}; allowed with EDM: lognormal"):
        EDM(teacher, levels=levels, weighting=weightings.edm, optimizer=sgd)


def test_edm_refuses_a_weighting_of_pairs(teacher):
    for weighting in (weightings.inverse_gap, partial(weightings.inverse_gap)):
        with pytest.raises(ValueError, match=r"weighting is inverse_gap.*allowed with EDM: uniform, edm"):
            EDM(teacher, levels=LogNormal(), weighting=weighting, optimizer=sgd)


def test_levels_of_ones_own_are_welcome(make_denoiser, fit):
    class Own:
        def __call__(self, k, u):
            return torch.full((len(u),), 0.1), torch.full((len(u),), 0.2)

        def describe(self, step):
            return {}

    fit(training(make_denoiser(), levels=Own()))


def test_each_method_says_what_its_denoiser_is(make_denoiser, teacher):
    # ECT's boundary is 0 as well: only the method tells it from EDM.
    pairs = RatioPairs(steps_per_stage=2)
    assert training(make_denoiser(boundary=0.0), levels=pairs).denoiser.kind == "consistency"
    with pytest.raises(ValueError, match=r"begin at 0\.002, .* so at 0\.0; set parametrization\.boundary"):
        training(make_denoiser(boundary=0.0))
    assert distillation(teacher).denoiser.kind == "consistency"
    assert teacher.kind == "diffusion"
    edm = EDM(make_denoiser(boundary=0.0), levels=LogNormal(), weighting=weightings.edm, optimizer=sgd)
    assert edm.denoiser.kind == "diffusion"


def test_network_without_a_name_is_refused_before_it_is_trained(tiny_network, fit):
    class Nameless(tiny_network):
        pass

    with pytest.raises(ValueError, match="Nameless has no name to be saved by"):
        fit(training(Denoiser(Nameless(), parametrization.EDM(boundary=0.002))))


@pytest.mark.parametrize(("solver", "guidance", "passes"), [(euler_step, 1, 2), (heun_step, 1, 3), (heun_step, 2, 5)])
def test_passes_without_gradient_are_counted(make_denoiser, fit, record, solver, guidance, passes):
    teacher = make_denoiser(boundary=0.0, num_classes=3, label_dropout=0.1)
    method = distillation(teacher, solver=partial(solver), guidance=guidance)
    assert method.network_passes == passes
    assert training(make_denoiser()).network_passes == 1
    assert EDM(teacher, levels=LogNormal(), weighting=weightings.edm, optimizer=sgd).network_passes == 0


def outputs_of(method, fit):
    """What the training step returned, in every micro-batch of a fit of one step."""
    seen, step = [], method.training_step
    method.training_step = lambda *args: seen.append(step(*args)) or seen[-1]
    torch.manual_seed(0)
    fit(method, batch_size=8, images=torch.linspace(-1, 1, 128).view(8, 1, 4, 4))
    return seen[0]


def test_ict_weighs_by_the_gap_of_its_pairs(make_denoiser, fit, record):
    denoiser = make_denoiser()
    options = {"levels": GridPairs(FixedLevels(11), lognormal_index), "metric": pseudo_huber}
    plain, weighted = (training(denoiser, weighting=w, **options) for w in (weightings.uniform, weightings.inverse_gap))
    weights = parameters(denoiser)
    calls = record(denoiser)
    unweighted = outputs_of(plain, fit)
    with torch.no_grad():
        for parameter, start in zip(denoiser.parameters(), weights, strict=True):
            parameter.copy_(start)
    result = outputs_of(weighted, fit)
    gap = calls[0].sigma - calls[1].sigma
    assert_close(result["per_sample"] * gap, unweighted["per_sample"])
    assert_close(result["loss"].detach(), result["per_sample"].mean())
    assert torch.equal(result["sigma"], calls[0].sigma)
    assert result["schedule"] == {"num_levels": 11}


def test_edm_weighs_by_its_level(make_denoiser, fit, record):
    denoiser = make_denoiser(boundary=0.0)
    method = EDM(denoiser, levels=LogNormal(), weighting=weightings.edm, optimizer=partial(sgd, lr=0.0))
    calls = record(denoiser)
    result = outputs_of(method, fit)
    (call,) = calls
    images = torch.linspace(-1, 1, 128).view(8, 1, 4, 4)
    error = (denoiser(call.x, call.sigma) - images).square().mean(dim=(1, 2, 3))
    assert_close(result["per_sample"], weightings.edm(call.sigma, call.sigma) * error.detach())
    assert_close(result["loss"].detach(), result["per_sample"].mean())


@pytest.mark.parametrize("levels", [RatioPairs(steps_per_stage=2), GridPairs(DoublingLevels(1, 8, 8), uniform_index)])
def test_levels_and_decay_follow_the_optimizer_steps(make_denoiser, fit, levels):
    asked = []

    def decay(step):
        asked.append(step)
        return 0.5

    method = training(make_denoiser(), levels=levels, target_decay=decay, metric=partial(pseudo_huber, c=0))
    schedules, step = [], method.training_step
    method.training_step = lambda *args: schedules.append(step(*args)) or schedules[-1]
    fit(method, steps=3, accumulate=2, callbacks=[TargetEMA()])
    # Twice a step from the micro-batches, once from the callback that moves the target.
    assert asked == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    expected = [levels.describe(step) for step in (0, 0, 1, 1, 2, 2)]
    assert [{**result["schedule"]} for result in schedules] == [{**one, "target_decay": 0.5} for one in expected]


def test_ect_trains_through_its_clean_targets(make_denoiser, fit):
    method = training(
        make_denoiser(boundary=0.0),
        levels=RatioPairs(steps_per_stage=10),
        metric=partial(pseudo_huber, c=0),
        weighting=weightings.inverse_gap,
        optimizer=torch.optim.RAdam,
    )
    before = parameters(method.denoiser)
    fit(method, steps=2, batch_size=16)
    after = parameters(method.denoiser)
    assert not equal(before, after)
    assert all(parameter.isfinite().all() for parameter in after)


@pytest.mark.parametrize("kind", ["ct", "cd", "edm"])
def test_progress_counts_steps_and_images(make_method, make_denoiser, fit, kind):
    if kind == "edm":
        method = EDM(make_denoiser(boundary=0.0), levels=LogNormal(), weighting=weightings.edm, optimizer=sgd)
    else:
        method = make_method(kind)
    fit(method, steps=2, accumulate=3, batch_size=4)
    assert (method.progress.step, method.progress.images_seen, method.progress.pending) == (2, 24, 0)


def test_progress_is_saved_with_the_weights(make_denoiser):
    method, again = training(make_denoiser()), training(make_denoiser())
    method.progress.count(5)
    method.progress.advance()
    method.progress.count(7)
    again.load_state_dict(method.state_dict())
    # The 7 images of the unfinished step will be seen again.
    assert (again.progress.step, again.progress.images_seen, again.progress.pending) == (1, 5, 0)


def test_rate_schedule_moves_once_per_optimizer_step(make_denoiser, fit):
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    method = training(make_denoiser(), lr_schedule=halve)
    trainer = fit(method, steps=3, accumulate=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def test_training_reduces_the_loss(make_denoiser, fit):
    # One image, so that f(x, sigma) = image is learnable at once.
    method = training(
        make_denoiser(random_weights=False, channels=16),
        levels=GridPairs(FixedLevels(3), uniform_index),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    losses, step = [], method.training_step
    method.training_step = lambda *args: losses.append(step(*args)) or losses[-1]
    fit(method, steps=60, batch_size=32, images=torch.full((60 * 32, 1, 4, 4), 0.7))
    losses = [float(result["loss"].detach()) for result in losses]
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])


@pytest.mark.parametrize("kind", ["ct", "cd", "edm"])
def test_hidden_labels_are_hidden_from_all_networks(make_denoiser, fit, record, kind):
    model = make_denoiser(boundary=0.002 if kind == "ct" else 0.0, num_classes=3, label_dropout=0.3)
    if kind == "edm":
        method = EDM(model, levels=LogNormal(), weighting=weightings.edm, optimizer=sgd)
    else:
        method = distillation(model) if kind == "cd" else training(model, target_decay=FixedDecay(0.5))
    others = {"ct": "target", "cd": "teacher", "edm": "denoiser"}
    watched = [method.denoiser, getattr(method, others[kind])]
    calls = [record(network) for network in watched]
    labels = torch.arange(1000) % 3
    fit(method, batch_size=1000, labels=labels, callbacks=[TargetEMA()] if kind == "ct" else [])
    seen = calls[0][0].labels
    assert float((seen == -1).float().mean()) == pytest.approx(0.3, abs=0.05)
    assert torch.equal(seen[seen >= 0], labels[seen >= 0])
    assert all(torch.equal(call.labels, seen) for network in calls for call in network)


def test_guided_teacher_leads_the_target_input(make_denoiser, fit, record):
    teacher = make_denoiser(boundary=0.0, num_classes=3, label_dropout=0.0)
    with pytest.raises(ValueError, match="guidance"):
        distillation(teacher, guidance=2.0)
    method = distillation(make_denoiser(boundary=0.0, num_classes=3, label_dropout=0.5), guidance=2.0)
    calls = record(method.denoiser)
    labels = torch.tensor([0, 1, 2, 1])
    fit(method, labels=labels)
    hi, lo = calls  # mu = 0: the target is the online network
    guided = wrappers.guided(method.teacher, 2.0)
    assert_close(lo.x, heun_step(guided, hi.x, hi.sigma, lo.sigma, hi.labels))
    assert (lo.x - heun_step(method.teacher, hi.x, hi.sigma, lo.sigma, hi.labels)).abs().max() > 1e-4
    assert "guided" not in " ".join(method.state_dict())


def test_hidden_labels_belong_to_images_with_per_image_randomness(make_denoiser, fit, record):
    seen = []
    for accumulate in (1, 4):
        method = training(make_denoiser(num_classes=3, label_dropout=0.5))
        method.progress.image_seed = 5
        calls = record(method.denoiser)
        images, labels = torch.zeros(16, 1, 4, 4), torch.arange(16) % 3
        fit(method, batch_size=16 // accumulate, accumulate=accumulate, images=images, labels=labels)
        seen.append(torch.cat([call.labels for call in calls[::2]]))
    assert torch.equal(*seen)
    assert (seen[0] == -1).any()
