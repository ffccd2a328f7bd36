import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM, Flow, TrigFlow
from consistency.models.register import build, describe_parametrization, register_parametrization


# sigma: c_skip, c_out, c_in. EDM Table 1; CM App. C.
@pytest.mark.parametrize(
    ("boundary", "sigma", "skip", "out", "c_in"),
    [
        (0.0, 0.002, 0.999984, 0.001999984, 1.999984),
        (0.0, 0.5, 0.5, 0.353553391, 1.41421356),
        (0.0, 80.0, 3.906097e-5, 0.499990235, 0.01249976),
        (0.002, 0.002, 1.0, 0.0, 1.999984),
        (0.002, 0.5, 0.502004, 0.352139177, 1.41421356),
        (0.002, 80.0, 3.906293e-5, 0.499977735, 0.01249976),
    ],
)
def test_coefficients(boundary, sigma, skip, out, c_in):
    computed = EDM(boundary=boundary)(torch.tensor([sigma], dtype=torch.float64))
    expected = {"skip": skip, "out": out, "input": c_in, "noise": 0.25 * math.log(sigma)}
    for name, value in computed._asdict().items():
        assert float(value) == pytest.approx(expected[name], rel=1e-6, abs=1e-12)


SIGMA = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)


@pytest.mark.parametrize("made", [EDM, TrigFlow])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.616])
def test_the_network_has_unit_variance(made, sigma_data):
    c = made(sigma_data=sigma_data)(SIGMA)
    assert_close(c.input**2 * (SIGMA**2 + sigma_data**2), torch.ones_like(SIGMA))
    # Var of the network's target, (x - c_skip (x + sigma z)) / c_out.
    assert_close(((1 - c.skip) ** 2 * sigma_data**2 + (c.skip * SIGMA) ** 2) / c.out**2, torch.ones_like(SIGMA))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.616])
def test_trigflow_is_its_formula(sigma_data):
    c, t = TrigFlow(sigma_data)(SIGMA), torch.arctan(SIGMA / sigma_data)
    assert_close(c.skip, torch.cos(t) ** 2)  # D = cos(t) x_t - sin(t) sd F, and x_t = cos(t) x
    assert_close(c.out, -torch.sin(t) * sigma_data)
    assert_close(c.input, torch.cos(t) / sigma_data)
    assert_close(c.noise, t)


@pytest.mark.parametrize("boundary", [0.002, 0.003, 0.01])
@pytest.mark.parametrize("sigma_data", [0.5, 0.48, 0.617, 0.65, 1.0])
def test_coefficients_are_exact_at_the_boundary(boundary, sigma_data):
    c = EDM(sigma_data, boundary)(torch.tensor([boundary]))
    assert (float(c.skip), float(c.out)) == (1, 0)


@pytest.mark.parametrize("one", [EDM(0.6, 0.01, 250.0), Flow(0.01, 1.0), TrigFlow(0.6)])
def test_description_rebuilds_a_parametrization(one):
    assert build("parametrization", describe_parametrization(one)) == one


def test_parametrization_without_a_name_is_refused():
    class Nameless(EDM):
        pass

    with pytest.raises(ValueError, match=r"Nameless has no name.*@register_parametrization"):
        describe_parametrization(Nameless())
    with pytest.raises(ValueError, match=r"'edm' is registered already, by consistency\.models\.parametrization\.EDM"):
        register_parametrization("edm")(Nameless)


# Beside the papers' 0.5 some values of sd with sd^2 / (0 + sd^2) = 1 - 6e-8 in float32.
@pytest.mark.parametrize("sigma_data", [0.5, 0.48, 0.617, 0.65, 1.0])
@pytest.mark.parametrize("boundary", [0.002, 0.003, 0.01])
def test_boundary_condition_is_exact(make_unet, boundary, sigma_data):
    model = Denoiser(make_unet(), EDM(sigma_data, boundary))
    x = 3 * torch.randn(4, 1, 4, 4)
    assert torch.equal(model(x, torch.full((4,), boundary)), x)
    assert not torch.equal(model(x, torch.full((4,), 2 * boundary)), x)


