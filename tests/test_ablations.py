"""Every file of experiments/ablation composes, and its variants change what they say, and nothing else."""

import itertools

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from consistency import config
from consistency.sweeps.grid import key

config.register()

ABLATIONS = sorted(path.stem for path in (config.EXPERIMENTS_DIR / "ablation").glob("*.yaml"))
OF_DISTILLATION = [name for name in ABLATIONS if name.startswith("cd_")]


def composed(*overrides, hydra=False):
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        where = ["paths.output_dir=unused", "run_name=test", "study_name=test"]
        return compose("train", overrides=[*overrides, *where], return_hydra_config=hydra)


def runs_of(name):
    """Name -> overrides of the runs of an ablation with seed 0."""
    sweeper = composed(f"ablation={name}", hydra=True).hydra.sweeper
    axes = [f"{axis}={values}" for axis, values in sweeper.params.items() if axis != "seed"]
    swept = [
        [f"{axis.get_key_element()}={value}" for value in axis.sweep_string_iterator()]
        for axis in OverridesParser.create().parse_overrides(axes)
    ]
    grid = [list(point) for point in itertools.product(*swept)]
    variants = sweeper.variants or {"": []}
    return {" ".join([variant, *point]).strip(): [*point, *own] for point in grid for variant, own in variants.items()}


def settings(recipe, overrides):
    """Flat settings of a run that decide its result."""

    def flat(tree, prefix=""):
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for name, value in tree.items() for k, v in flat(value, f"{prefix}.{name}".lstrip(".")).items()}

    cfg = composed(f"experiment={recipe}", *overrides)
    return {k: str(v) for k, v in flat(OmegaConf.to_container(cfg, resolve=True)).items() if not config.is_neutral(k)}


@pytest.mark.parametrize("name", ABLATIONS)
def test_runs_compose_and_differ(name):
    recipe = "smoke_cd" if name in OF_DISTILLATION else "digits_ict"
    found = {run: tuple(sorted(settings(recipe, overrides).items())) for run, overrides in runs_of(name).items()}
    assert len(found) > 1
    assert len(set(found.values())) == len(found), "two runs of the ablation are the same"


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_file_starts_a_multirun_with_three_seeds(name):
    hydra = composed(f"ablation={name}", hydra=True).hydra
    assert hydra.mode.name == "MULTIRUN"
    assert hydra.sweeper.params.seed == "0,1,2"


def test_ladder_changes_one_thing_a_rung():
    """Groups that differ between neighbours; the curriculum changes twice: its target first, its shape later."""
    rungs = list(runs_of("ladder").values())
    assert rungs[-1] == []
    changes = []
    for below, above in itertools.pairwise(rungs):
        a, b = settings("cifar10_ict", below), settings("cifar10_ict", above)
        differing = {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
        # Group and what depends on it: the method repeats its parts, levels repeat N(k).
        changes.append(
            {k.removeprefix("method.").removeprefix("levels.num_levels").split(".")[0] for k in differing} - {""}
        )
    assert changes == [{"weighting"}, {"curriculum", "target_decay"}, {"metric"}, {"curriculum"}, {"levels"}]


def test_ladder_begins_with_consistency_training():
    """The first rung is CT of 2023 with l2; what Table 1 does not list is the recipe's."""
    ours = settings("digits_ict", runs_of("ladder")["ct"])
    theirs = settings("digits_ct", ["curriculum.end=150"])
    different = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
    assert different <= {"data.batch_size"}, different


def test_curriculum_shapes_end_at_the_same_number_of_levels():
    from hydra.utils import instantiate

    for overrides in runs_of("curriculum").values():
        cfg = composed("experiment=digits_ict", *overrides)
        levels = instantiate(cfg.curriculum.num_levels)
        assert levels(cfg.trainer.max_steps - 1) == pytest.approx(161, abs=1)
        assert cfg.curriculum.target_decay is None


def test_constant_curriculum_is_constant():
    from hydra.utils import instantiate

    levels = instantiate(
        composed("~experiment", "trainer.max_steps=400_000", "curriculum=constant").curriculum.num_levels
    )
    assert {levels(step) for step in (0, 1, 1000, 399_999)} == {1281}


def test_key_of_an_override():
    assert key("++callbacks.x.y=[1,2]") == "callbacks.x.y"
