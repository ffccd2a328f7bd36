"""Every configuration file on disk composes, and every recipe can be built."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

import composing
from consistency import config, save_denoiser
from consistency.commands import checks
from consistency.commands.build import make_method
from consistency.data.module import ImageDataModule
from consistency.methods.base import Random
from consistency.models.parametrization import EDM, Flow
from consistency.models.unet import UNet

config.register()


def files_of(group):
    return sorted(path.stem for path in (config.CONF_DIR / group).glob("*.yaml"))


ALL_RECIPES = sorted(path.stem for path in (config.EXPERIMENTS_DIR / "experiment").glob("*.yaml"))
RECIPES = [name for name in ALL_RECIPES if name.startswith(("digits", "photos", "smoke"))]
PUBLISHED = [name for name in ALL_RECIPES if name not in RECIPES]
NETWORKS = files_of("network")
OF_THE_METHOD = ("parametrization", "levels", "weighting", "metric", "curriculum")
# Chosen side by side, so that few compositions hold every file of every group once.
OF_THE_RUN = ("data", "optimizer", "logger", "strategy", "precision", "hydra/launcher", "hydra/sweeper")


def slow_but_for(names, *fast):
    """Every name; a test of `fast` ones tells that the installation is sound, of the others that each file is."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A diffusion model with the network of the smoke recipes."""
    method = instantiate(composed("experiment=smoke_edm").method, _convert_="object")
    return save_denoiser(method.denoiser, tmp_path_factory.mktemp("teacher"), {"method": "EDM", "weights": "raw"})


def composed(*overrides, name="train"):
    """A configuration; of consistency-train without its default recipe, but for an `experiment=`."""
    if name == "train" and not any(override.startswith("experiment=") for override in overrides):
        overrides = ("~experiment", "trainer.max_steps=1500", *overrides)
    cfg = composing.composed(name, *overrides, *(["paths.output_dir=unused"] if name == "train" else []))
    if (
        name == "train"
        and not any(o.startswith("run_name") for o in overrides)
        and "${consistency" in str(OmegaConf.to_container(cfg)["run_name"])
    ):
        cfg.run_name = "test"
    return cfg


def check(cfg):
    """What a command checks before anything is made: the options, then what the parts say to each other."""
    checks.check("train", cfg)
    return make_method(cfg)


def test_there_are_recipes_for_all_methods():
    assert {
        f"{kind}_{method}" for kind in ("digits", "photos", "smoke") for method in ("edm", "cd", "ct", "ict", "ect")
    } <= set(RECIPES)


@pytest.mark.parametrize("recipe", slow_but_for(RECIPES, *(name for name in RECIPES if "photos" not in name)))
def test_recipe_builds(recipe, tmp_path, teacher_folder):
    cfg = composed(f"experiment={recipe}")
    for option in ("teacher", "init_from"):
        if cfg.get(option):
            cfg[option] = str(teacher_folder)
    method = check(cfg)
    OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(method.denoiser.network, UNet)
    assert all(callback is None or instantiate(callback, _convert_="object") for callback in cfg.callbacks.values())
    assert instantiate(cfg.data, _convert_="object").batch_size == cfg.data.batch_size


def test_recipes_of_the_papers():
    assert set(PUBLISHED) == {
        *(f"cifar10_{method}" for method in ("edm", "cd", "ct", "ict", "ict_deep", "ect")),
        *(f"imagenet64_{method}" for method in ("edm", "cd", "ct", "ict", "ict_deep")),
        *(f"lsun_{kind}_{method}" for kind in ("bedroom", "cat") for method in ("edm", "cd", "ct")),
        "flowers64_ct",
    }


@cache
def on_meta(recipe):
    """The recipe's configuration and method; networks have shapes and no memory."""
    cfg = composed(f"experiment={recipe}")
    if cfg.get("metric") and cfg.metric._target_.endswith("LPIPS"):
        cfg.metric = {"_target_": "consistency.methods.metrics.l2", "_partial_": True}  # LPIPS needs a file
    with torch.device("meta"):
        return cfg, instantiate(cfg.method, _convert_="object")