@pytest.mark.parametrize("boundary", [0.0, 0.002, 0.5])
def test_rows_at_and_below_the_boundary_are_the_input(make_denoiser, record, boundary):
    model = make_denoiser(boundary=boundary)
    x, sigma = 3 * torch.randn(4, 1, 4, 4), torch.tensor([0.0, boundary, 1.0, 80.0])
    asked = []
    model.network.register_forward_pre_hook(lambda _, args: asked.append(args[1]))
    out = model(x, sigma)
    assert asked[0].isfinite().all()  # ln 0 reaches no network
    assert torch.equal(out[:2], x[:2])
    assert_close(out[2:], model(x[2:], sigma[2:]))
    out.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("parametrization", [EDM(), EDM(boundary=0.002), Flow(), TrigFlow()])
def test_raw_is_the_network_inside_the_formula(make_unet, parametrization):
    model, x, sigma = Denoiser(make_unet(), parametrization), torch.randn(3, 1, 4, 4), torch.tensor([0.01, 0.5, 80.0])
    c = (value.view(-1, 1, 1, 1) for value in parametrization(sigma)[:2])
    skip, out = c
    assert_close(model(x, sigma), skip * x + out * model.raw(x, sigma))


def test_edm_has_no_boundary_at_sigma_min(make_denoiser):
    x = torch.randn(4, 1, 4, 4)
    assert not torch.equal(make_denoiser(boundary=0.0)(x, torch.full((4,), 0.002)), x)


class Recorder(nn.Module):
    in_channels, image_size, num_classes = 1, 4, 0

    def forward(self, x, c_noise, labels, **extra):
        self.x, self.c_noise, self.labels, self.extra = x, c_noise, labels, extra
        return torch.ones_like(x)


