"""Snapshots of VPPrecond, VEPrecond and iDDPMPrecond: what their modules say is what the model does."""

import math
import pickle
import sys
import types

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

from consistency import config
from consistency.checkpoints.edm import read_edm
from consistency.checkpoints.native import load_denoiser
from consistency.commands import checks
from consistency.commands.convert import convert
from consistency.models.table1 import IDDPM, VE, VP
from consistency.ops import append_dims

config.register()
CLASSES = {"vp": "VPPrecond", "ve": "VEPrecond", "iddpm": "iDDPMPrecond"}
OWN = {"vp": VP(), "ve": VE(), "iddpm": IDDPM()}
# As NVlabs' constructors set them; the levels of iDDPM are a buffer beside.
ATTRIBUTES = {
    "vp": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "sigma_min": 2**-10, "sigma_max": 152.16698},
    "ve": {"sigma_min": 0.02, "sigma_max": 100},
    "iddpm": {"C_1": 0.001, "C_2": 0.008, "M": 1000, "sigma_min": 0.0064223, "sigma_max": 20291.17},
}


def rebuild(meta):
    raise RuntimeError("the reader must not call this")


class Module:
    """Pickles as NVlabs' persistent objects do: a call of `rebuild` with its name, source and attributes."""

    def __init__(self, class_name, **attributes):
        self.class_name = class_name
        self.state = {"training": False, **attributes, "_parameters": {}, "_buffers": {}, "_modules": {}}

    def __reduce__(self):
        source = "raise RuntimeError('this must not be run')"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": self.class_name}
        return rebuild, ({**meta, "state": self.state},)

    def put(self, name, tensor):
        """A parameter, in modules below this one that are made where they are missing."""
        first, _, rest = name.partition(".")
        if rest:
            self.state["_modules"].setdefault(first, Module("Block")).put(rest, tensor)
        else:
            self.state["_parameters"][first] = torch.nn.Parameter(tensor)


def levels_of(attributes):
    """u, by the recursion of the paper."""
    count = attributes["M"]
    alpha_bar = [math.sin(0.5 * math.pi * j / (count * (attributes["C_2"] + 1))) ** 2 for j in range(count + 1)]
    u = [0.0]
    for j in range(count, 0, -1):
        u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], attributes["C_1"]) - 1))
    return torch.tensor(u)


