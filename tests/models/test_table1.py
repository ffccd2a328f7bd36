"""VP, VE and iDDPM against numbers of NVlabs' code (`edm_precond_*`), and from training to a teacher."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hydra.utils import instantiate
from torch.testing import assert_close

from composing import composed
from consistency.checkpoints.edm import read_edm
from consistency.checkpoints.native import load_denoiser
from consistency.commands import checks
from consistency.commands.convert import export
from consistency.commands.sample import DEFAULT_SAMPLERS, sample
from consistency.commands.start import start
from consistency.commands.train import train
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM, Coefficients
from consistency.models.register import build, describe_parametrization
from consistency.models.table1 import IDDPM, VE, VP
from consistency.noise import weightings
from consistency.noise.grids import iddpm_levels, vp_sigma, vp_time
from consistency.noise.levels import LogUniform, UniformIDDPMIndex, UniformVPTime
from consistency.ops import append_dims

CPU = torch.device("cpu")
OWN = {"vp": VP(), "ve": VE(), "iddpm": IDDPM()}
LEVELS = {"vp": UniformVPTime(), "ve": LogUniform(), "iddpm": UniformIDDPMIndex()}
BETAS = {"beta_d": 19.9, "beta_min": 0.1}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def error(published, tmp_path):
    """Largest error of D in an image, in units of its largest number, after an import of the golden network; [5]."""

    @torch.no_grad()
    def of(name, parametrization, change=lambda raw: raw):
        state, tensors, _ = published(f"edm_precond_{name}")
        torch.save(state, tmp_path / "file.pt")
        network, said = read_edm(tmp_path / "file.pt", parametrization=OWN[name])
        assert build("parametrization", said["parametrization"]) == OWN[name]
        noisy = tensors["x"] * append_dims(tensors["sigma"], 4)
        denoised = Denoiser(change(network).eval(), parametrization)(noisy, tensors["sigma"])
        return (denoised - tensors["denoised"]).abs().amax((1, 2, 3)) / tensors["denoised"].abs().amax((1, 2, 3))

    return of


@dataclass(frozen=True)
class Changed:
    """A parametrization with other coefficients."""

    own: object
    change: object
    boundary = 0.0

    def __call__(self, sigma):
        return Coefficients(**{**self.own(sigma)._asdict(), **self.change(sigma)})


@pytest.mark.parametrize("name", ["ve", "iddpm"])
def test_denoiser_gives_the_output_of_the_original_code(error, name):
    assert error(name, OWN[name]).max() < 1e-5


def test_vp_gives_the_output_of_the_original_code(error, golden):
    tensors, _ = golden("edm_precond_vp")
    found = error("vp", OWN["vp"])
    assert found[1:].max() < 1e-5
    # At 0.05 the original's 1 + sigma^2 is rounded in float32. With its c_noise ours is the same.
    assert found[0] < 5e-5
    assert error("vp", Changed(OWN["vp"], lambda sigma: {"noise": tensors["c_noise"]})).max() < 5e-6
    assert_close(OWN["vp"](tensors["sigma"]).noise, tensors["c_noise"], rtol=2e-5, atol=0)
    assert_close(OWN["vp"](tensors["sigma"]).noise[1:], tensors["c_noise"][1:], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vp", lambda sigma: {"out": sigma}),
        ("vp", lambda sigma: {"noise": 1000 * vp_time(sigma, **BETAS)}),
        ("vp", lambda sigma: {"input": 1 / (sigma**2 + 0.25).sqrt()}),
        ("ve", lambda sigma: {"out": -sigma}),
        ("ve", lambda sigma: {"noise": sigma.log()}),
        ("iddpm", lambda sigma: {"noise": IDDPM()(sigma).noise + 1}),
        ("iddpm", lambda sigma: {"noise": 999 - IDDPM()(sigma).noise}),
    ],
)
def test_wrong_coefficients_are_far_off(error, name, change):
    assert error(name, Changed(OWN[name], change)).max() > 1e-3


@pytest.mark.parametrize("name", OWN)
def test_wrong_parametrization_is_far_off(error, name):
    for other in (EDM(), *(OWN[key] for key in OWN if key != name)):
        assert error(name, other).max() > 1e-2


def test_second_half_of_the_outputs_is_ignored_and_the_first_is_not(error):
    def add(rows):
        def change(network):
            network.out_conv.bias[rows] += 1
            return network

        return change

    assert error("iddpm", IDDPM(), add(slice(3, 6))).max() < 1e-5
    assert error("iddpm", IDDPM(), add(slice(0, 3))).max() > 0.1


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_training_levels_and_weights_of_the_original_code(golden, name):
    tensors, _ = golden(f"edm_precond_{name}")
    sigma = LEVELS[name].quantile(tensors["loss_u"].double())
    # Of VP's last, sigma(1e-5), float32 has 2^-10: it rounds exp(1e-6) to 1 + 2^-20.
    exact = slice(0, -1) if name == "vp" else slice(0, None)
    assert_close(sigma[exact], tensors["loss_sigma"].double()[exact], rtol=1e-6, atol=0)
    if name == "vp":
        rounded = (torch.exp(torch.tensor(0.5 * 19.9 * 1e-5**2 + 0.1 * 1e-5)) - 1).sqrt()
        assert float(rounded) == float(tensors["loss_sigma"][-1]) == 2**-10
        assert float(sigma[-1]) == pytest.approx(math.sqrt(1e-6 + 19.9e-10 / 2 + 5e-13), rel=1e-9)
    weight = weightings.snr(tensors["loss_sigma"], tensors["loss_sigma"])
    assert_close(weight, tensors["loss_weight"], rtol=1e-6, atol=0)


def test_levels_of_iddpm_are_those_of_the_original_code(golden):
    tensors, how = golden("edm_precond_iddpm")
    levels, theirs = IDDPM().levels(), tensors["u"].double()
    assert levels.shape == (1001,)
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()
    # Theirs come from a recursion in float32, whose last digits are lost where u^2 is small.
    assert_close(levels[:500], theirs[:500], rtol=5e-6, atol=0)
    assert_close(levels, theirs, rtol=6e-4, atol=0)
    assert_close(doubles(levels[-2], levels[0]), doubles(how["sigma_min"], how["sigma_max"]), rtol=6e-4, atol=0)
    j = (999 - IDDPM()(tensors["sigma"]).noise).long()
    assert_close(levels[j], tensors["rounded"].double(), rtol=1e-4, atol=0)  # the next is 3% away


def test_levels_of_iddpm_by_the_formula_of_the_paper():
    def alpha_bar(j):
        return math.sin(0.5 * math.pi * j / (20 * 1.05)) ** 2

    expected = [0.0]
    for j in range(20, 0, -1):
        expected.insert(0, math.sqrt((expected[0] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), 0.01) - 1))
    assert_close(iddpm_levels(20, c_1=0.01, c_2=0.05), doubles(*expected), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_index_is_that_of_the_nearest_level(dtype):
    own = IDDPM()
    levels = own.levels()
    # Every level has its own index, as do numbers next to it; a level of float32 is not quite one of float64.
    assert own(levels.to(dtype)).noise.tolist() == list(range(999, -2, -1))
    sigma = torch.exp(torch.empty(20_000, dtype=torch.float64).uniform_(math.log(1e-4), math.log(4e4))).to(dtype)
    nearest = (levels[None] - sigma.double()[:, None]).abs().argmin(1)
    noise = own(sigma).noise
    assert noise.dtype == dtype
    assert torch.equal(noise, (999 - nearest).to(dtype))


def test_level_in_the_middle_belongs_to_the_higher_one_as_in_the_original_code():
    own = IDDPM(M=20)
    levels = own.levels()
    middles = (levels[:-1] + levels[1:]) / 2
    j = torch.arange(20, dtype=torch.float64)
    assert torch.equal(own(middles).noise, 19 - j)
    assert torch.equal(own(torch.nextafter(middles, middles.new_zeros(()))).noise, 18 - j)
    assert own(levels[-2:-1] / 3).noise == -1  # u_M = 0 is the nearest


def test_other_settings_of_iddpm_are_not_mixed_up():
    sigma = torch.logspace(-2, 2, 50)
    first, second = IDDPM()(sigma).noise, IDDPM(C_2=0.05)(sigma).noise
    assert not torch.equal(first, second)
    assert torch.equal(IDDPM()(sigma).noise, first)


@pytest.mark.parametrize("betas", [BETAS, {"beta_d": 5.0, "beta_min": 0.3}])
def test_time_and_level_of_vp_are_inverse(betas):
    time = torch.linspace(1e-5, 1, 101, dtype=torch.float64)
    assert_close(vp_time(vp_sigma(time, **betas), **betas), time, rtol=1e-9, atol=0)
    expected = (torch.exp(betas["beta_d"] / 2 * time**2 + betas["beta_min"] * time) - 1).sqrt()
    assert_close(vp_sigma(time, **betas), expected, rtol=1e-9, atol=0)
    # The textbook form of t loses half the digits here.
    sigma = vp_sigma(time, **betas)
    assert_close(vp_time(sigma.float(), **betas).double(), time, rtol=5e-6, atol=0)


@pytest.mark.parametrize("name", OWN)
def test_is_the_identity_at_zero_and_never_where_it_has_noise(make_unet, name):
    denoiser = Denoiser(make_unet(), OWN[name], kind="consistency")
    x = torch.randn(2, 1, 4, 4)
    out = denoiser(x, torch.tensor([0.0, 0.05]))
    assert torch.equal(out[0], x[0])
    assert not torch.equal(out[1], x[1])
    tiny = denoiser(x, torch.full((2,), 1e-6))
    assert_close(tiny, x, rtol=0, atol=1e-4)  # no jump above it


@pytest.mark.parametrize("name", OWN)
def test_comes_back_from_its_description(name):
    assert build("parametrization", describe_parametrization(OWN[name])) == OWN[name]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("num_steps", [1, 2, 18, 40])
@pytest.mark.parametrize("bounds", [None, (0.3, 20.0), (0.002, 0.009), (0.5, 19_000.0)])
def test_sampling_levels_fall_from_sigma_max_to_zero(name, num_steps, bounds):
    low, high = bounds or OWN[name].own_range()
    if name == "iddpm" and bounds == (0.002, 0.009) and num_steps > 2:
        return  # it has no more levels there
    levels = OWN[name].sampling_levels(num_steps, sigma_min=low, sigma_max=high)
    assert levels.shape == (num_steps + 1,)
    assert levels.dtype == torch.float64
    assert levels[0] == high
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()


def test_sampling_levels_of_vp_are_those_of_the_table():
    low, high = VP().own_range()
    assert (low, high) == (pytest.approx(0.0010005, rel=1e-5), pytest.approx(152.16698, rel=1e-6))
    i = torch.arange(18, dtype=torch.float64)
    expected = vp_sigma(1 + i / 17 * (1e-3 - 1), **BETAS)
    assert_close(VP().sampling_levels(18, sigma_min=low, sigma_max=high)[:-1], expected, rtol=1e-9, atol=0)
    # A range that begins above eps_s is kept; so is one that lies below it altogether.
    assert float(VP().sampling_levels(5, sigma_min=0.3, sigma_max=high)[-2]) == pytest.approx(0.3, rel=1e-9)
    assert float(VP().sampling_levels(5, sigma_min=low, sigma_max=0.01)[-2]) == pytest.approx(low, rel=1e-9)


def test_sampling_levels_of_ve_are_those_of_the_table():
    i = torch.arange(18, dtype=torch.float64)
    expected = (100.0**2 * (0.02**2 / 100.0**2) ** (i / 17)).sqrt()
    assert_close(VE().sampling_levels(18, sigma_min=0.02, sigma_max=100.0)[:-1], expected, rtol=1e-9, atol=0)


def test_sampling_levels_of_iddpm_are_those_of_the_table():
    own = IDDPM()
    low, high = own.own_range()
    assert high == pytest.approx(80.204, rel=1e-5)
    i = torch.arange(18, dtype=torch.float64)
    j = torch.floor(8 + (999 - 8) / 17 * i + 0.5).long()
    assert torch.equal(own.sampling_levels(18, sigma_min=low, sigma_max=high)[:-1], own.levels()[j])
    assert own.sampling_levels(992, sigma_min=low, sigma_max=high).shape == (993,)
    with pytest.raises(ValueError, match=r"992 levels .* got num_steps=993; change sampler\.num_steps"):
        own.sampling_levels(993, sigma_min=low, sigma_max=high)


@pytest.mark.parametrize("name", OWN)
def test_draws_are_the_quantiles_of_uniform_numbers(name):
    levels = LEVELS[name]
    assert levels.gives == "level"
    u = torch.rand(10_000, dtype=torch.float64)
    drawn = levels(0, u)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, levels.quantile(u).float())


def test_draws_of_iddpm_take_every_level_but_zero_equally_often():
    levels = UniformIDDPMIndex(M=20)
    middle = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    assert torch.equal(levels.quantile(middle), iddpm_levels(20, c_1=0.001, c_2=0.008)[:-1])
    assert levels.quantile(doubles(1 - 2**-53)) == levels.quantile(middle[-1:])
    j = 19 - IDDPM(M=20)(levels(0, torch.rand(40_000, dtype=torch.float64))).noise.long()
    assert_close(torch.bincount(j, minlength=20) / 40_000, torch.full((20,), 0.05), rtol=0, atol=0.006)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VP(beta_d=0), r"beta_d must be positive, got 0; change parametrization\.beta_d"),
        (lambda: VP(beta_min=-1), "beta_min must be positive"),
        (lambda: VP(M=math.inf), "M must be positive"),
        (lambda: IDDPM(C_1=1.0), "C_1 must be below 1"),
        (lambda: IDDPM(C_2=math.nan), "C_2 must be positive"),
        (lambda: IDDPM(M=1), "M must be an integer from 2"),
        (lambda: IDDPM(M=10**9), "M must be an integer from 2 to 100,000"),
        (lambda: UniformVPTime(eps_t=0), "eps_t must lie between 0 and 1"),
        (lambda: LogUniform(sigma_min=2, sigma_max=1), "sigma_min < sigma_max"),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", OWN)
def test_one_option_chooses_all_of_it(name):
    cfg = composed("train", "experiment=smoke_edm", f"parametrization={name}")
    assert instantiate(cfg.parametrization) == OWN[name]
    assert instantiate(cfg.weighting).func is weightings.snr
    low, high = OWN[name].own_range()
    assert_close(doubles(cfg.model.sigma_min, cfg.model.sigma_max), doubles(low, high), rtol=1e-5, atol=0)
    u = torch.linspace(0, 0.999, 100, dtype=torch.float64)
    assert_close(instantiate(cfg.levels).quantile(u), LEVELS[name].quantile(u), rtol=1e-9, atol=0)


def test_levels_follow_the_settings_of_the_parametrization():
    cfg = composed("train", "experiment=smoke_edm", "parametrization=vp", "parametrization.beta_d=5")
    assert instantiate(cfg.levels) == UniformVPTime(beta_d=5)
    cfg = composed("train", "experiment=smoke_edm", "parametrization=ve", "model.sigma_max=50")
    assert instantiate(cfg.levels) == LogUniform(sigma_max=50)
    cfg = composed("train", "experiment=smoke_edm", "parametrization=iddpm", "parametrization.M=100")
    assert instantiate(cfg.levels) == UniformIDDPMIndex(M=100)


@pytest.mark.parametrize("name", ["iddpm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vp", "ve"))])
def test_trains_exports_samples_and_teaches(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)

    def run(run_name, *overrides):
        folder = tmp_path / "outputs" / run_name
        given = (f"run_name={run_name}", f"paths.output_dir={folder}", f"parametrization={name}", "trainer.max_steps=2")
        cfg = composed("train", *overrides, *given, "callbacks.sample_grid=null")
        checks.check("train", cfg)
        start(cfg, lambda: train(cfg))
        return folder

    def draw(model, ckpt):
        sampler = DEFAULT_SAMPLERS[model.kind]
        cfg = composed("sample", f"ckpt={ckpt}", f"out={model.kind}.png", "num_samples=4", f"sampler={sampler}")
        checks.check("sample", cfg)
        assert sample(cfg).exists()

    folder = run("teacher", "experiment=smoke_edm")
    cfg = composed("export", f"ckpt={folder}", "out=model")
    checks.check("export", cfg)
    export(cfg)
    denoiser = load_denoiser(tmp_path / "model")
    assert (denoiser.kind, denoiser.parametrization) == ("diffusion", OWN[name])
    assert json.loads((tmp_path / "model" / "config.json").read_text())["denoiser"]["parametrization"]["name"] == name

    draw(denoiser, "model")

    student = load_denoiser(run("student", "experiment=smoke_cd", f"teacher={folder}"))
    assert (student.kind, student.boundary) == ("consistency", student.sigma_min)
    assert replace(student.parametrization, boundary=0.0) == OWN[name]
    x, at_boundary = torch.randn(2, *student.image_shape), torch.full((2,), student.sigma_min)
    assert torch.equal(student(x, at_boundary, torch.tensor([0, 1])), x)
    x = torch.randn(2, *student.image_shape)
    assert torch.equal(student(x, torch.zeros(2), torch.zeros(2, dtype=torch.int64)), x)
    draw(student, tmp_path / "outputs" / "student")