@pytest.mark.parametrize("noise_scale", [0.25, 250.0])
def test_c_noise(noise_scale):
    sigma = torch.tensor([0.002, 0.1, 0.5, 1.0, 80.0])
    network = Recorder()
    Denoiser(network, EDM(noise_scale=noise_scale))(torch.zeros(5, 1, 4, 4), sigma)
    expected = torch.tensor([-1.5536520, -0.5756463, -0.1732868, 0.0, 1.0955067]) * noise_scale / 0.25
    assert_close(network.c_noise, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("boundary", [0.0, 0.002])
def test_forward_is_its_formula(boundary):
    sigma, x = torch.tensor([0.01, 0.5, 80.0]), torch.randn(3, 1, 4, 4)
    network = Recorder()
    out = Denoiser(network, EDM(boundary=boundary))(x, sigma)
    for row in range(3):
        c = EDM(boundary=boundary)(sigma[row])
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


@pytest.mark.parametrize("options", [{"sigma_min": 0}, {"sigma_min": 90.0}])
def test_refuses_impossible_levels(options):
    with pytest.raises(ValueError, match=r"change model\.sigma_min"):
        Denoiser(Recorder(), **options)


@pytest.mark.parametrize(
    ("made", "options", "option"),
    [
        (EDM, {"sigma_data": 0}, "data.sigma_data"),
        (TrigFlow, {"sigma_data": 0}, "data.sigma_data"),
        (EDM, {"boundary": -0.1}, "parametrization.boundary"),
        (Flow, {"boundary": -0.1}, "parametrization.boundary"),
        (EDM, {"noise_scale": 0}, "parametrization.noise_scale"),
        (Flow, {"noise_scale": 0}, "parametrization.noise_scale"),
    ],
)
def test_refuses_impossible_parametrizations(made, options, option):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .*change {option}"):
        made(**options)


@pytest.mark.parametrize(("boundary", "kind"), [(0.0, "diffusion"), (0.002, "consistency")])
def test_kind_follows_from_the_boundary_or_is_given(boundary, kind):
    assert Denoiser(Recorder(), EDM(boundary=boundary)).kind == kind
    assert Denoiser(Recorder(), EDM(boundary=boundary), kind="flow_map").kind == "flow_map"
    with pytest.raises(ValueError, match="kind is score; allowed: diffusion, consistency, flow_map"):
        Denoiser(Recorder(), kind="score")


def test_only_flow_maps_have_a_second_level():
    network, x, sigma, end = Recorder(), torch.zeros(2, 1, 4, 4), torch.ones(2), torch.tensor([0.5, 0.0])
    Denoiser(network, kind="flow_map")(x, sigma, None, end)
    # Nobody sees ln 0: the last level is sigma_min.
    assert_close(network.extra["c_noise_end"], 0.25 * torch.tensor([0.5, 0.002]).log())
    with pytest.raises(ValueError, match="sigma_end is for models of kind flow_map, this one is of kind diffusion"):
        Denoiser(network)(x, sigma, None, end)


def test_network_without_what_a_denoiser_asks_is_refused():
    with pytest.raises(ValueError, match="the network Linear lacks the attribute image_size"):
        Denoiser(nn.Linear(1, 1))


@pytest.mark.parametrize(("probability", "classes"), [(1.0, 3), (-0.1, 3), (0.1, 0)])
def test_refuses_impossible_label_dropout(make_denoiser, probability, classes):
    with pytest.raises(ValueError, match=rf"label_dropout is {probability}.*change model\.label_dropout"):
        make_denoiser(num_classes=classes, label_dropout=probability)


def test_variances_that_a_network_predicts_too_are_dropped(make_unet):
    network, x, sigma = make_unet(out_channels=2), torch.randn(2, 1, 4, 4), torch.ones(2)
    model = Denoiser(network)
    both = network(model.parametrization(sigma).input.view(-1, 1, 1, 1) * x, torch.zeros(2))
    assert both.shape == (2, 2, 4, 4)
    assert_close(model.raw(x, sigma), both[:, :1])


def test_config_rebuilds_the_model(make_unet):
    model = Denoiser(
        make_unet(num_classes=3, fourier_scale=0.02),
        EDM(sigma_data=0.6, boundary=0.01, noise_scale=250.0),
        kind="flow_map",
        sigma_min=0.01,
        sigma_max=50.0,
        label_dropout=0.1,
    )
    again = Denoiser.from_config(model.config)
    again.load_state_dict(model.state_dict())
    x, sigma, labels = torch.randn(3, 1, 4, 4), torch.tensor([0.01, 1.0, 50.0]), torch.tensor([0, 1, 2])
    assert torch.equal(again(x, sigma, labels), model(x, sigma, labels))
    assert again.config == model.config
    assert again.image_shape == (1, 4, 4)
    assert again.num_classes == 3


def test_config_is_plain_values(tiny_network):
    assert Denoiser(tiny_network(shift=0.5), EDM(boundary=0.002)).config == {
        "network": {"name": "tiny_test_network", "arguments": {"scale": 1.0, "shift": 0.5}},
        "parametrization": {
            "name": "edm",
            "arguments": {"sigma_data": 0.5, "boundary": 0.002, "noise_scale": 0.25},
        },
        "kind": "consistency",
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "label_dropout": 0.0,
    }


def test_network_without_a_name_has_no_config():
    with pytest.raises(ValueError, match=r"network Recorder has no name.*@register_network"):
        _ = Denoiser(Recorder()).config


def test_state_of_another_model_is_refused(make_denoiser):
    # The weights would fit: only the stated configuration tells f from D.
    with pytest.raises(
        ValueError,
        match=r"kind is consistency here, diffusion there.*parametrization\.boundary is 0\.002 here, 0\.0 there",
    ):
        make_denoiser(boundary=0.002).load_state_dict(make_denoiser(boundary=0.0).state_dict())


def test_log_of_sigma_is_taken_in_float32(make_denoiser):
    network = Recorder()
    sigma = torch.tensor([1e-3, 79.0])
    with torch.autocast("cpu", torch.bfloat16):
        Denoiser(network, EDM(noise_scale=250.0))(torch.zeros(2, 1, 4, 4), sigma)
    assert_close(network.c_noise, torch.tensor([250 * math.log(1e-3), 250 * math.log(79.0)]), rtol=1e-6, atol=0)
