import pytest
from omegaconf import OmegaConf

from composing import composed
from consistency.commands.build import make_method
from consistency.commands.checks import check, check_teachers_settings
from consistency.commands.rules import RULES


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("metric.c", -1),
        ("callbacks.weight_ema.decays", 0.99),
        ("callbacks.sample_grid.num_samples", 0),
        ("callbacks.sample_grid.every_n_images", -1),
        ("optimizer.betas", [2, 3]),
        ("optimizer.weight_decay", float("nan")),
        ("trainer.devices", -3),
        ("trainer.precision", "foo"),
        ("trainer.accelerator", "tpux"),
        ("trainer.gradient_clip_val", -1),
        ("trainer.num_nodes", True),
        ("callbacks.nonfinite.wait", "perhaps"),
        ("data.channels", 4),
        ("model.sigma_min", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(option, value):
    cfg = composed("train", "paths.output_dir=out", "run_name=run", "study_name=study")
    OmegaConf.update(cfg, option, value, force_add=True)
    with pytest.raises(ValueError, match=rf"^{option} is .*; allowed: "):
        check("train", cfg)


@pytest.mark.parametrize("devices", [1, 2, -1, "2", "0,1", [0, 1], "auto"])
def test_devices_in_all_their_forms_pass(devices):
    assert RULES["train"]["trainer.devices"].holds(devices)


def test_what_is_allowed_passes():
    cfg = composed("train", "paths.output_dir=out", "run_name=run", "study_name=study")
    cfg.trainer.gradient_clip_val, cfg.metric.c = None, 0.0  # the plain norm: ECT
    check("train", cfg)


@pytest.mark.parametrize("option", ["parametrization=vp", "parametrization.noise_scale=1", "model.label_dropout=0.1"])
def test_settings_that_are_the_teachers_are_refused(option):
    with pytest.raises(ValueError, match="it is the teacher's; leave it out"):
        check_teachers_settings(composed("train", "method=cd"), ["method=cd", option])
    check_teachers_settings(composed("train"), ["method=ict", option])


def test_an_option_that_a_method_of_ones_own_does_not_take_is_named():
    cfg = composed("train", "method=edm", "paths.output_dir=out")
    cfg.method._target_ = f"{__name__}.takes_few"
    words = r"takes_few does not take the option \w+; leave it out with ~method\.\w+, or take \*\*options"
    with pytest.raises(ValueError, match=words):
        make_method(cfg)


def takes_few(denoiser):
    """In place of a method."""