# What the papers say (EDM, App. F; CM, Table 3; iCT, Table 1, App. B; ECT): parameters, batch, steps, rate, EMA a step.
NUMBERS = {
    "cifar10_edm": (56_397_827, 512, 390_625, 1e-3, 0.5 ** (512 / 500_000)),
    "cifar10_cd": (56_397_827, 512, 800_000, 4e-4, 0.9999),
    "cifar10_ct": (56_395_523, 512, 800_000, 4e-4, 0.9999),
    "cifar10_ict": (56_395_523, 1024, 400_000, 1e-4, 0.99993),
    "cifar10_ict_deep": (97_610_499, 1024, 400_000, 1e-4, 0.99993),
    "cifar10_ect": (55_733_891, 128, 200_000, 1e-4, 0.9999),
    "imagenet64_edm": (295_899_267, 4096, 610_352, 1e-4, 0.9999432189950708),
    "imagenet64_cd": (295_899_267, 2048, 600_000, 8e-6, 0.9999432189950708),
    "imagenet64_ct": (295_899_267, 2048, 800_000, 8e-6, 0.9999432189950708),
    "imagenet64_ict": (282_168_003, 4096, 800_000, 1e-4, 0.99997),
    "imagenet64_ict_deep": (472_767_555, 4096, 800_000, 1e-4, 0.99997),
    "lsun_bedroom_edm": (526_304_771, 256, 300_000, 1e-4, 0.9999432189950708),
    "lsun_bedroom_cd": (526_304_771, 2048, 600_000, 1e-5, 0.9999432189950708),
    "lsun_bedroom_ct": (526_304_771, 2048, 1_000_000, 1e-5, 0.9999432189950708),
    "lsun_cat_edm": (526_304_771, 256, 300_000, 1e-4, 0.9999432189950708),
    "lsun_cat_cd": (526_304_771, 2048, 600_000, 1e-5, 0.9999432189950708),
    "lsun_cat_ct": (526_304_771, 2048, 1_000_000, 1e-5, 0.9999432189950708),
    "flowers64_ct": (61_804_419, 128, 200_000, 1e-4, 0.9999),
}
# N at the first and the last step, and mu at the first (CD: fixed).
SCHEDULES = {
    "cifar10_cd": (18, 18, None),
    "cifar10_ct": (2, 151, 0.81),
    "cifar10_ict": (11, 1281, None),
    "cifar10_ict_deep": (11, 1281, None),
    "imagenet64_cd": (40, 40, 0.95),
    "imagenet64_ct": (2, 201, 0.9025),
    "imagenet64_ict": (11, 1281, None),
    "imagenet64_ict_deep": (11, 1281, None),
    "lsun_bedroom_cd": (40, 40, 0.95),
    "lsun_bedroom_ct": (2, 151, 0.9025),
    "flowers64_ct": (2, 151, 0.81),
}


@pytest.mark.parametrize("recipe", slow_but_for(PUBLISHED, "cifar10_cd", "cifar10_ict"))
def test_published_recipe_has_the_numbers_of_its_paper(recipe, monkeypatch):
    if recipe.endswith("_cd"):
        teacher = on_meta(recipe.replace("_cd", "_edm"))[1].denoiser
        monkeypatch.setattr("consistency.checkpoints.native.load_denoiser", lambda source: teacher)
    cfg, method = on_meta(recipe)
    parameters, batch, steps, rate, decay = NUMBERS[recipe]
    count = sum(parameter.numel() for parameter in method.denoiser.parameters())
    assert (count, cfg.data.batch_size, cfg.trainer.max_steps, cfg.optimizer.lr) == (parameters, batch, steps, rate)
    half_lives = cfg.callbacks.weight_ema.half_lives
    assert 0.5 ** (batch / half_lives[0]) == pytest.approx(decay, abs=2e-7 * len(half_lives))
    if recipe in SCHEDULES:
        first, last, mu = SCHEDULES[recipe]
        assert (method.levels.num_levels(0), method.levels.num_levels(steps - 1)) == (first, last)
        assert (method.target_decay and method.target_decay(0)) == (mu and pytest.approx(mu))
    cfg = cfg.copy()
    for option in ("teacher", "init_from"):
        if cfg[option] is not None:
            cfg[option] = str(config.CONF_DIR)  # one that exists
    checks.check("train", cfg)


def settings_of(network):
    """A network's settings under EDM, at reduced width; larger networks that differ only there are the same."""
    cfg = composed("method=edm", "optimizer=adam")
    cfg.network = composing.composed(f"network/{network}").network  # the file by itself: a third of the time
    small = {"image_size": 32, "in_channels": 3, "num_classes": 4}
    if "hidden_size" in cfg.network:  # DiT
        small |= {"hidden_size": 24, "depth": 2, "num_heads": 2}
    else:
        small |= {"channels": 32, "num_blocks": 1, "attention_resolutions": [8]}
        small |= {"head_channels": 16} if cfg.network.head_channels else {}
    OmegaConf.to_container(cfg, resolve=True)
    cfg.network = {**cfg.network, **small}
    return cfg


