"""Models, checkpoints and settings that version 0.1 wrote, in files that its own code made.

`data/models_0_1.json` holds `config.json` of model folders in format 2, and what these models answer to the images
below; their weights follow a rule, and are not stored. `data/settings_0_1.json` holds resolved configurations of runs.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from composing import composed
from consistency.checkpoints.native import load_model, save_denoiser
from consistency.commands.folder import RefusedError, check_same_settings
from consistency.models.denoiser import Denoiser
from consistency.models.legacy import upgrade_config, upgrade_settings
from consistency.models.parametrization import EDM, Flow
from snapshots import weights_of_rule

DATA = Path(__file__).parents[1] / "data"
MODELS = json.loads((DATA / "models_0_1.json").read_text())
SETTINGS = json.loads((DATA / "settings_0_1.json").read_text())
EXPECTED = {
    "edm": ("diffusion", EDM(0.75), 0.1),
    "flow": ("diffusion", Flow(), 0.0),
    "ect": ("consistency", EDM(0.5), 0.0),
    "ict": ("consistency", EDM(0.75, 0.002), 0.0),
    "cd": ("consistency", EDM(0.5, 0.01, 250.0), 0.0),
    "imported": ("consistency", EDM(0.5, 0.002, 250.0), 0.0),
    "nameless": ("diffusion", EDM(0.5), 0.0),  # nothing but its boundary says what it is
}


def weights(name):
    network = Denoiser.from_config(MODELS[name]["config.json"]["denoiser"]).network
    return {key: torch.from_numpy(weights_of_rule(key, tuple(v.shape))) for key, v in network.state_dict().items()}


@pytest.fixture
def folder(tmp_path):
    def write(name, **changes):
        (tmp_path / "config.json").write_text(json.dumps({**MODELS[name]["config.json"], **changes}))
        save_file(weights(name), tmp_path / "model.safetensors")
        return tmp_path

    return write


@pytest.fixture
def checkpoint(tmp_path):
    def write(name):
        stored = MODELS[name]["config.json"]
        state = {f"denoiser.network.{key}": value for key, value in weights(name).items()}
        state |= {"denoiser._extra_state": stored["denoiser"]}
        about = {"config": "seed: 0", **({"method": stored["info"]["method"]} if "method" in stored["info"] else {})}
        torch.save({"state_dict": state, "callbacks": {}, "consistency": about}, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    return write


@torch.no_grad()
def answer(denoiser):
    x, sigma = 3 * torch.from_numpy(weights_of_rule("x", (3, 1, 4, 4))), torch.tensor([0.02, 1.0, 40.0])
    return denoiser(x, sigma, torch.tensor([0, 1, -1]))


def check(denoiser, name):
    kind, parametrization, label_dropout = EXPECTED[name]
    stored = MODELS[name]["config.json"]["denoiser"]
    assert (denoiser.kind, denoiser.parametrization, denoiser.label_dropout) == (kind, parametrization, label_dropout)
    assert (denoiser.sigma_min, denoiser.sigma_max) == (stored["sigma_min"], stored["sigma_max"])
    assert_close(answer(denoiser).flatten(), torch.tensor(MODELS[name]["outputs"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_model_folders_answer_as_before(folder, name):
    denoiser, info = load_model(folder(name))
    assert info == MODELS[name]["config.json"]["info"]
    check(denoiser, name)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_answer_as_before(checkpoint, name):
    check(load_model(checkpoint(name))[0], name)


@pytest.mark.parametrize("name", MODELS)
def test_saved_again_it_is_of_this_version(folder, name, tmp_path):
    denoiser, info = load_model(folder(name))
    again, _ = load_model(save_denoiser(denoiser, tmp_path / "again", info))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["format"] == 3
    assert again.config == denoiser.config
    check(again, name)


def test_first_format_is_read_but_for_fourier_embeddings(folder):
    # In format 1 a Fourier embedding had its halves the other way round.
    check(load_model(folder("edm", format=1))[0], "edm")
    with pytest.raises(ValueError, match="has format 1"):
        load_model(folder("ict", format=1))


@pytest.mark.parametrize("name", ["edm", "flow", "ect", "ict", "cd"])
def test_state_of_a_run_is_taken_on(name):
    # `kind` is in no such state: it is the method's word, and no difference.
    kind, parametrization, _ = EXPECTED[name]
    stored = MODELS[name]["config.json"]["denoiser"]
    state = {**{f"network.{key}": value for key, value in weights(name).items()}, "_extra_state": stored}
    mine = Denoiser.from_config(upgrade_config(stored, MODELS[name]["config.json"]["info"]["method"]))
    assert mine.kind == kind
    mine.load_state_dict(state)
    check(mine.eval(), name)
    other = copy.deepcopy(state)
    other["_extra_state"]["boundary"] = 0.3
    with pytest.raises(ValueError, match=rf"boundary is {parametrization.boundary} here, 0\.3 there"):
        mine.load_state_dict(other)


def test_what_is_of_this_version_stays(make_denoiser):
    own = make_denoiser(num_classes=3, label_dropout=0.1).config
    assert upgrade_config(own) == upgrade_config(own, "EDM") == own


def settings(recipe, *overrides):
    where = ["paths.output_dir=unused", "run_name=test", "study_name=test"]
    return composed("train", f"experiment={recipe}", *where, *overrides)


@pytest.mark.parametrize("recipe", SETTINGS)
def test_runs_go_on_under_the_same_recipe(recipe, tmp_path):
    check_same_settings(settings(recipe), SETTINGS[recipe], tmp_path)


@pytest.mark.parametrize(
    ("recipe", "override", "words"),
    [
        ("smoke_ict", "data.sigma_data=0.7", "data.sigma_data: 0.75 -> 0.7"),
        ("smoke_ict", "model.sigma_max=70", "model.sigma_max: 80.0 -> 70"),
        ("smoke_ict", "levels.rho=5", "levels.rho: 7.0 -> 5"),
        ("smoke_edm", "parametrization.noise_scale=1", "parametrization.noise_scale: 0.25 -> 1"),
        ("smoke_ect", "levels.q=4", r"levels.q: \S+ -> 4"),
        ("digits_denoiser", "levels.sigma=0.25", "levels.sigma: 0.5 -> 0.25"),
        ("digits_flow", "model.label_dropout=0.2", "model.label_dropout: 0.1 -> 0.2"),
        ("smoke_cd", "method.dropout=0.1", "method.dropout: 0.0 -> 0.1"),
        ("smoke_edm", "levels=uniform_time", "levels._target_: .*LogNormal -> .*UniformTime"),
    ],
)
def test_runs_do_not_go_on_under_another(recipe, override, words, tmp_path):
    with pytest.raises(RefusedError, match=words):
        check_same_settings(settings(recipe, override), SETTINGS[recipe], tmp_path)


def test_settings_of_this_version_stay():
    now = {"model": {}, "levels": {}, "method": {}}
    assert upgrade_settings(now) == now