@pytest.fixture
def written(published, tmp_path, monkeypatch):
    """Writes the golden network as a snapshot whose module has these attributes: (file, golden tensors)."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    package.persistence, module._reconstruct_persistent_obj = module, rebuild
    monkeypatch.setitem(sys.modules, "torch_utils", package)
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
    monkeypatch.setattr(rebuild, "__module__", "torch_utils.persistence")
    monkeypatch.setattr(rebuild, "__qualname__", "_reconstruct_persistent_obj")

    def write(name, *, class_name=None, u=None, **changed):
        state, tensors, _ = published(f"edm_precond_{name}")
        attributes = {**ATTRIBUTES[name], **changed}
        model = Module(class_name or CLASSES[name], img_resolution=16, img_channels=3, label_dim=0, **attributes)
        for key, value in state.items():
            model.put(key, value)
        if name == "iddpm":
            model.state["_buffers"]["u"] = levels_of(attributes) if u is None else u
        with (tmp_path / "file.pkl").open("wb") as file:
            pickle.dump({"ema": model, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {}}, file)
        return tmp_path / "file.pkl", tensors

    return write


def converted(source, out, **options):
    overrides = [f"{key}={value}" for key, value in {"format": "edm", "source": source, "out": out, **options}.items()]
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        cfg = compose("convert", overrides=overrides)
    checks.check("convert", cfg)
    return load_denoiser(convert(cfg)).eval()


@torch.no_grad()
def error(denoiser, tensors):
    noisy = tensors["x"] * append_dims(tensors["sigma"], 4)
    difference = denoiser(noisy, tensors["sigma"]) - tensors["denoised"]
    return float((difference.abs().amax((1, 2, 3)) / tensors["denoised"].abs().amax((1, 2, 3))).max())


@pytest.mark.parametrize("name", CLASSES)
def test_snapshot_gives_the_output_of_the_original_code(written, tmp_path, name):
    source, tensors = written(name)
    denoiser = converted(source, tmp_path / "out")
    assert (denoiser.kind, denoiser.parametrization) == ("diffusion", OWN[name])
    assert error(denoiser, tensors) < (5e-5 if name == "vp" else 1e-5)  # models/test_table1.py says why
    assert denoiser.sigma_min == ATTRIBUTES[name]["sigma_min"]
    if name == "iddpm":  # where EDM starts sampling, u_8, and not u_0
        assert denoiser.sigma_max == pytest.approx(80.204, rel=1e-5)
    else:
        assert denoiser.sigma_max == ATTRIBUTES[name]["sigma_max"]


@pytest.mark.parametrize("name", CLASSES)
def test_what_the_snapshot_says(written, name):
    source, _ = written(name, sigma_min=0.25, sigma_max=70.0)
    said = read_edm(source)[1]
    fields = {key: ATTRIBUTES[name].get(key, 0.0) for key in OWN[name].__dataclass_fields__}
    assert said == {
        "class_name": CLASSES[name],
        "parametrization": {"name": name, "arguments": fields},
        "sigma_min": 0.25,
        "sigma_max": 70.0,
    }


def clock_of_vp(sigma):
    """(M - 1) t(sigma) of beta_d 5, beta_min 0.3, M 500."""
    return 499 * ((0.3**2 + 2 * 5 * (1 + sigma**2).log()).sqrt() - 0.3) / 5


def clock_of_iddpm(sigma):
    """M - 1 - j(sigma) of C_1 0.01, C_2 0.05, M 50."""
    u = levels_of({"C_1": 0.01, "C_2": 0.05, "M": 50}).double()
    return 49 - (u[None] - sigma[:, None]).abs().argmin(1)


@pytest.mark.parametrize(
    ("name", "changed", "clock"),
    [
        ("vp", {"beta_d": 5.0, "beta_min": 0.3, "M": 500}, clock_of_vp),
        ("iddpm", {"C_1": 0.01, "C_2": 0.05, "M": 50}, clock_of_iddpm),
    ],
)
@torch.no_grad()
def test_attributes_of_the_snapshot_are_not_the_defaults(written, tmp_path, name, changed, clock):
    source, tensors = written(name, **changed)
    denoiser = converted(source, tmp_path / "out")
    sigma, x = tensors["sigma"], tensors["x"]
    wanted = clock(sigma.double()).float()
    raw = denoiser.network(x * append_dims(sigma / (sigma**2 + 1).sqrt(), 4), wanted)[:, :3]
    expected = append_dims(sigma, 4) * (x - raw)
    assert error(denoiser, {**tensors, "denoised": expected}) < 1e-4
    assert error(denoiser, tensors) > 0.01  # the golden numbers are of the defaults


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_state_dict_takes_an_option(published, tmp_path, name, suffix):
    state, tensors, _ = published(f"edm_precond_{name}")
    source = tmp_path / f"state{suffix}"
    save_file(state, source) if suffix == ".safetensors" else torch.save(state, source)
    denoiser = converted(source, tmp_path / "out", parametrization=name)
    assert denoiser.parametrization == OWN[name]
    assert error(denoiser, tensors) < (5e-5 if name == "vp" else 1e-5)
    assert (denoiser.sigma_min, denoiser.sigma_max) == OWN[name].own_range()
    if name != "iddpm":  # nothing in the file tells it from EDM
        assert error(converted(source, tmp_path / "edm"), tensors) > 0.01


def test_state_dict_of_iddpm_is_known_by_its_levels(published, tmp_path):
    state, tensors, _ = published("edm_precond_iddpm")
    torch.save({**state, "u": tensors["u"]}, tmp_path / "state.pt")
    denoiser = converted(tmp_path / "state.pt", tmp_path / "out")
    assert denoiser.parametrization == IDDPM()
    assert error(denoiser, tensors) < 1e-5


def test_other_arguments_of_a_state_dict_are_options(published, tmp_path):
    state, _, _ = published("edm_precond_iddpm")
    torch.save({**state, "u": levels_of({"C_1": 0.001, "C_2": 0.05, "M": 50})}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="are not those of IDDPM"):
        converted(tmp_path / "state.pt", tmp_path / "out")
    options = {"parametrization": "iddpm", "parametrization.C_2": 0.05, "parametrization.M": 50}
    assert converted(tmp_path / "state.pt", tmp_path / "out", **options).parametrization == IDDPM(C_2=0.05, M=50)


def test_levels_in_the_file_are_of_iddpm_only(published, tmp_path):
    state, _, _ = published("edm_precond_vp")
    torch.save({**state, "u": IDDPM().levels()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="are not those of VP"):
        converted(tmp_path / "state.pt", tmp_path / "out", parametrization="vp")


def test_outputs_beyond_the_channels_are_of_iddpm_only(published, tmp_path):
    state, _, _ = published("edm_precond_iddpm")
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"6 outputs for 3 channels, .* set parametrization=iddpm if it is one"):
        converted(tmp_path / "state.pt", tmp_path / "out")


def test_options_win_over_the_range_of_the_file(written, tmp_path):
    source, _ = written("iddpm")
    denoiser = converted(source, tmp_path / "out", sigma_min=0.01, sigma_max=500)
    assert (denoiser.sigma_min, denoiser.sigma_max) == (0.01, 500)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vp", {"parametrization": "ve"}, r"parametrization is VE\(.*\); .* says VP\(.*\); leave parametrization=null"),
        ("vp", {"parametrization": "vp", "parametrization.M": 999}, "leave parametrization=null"),
        ("iddpm", {"parametrization": "edm"}, "parametrization is EDM; allowed: vp, ve, iddpm, or null for EDM's"),
        ("vp", {"class_name": "EDMPrecond", "parametrization": "vp"}, "says EDM; leave parametrization=null"),
        ("vp", {"parametrization": "flow"}, "parametrization is Flow; allowed: vp, ve, iddpm"),
        ("vp", {"sigma_data": 0.5}, "sigma_data is given; allowed: null, parametrization vp has none"),
        ("ve", {"noise_scale": 250}, "noise_scale is given; allowed: null, parametrization ve has none"),
        (
            "ve",
            {"format": "openai", "parametrization": "ve"},
            "parametrization is given; allowed: null with format=openai",
        ),
    ],
)
def test_options_that_contradict_are_refused(written, tmp_path, name, options, words):
    options = dict(options)
    source, _ = written(name, **{key: options.pop(key) for key in ("class_name",) if key in options})
    with pytest.raises(ValueError, match=words) as caught:
        converted(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("vp", {"class_name": "OtherPrecond"}, "holds a OtherPrecond; this converter reads EDMPrecond, .*VPPrecond"),
        ("vp", {"beta_d": -1.0}, r"file\.pkl: beta_d must be positive, got -1"),
        ("vp", {"beta_min": "many"}, r"file\.pkl is not a network of NVlabs' layout: could not convert"),
        ("iddpm", {"M": 10**9, "u": torch.zeros(3)}, "M must be an integer from 2 to 100,000"),
        ("iddpm", {"u": torch.zeros(1001)}, r"levels u in .*file\.pkl are not those of IDDPM"),
        ("iddpm", {"C_2": 0.009, "u": levels_of(ATTRIBUTES["iddpm"])}, "are not those of IDDPM"),
        ("iddpm", {"C_1": 0.002, "u": levels_of(ATTRIBUTES["iddpm"])}, "are not those of IDDPM"),
        ("iddpm", {"u": torch.zeros(5)}, "are not those of IDDPM"),
        ("ve", {"sigma_min": 200.0}, "got sigma_min=200.0, sigma_max=100.0"),
    ],
)
def test_snapshots_that_make_no_sense_are_refused(written, tmp_path, name, changed, words):
    source, _ = written(name, **changed)
    with pytest.raises(ValueError, match=words) as caught:
        converted(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