def test_networks_train_at_reduced_width():
    different = {str(OmegaConf.to_container(cfg.network)): cfg for cfg in map(settings_of, NETWORKS)}
    assert len(different) > 7
    for network, cfg in different.items():
        method = instantiate(cfg.method, _convert_="object")
        with torch.no_grad():  # fresh last layers are zero, and hide what lies before them from the gradient
            for parameter in method.denoiser.parameters():
                parameter.normal_(std=0.05)
        step = method.step(torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([0, 3]), 0, Random())
        step.loss.mean().backward()
        still = [name for name, p in method.denoiser.named_parameters() if p.grad is None or not p.grad.any()]
        assert still == [], network


def choices_of_the_method():
    """Options of the groups that a method's parts come from, with a method that they go with; each comes once."""
    own = [name for name in files_of("parametrization") if name != "consistency"]
    for name in own:  # what the parametrization is trained with has its name
        yield ["method=edm", *(f"{group}={name}" for group in ("parametrization", "model", "levels", "weighting"))]
    rest = {group: [name for name in files_of(group) if name not in own] for group in OF_THE_METHOD}
    pairs = [name for name in rest["levels"] if name.endswith("_index")]
    yield ["method=ect", "levels=ratio", "curriculum=ect"]
    for levels in set(rest["levels"]) - {"ratio", *pairs}:
        yield ["method=edm", f"levels={levels}"]
    rest |= {"levels": pairs, "curriculum": [name for name in rest["curriculum"] if name != "ect"]}
    for chosen in side_by_side(rest):
        yield ["experiment=digits_ict", "model=consistency", *chosen]


def side_by_side(groups):
    """Lists of overrides, as many as the longest group has options."""
    for index in range(max(map(len, groups.values()))):
        yield [f"{group}={options[min(index, len(options) - 1)]}" for group, options in groups.items()]


OF_METHODS = sorted(choices_of_the_method())
OF_RUNS = [
    *side_by_side({group: files_of(group) for group in OF_THE_RUN}),
    *([f"debug={n}"] for n in files_of("debug")),
]


def test_every_option_is_tried():
    tried = {override for overrides in (*OF_METHODS, *OF_RUNS) for override in overrides}
    groups = (*OF_THE_METHOD, *OF_THE_RUN, "model", "debug")
    assert {f"{group}={name}" for group in groups for name in files_of(group)} <= tried


@pytest.mark.parametrize("overrides", OF_METHODS, ids=" ".join)
def test_options_of_the_method_instantiate(overrides):
    cfg = composed(*overrides)
    OmegaConf.to_container(cfg, resolve=True)
    for group in OF_THE_METHOD:
        if f"{group}=" in " ".join(overrides) and "metric=lpips" not in overrides:  # a file: methods/test_lpips.py
            instantiate(cfg[group], _convert_="object")


@pytest.mark.parametrize("overrides", OF_RUNS, ids=" ".join)
def test_options_of_a_run_compose(overrides):
    cfg = composed(*overrides)
    OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(instantiate(cfg.data, _convert_="object"), ImageDataModule)


@pytest.mark.parametrize("overrides", [o for o in OF_METHODS if "experiment=digits_ict" in o], ids=" ".join)
def test_every_curriculum_goes_with_the_main_recipe(overrides):
    cfg = composed(*overrides)
    checks.check("train", cfg)
    levels = instantiate(cfg.levels, _convert_="object")
    # All shapes of N(k) end at the same number of levels, in the last step or after it.
    end = 18 if "curriculum=fixed" in overrides else 161
    assert levels.num_levels(cfg.trainer.max_steps) == end
    assert levels.num_levels(cfg.trainer.max_steps - 1) == pytest.approx(end, abs=1)
    assert (cfg.curriculum.target_decay is None) == ({"curriculum=ct", "curriculum=fixed"}.isdisjoint(overrides))


def test_constant_curriculum_is_constant():
    levels = instantiate(composed("trainer.max_steps=400_000", "curriculum=constant").curriculum.num_levels)
    assert {levels(step) for step in (0, 1, 1000, 399_999)} == {1281}


@pytest.mark.parametrize("method", ["edm", "flow", "ct", "ict", "ect"])
def test_method_alone_builds(method):
    made = check(composed(f"method={method}"))
    assert made.denoiser.kind == made.kind == ("diffusion" if method in ("edm", "flow") else "consistency")


def test_without_arguments_the_small_recipe_is_trained():
    bare, named = (composing.composed("train", *more, "run_name=x") for more in ([], ["experiment=digits_ict"]))
    assert bare == named
    assert (bare.trainer.max_steps, bare.data.num_classes) == (1500, 10)


def test_without_a_recipe_the_number_of_steps_is_asked_for():
    cfg = composing.composed("train", "~experiment", "run_name=x", "paths.output_dir=unused")
    with pytest.raises((ValueError, MissingMandatoryValue), match=r"trainer\.max_steps") as caught:
        checks.check("train", cfg)
    assert OmegaConf.is_missing(cfg.trainer, "max_steps")
    assert "max_steps" in str(caught.value).splitlines()[0]


# What a parametrization is trained with is chosen with it, and an option of one's own wins.
@pytest.mark.parametrize(
    ("overrides", "levels", "weighting"),
    [
        (["method=edm"], "LogNormal", "edm"),
        (["method=edm", "parametrization=flow"], "UniformTime", "velocity"),
        (["method=flow"], "UniformTime", "velocity"),
        (["method=flow", "levels=lognormal", "weighting=uniform"], "LogNormal", "uniform"),
    ],
)
def test_levels_and_weighting_follow_the_parametrization(overrides, levels, weighting):
    method = check(composed(*overrides))
    assert type(method.levels).__name__ == levels
    assert method.weighting.func.__name__ == weighting


@pytest.mark.parametrize(
    ("method", "kind", "boundary"),
    [("edm", EDM, 0), ("flow", Flow, 0), ("ect", EDM, 0), ("ct", EDM, 0.01), ("ict", EDM, 0.01)],
)
def test_settings_of_data_and_model_reach_what_takes_them(method, kind, boundary):
    options = ("model.sigma_min=0.01", "model.sigma_max=40", "data.sigma_data=0.6", "parametrization.noise_scale=1")
    made = check(composed(f"method={method}", *options))
    assert (made.denoiser.sigma_min, made.denoiser.sigma_max) == (0.01, 40)
    expected = {"boundary": boundary, "noise_scale": 1, **({"sigma_data": 0.6} if kind is EDM else {})}
    assert made.denoiser.parametrization == kind(**expected)
    for name in ("sigma_min", "sigma_max"):
        assert getattr(made.levels, name, None) in (getattr(made.denoiser, name), None)
    if method == "edm":
        assert made.weighting.keywords == {"sigma_data": 0.6}


@pytest.mark.parametrize("sampler", files_of("sampler"))
def test_sampler_instantiates(sampler):
    instantiate(composed(f"sampler={sampler}", "ckpt=x", name="sample").sampler, _convert_="object")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.max_steps=0"], ["trainer.max_steps", "0", "at least 1"]),
        (["data.batch_size=0"], ["data.batch_size", "at least 1"]),
        (["optimizer.lr=oops"], ["optimizer.lr", "oops", "positive number"]),
        (["model.sigma_min=90"], ["model.sigma_min", "90", "sigma_max=80"]),
        (["network.channel_mult=[1,1,1,1,1]"], ["network.channel_mult", "image_size=8"]),
        (["method=edm", "levels=lognormal_index", "+curriculum=ict"], ["levels", "GridPairs", "lognormal"]),
        (["levels=lognormal"], ["levels", "LogNormal", "uniform_index"]),
        (["method=edm", "weighting=inverse_gap"], ["weighting", "inverse_gap", "EDM"]),
        (["method=edm", "parametrization.boundary=0.1"], ["EDM", "0.1", "parametrization.boundary"]),
        (["parametrization.boundary=-1"], ["boundary", "-1", "parametrization.boundary"]),
        (["method=edm", "levels=fixed", "levels.sigma=0"], ["levels.sigma", "0", "positive"]),
        (["method=flow", "parametrization.noise_scale=0"], ["noise_scale", "0", "parametrization.noise_scale"]),
        (["model.label_dropout=0.1"], ["label_dropout", "0.1", "model.label_dropout"]),
        (["data.batch_size=6", "trainer.accumulate_grad_batches=4"], ["data.batch_size", "6", "multiple"]),
        (["trainer.accumulate_grad_batches=some"], ["trainer.accumulate_grad_batches", "some", "auto"]),
        (["trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches", "0", "at least 1"]),
        (["overwrite=maybe"], ["overwrite", "maybe", "true or false"]),
        (["estimate=maybe"], ["estimate", "maybe", "true or false"]),
        (["compile=3"], ["compile", "3", "backend"]),
        (["callbacks=quality"], ["evaluation", "None", "digits, classifier"]),
        (["run_name=../up"], ["run_name", "../up"]),
        (["seed=-1"], ["seed", "-1", "at least 0"]),
        (["network.num_blocks=0"], ["network.num_blocks", "0", "at least 1"]),
        (["network.channels=abc"], ["network.channels", "abc", "integer"]),
        (["network.fourier_scale=abc"], ["network.fourier_scale", "abc", "positive"]),
        (["network.fourier_scale=-1"], ["network.fourier_scale", "-1", "positive"]),
        (["network.head_channels=0"], ["network.head_channels", "0", "at least 1"]),
        (["network.dropout=1"], ["network.dropout", "1", "below 1"]),
        (["network.scale_shift=maybe"], ["network.scale_shift", "maybe", "true or false"]),
        (["network.resample_filter=[]"], ["network.resample_filter", "[]", "[1,3,3,1]"]),
        (["network.attention_resolutions=8"], ["network.attention_resolutions", "8", "a list of sizes"]),
        (["data.num_workers=-1"], ["data.num_workers", "-1", "at least 0"]),
        (["data.on_device=maybe"], ["data.on_device", "maybe", "true or false"]),
        (["data.image_size=0"], ["data.image_size", "0", "at least 1"]),
        (["network.channel_mult=2"], ["network.channel_mult", "2", "list"]),
        (["levels.rho=0"], ["levels.rho", "positive"]),
        (["curriculum=ect"], ["levels.num_levels", "curriculum.num_levels"]),
        (["network.num_classes=5"], ["network.num_classes", "5", "data.num_classes=10"]),
        (["data.batch_size=oops"], ["data.batch_size", "oops", "integer"]),
        (["method=cd"], ["teacher", "None", "method=edm"]),
        (["method=ect", "levels.q=256", "levels.steps_per_stage=100"], ["levels.steps_per_stage", "100"]),
        (["init_from=nowhere/run"], ["init_from", "nowhere/run", "existing run", "consistency-convert"]),
        (["init_from=outputs/nothing"], ["init_from", "outputs/nothing", "experiment=nothing"]),
        (["method=edm", "augment=edm", "data.flip=true"], ["data.flip", "augment=edm"]),
        (["method=edm", "augment=edm", "network.augment_channels=0"], ["network.augment_channels", "9"]),
    ],
)
def test_impossible_configuration_is_one_clear_line(overrides, words):
    with pytest.raises((ValueError, InstantiationException)) as caught:
        check(composed(*overrides))
    message = str(caught.value.__cause__ if isinstance(caught.value, InstantiationException) else caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_attention_at_a_size_that_is_not_there_is_said(caplog):
    checks.check("train", composed())
    assert caplog.text == ""
    checks.check("train", composed("data.image_size=16"))  # the own data of docs/data.md
    assert "lists [4], but the network has feature maps of [16, 8] pixels" in caplog.text


def test_network_beside_a_teacher_is_not_checked():
    checks.check("train", composed("method=cd", f"teacher={config.CONF_DIR}", "data.image_size=7"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.image_size=0"], "data.image_size is 0; allowed: an integer, at least 1"),
        (["data.image_size=abc"], "data.image_size is abc"),
        (["data.channels=2"], "data.channels is 2; allowed: 1 (grey) or 3 (colour)"),
        (["data.dataset.limit=abc"], "data.dataset.limit is abc; allowed: an integer, at least 1, or null"),
        (["data.dataset.limit=0"], "data.dataset.limit is 0"),
        (["data.batch_size=x"], "data.batch_size is x"),
        (["data.num_classes=-1"], "data.num_classes is -1"),
        (["data.num_workers=-1"], "data.num_workers is -1"),
        (["data.flip=abc"], "data.flip is abc; allowed: true or false"),
        (["seed=-1"], "seed is -1"),
        (["out=grid.jpg"], "out is grid.jpg; allowed: a name that ends in .png, or null"),
    ],
)
def test_impossible_options_of_consistency_data(overrides, words):
    checks.check("data", composed("data=folder", name="prepare"))
    with pytest.raises(ValueError) as caught:
        checks.check("data", composed("data=folder", *overrides, name="prepare"))
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_every_yaml_says_what_it_is():
    files = [*config.CONF_DIR.rglob("*.yaml"), *config.EXPERIMENTS_DIR.rglob("*.yaml")]
    for file in files:
        lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# "), f"{file} has no first line that says what it is"
        assert len(lines) < 55, f"{file} is long"


class TestRunName:
    choices = {"experiment": "digits_ict", "method": "ict", "data": "digits"}

    def test_of_a_plain_recipe_is_the_recipe(self):
        assert config.run_name(self.choices, ["experiment=digits_ict"]) == "digits_ict"

    def test_changes_with_what_changes_the_result(self):
        names = {
            config.run_name(self.choices, ["experiment=digits_ict", *rest])
            for rest in ([], ["seed=1"], ["seed=2"], ["metric=l2"], ["+network.x=1"])
        }
        assert len(names) == 5

    def test_ignores_what_does_not(self):
        neutral = [
            "logger=wandb",
            "overwrite=true",
            "compile=true",
            "callbacks.nonfinite.patience=5",
            "data.num_workers=4",
            "callbacks.log.every_n_steps=1",
            "logger.wandb.offline=true",
        ]
        assert config.run_name(self.choices, ["experiment=digits_ict", *neutral]) == "digits_ict"

    def test_does_not_depend_on_the_order(self):
        a, b = ["seed=1", "metric=l2"], ["metric=l2", "seed=1"]
        assert config.run_name(self.choices, a) == config.run_name(self.choices, b)

    def test_without_a_recipe_is_method_and_data(self):
        choices = {"experiment": None, "method": "ct", "data": "digits"}
        assert config.run_name(choices, []) == "ct_digits"


@pytest.mark.parametrize(
    ("cfg", "variants", "words"),
    [
        ({"ablation": {}, "variant": None}, {}, "ablation=mine must begin with '# @package _global_'"),
        ({"variant": None}, {"a": []}, "needs hydra.mode: MULTIRUN"),
    ],
)
def test_an_ablation_never_trains_one_ordinary_run(cfg, variants, words):
    hydra = {"sweeper": {"variants": variants}, "runtime": {"choices": {"ablation": "mine", "sweep": None}}}
    with pytest.raises(ValueError, match=re.escape(words)):
        checks.check_variants(OmegaConf.create(cfg), OmegaConf.create(hydra))
    checks.check_variants(
        OmegaConf.create({"variant": "a"}), OmegaConf.create({**hydra, "sweeper": {"variants": {"a": []}}})
    )


def test_conf_dir_is_found():
    assert (Path(config.CONF_DIR) / "train.yaml").exists()


def test_speed_gives_way_to_a_precision_that_was_asked_for():
    assert composed("speed=gpu").trainer.precision == "bf16-mixed"
    assert composed("speed=gpu", "precision=fp32").trainer.precision == "32-true"
    assert composed("precision=fp16", "speed=gpu").trainer.precision == "16-mixed"


def test_speed_of_a_cpu_is_the_same_run_that_of_a_gpu_another():
    choices = {"experiment": "digits_ict"}
    assert config.run_name(choices, ["speed=cpu"]) == "digits_ict"
    assert config.run_name(choices, ["speed=gpu"]) != "digits_ict"
    fast, plain = (OmegaConf.to_container(composed(*settings)) for settings in (["speed=cpu"], []))
    for cfg in (fast, plain):
        cfg["optimizer"].pop("foreach", None)
        assert config.is_neutral("optimizer.foreach")
        for key in ("compile", "channels_last"):
            assert config.is_neutral(key)
            del cfg[key]
    assert fast == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["compile=reduce-overhead", "trainer.accumulate_grad_batches=2"],
            "accumulate_grad_batches is 2; allowed: 1",
        ),
        (
            ["callbacks.nonfinite.wait=false", "callbacks.log=null"],
            "nonfinite.wait is False; allowed: true",
        ),
        (
            ["optimizer=adam", "+optimizer.fused=true", "+optimizer.foreach=true"],
            "optimizer.foreach is True; allowed",
        ),
    ],
)
def test_ways_to_run_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        checks.check("train", composed("experiment=digits_ict", *settings))
