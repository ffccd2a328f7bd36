"""Every file of experiments/ablation composes, and its variants change what they say, and nothing else."""

import itertools

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import composing
from consistency import config
from consistency.sweeps.grid import key

ABLATIONS = sorted(path.stem for path in (config.EXPERIMENTS_DIR / "ablation").glob("*.yaml"))
OF_DISTILLATION = [name for name in ABLATIONS if name.startswith("cd_")]
FAST = ("cd_solver", "weighting")  # values, and choices of a group; the ladder has tests of its own
WHERE = ("paths.output_dir=unused", "run_name=test", "study_name=test")


def hydra_of(name):
    return composing.composed("train", f"ablation={name}", *WHERE, hydra=True).hydra


def runs_of(name):
    """Name -> overrides of the runs of an ablation with seed 0."""
    sweeper = hydra_of(name).sweeper
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

    cfg = composing.composed("train", f"experiment={recipe}", *overrides, *WHERE)
    return {k: str(v) for k, v in flat(OmegaConf.to_container(cfg, resolve=True)).items() if not config.is_neutral(k)}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ABLATIONS]
)
def test_a_file_is_a_multirun_with_three_seeds_whose_runs_differ(name):
    hydra = hydra_of(name)
    assert hydra.mode.name == "MULTIRUN"
    assert hydra.sweeper.params.seed == "0,1,2"
    recipe = "smoke_cd" if name in OF_DISTILLATION else "digits_ict"
    found = {run: tuple(sorted(settings(recipe, overrides).items())) for run, overrides in runs_of(name).items()}
    assert len(found) > 1
    assert len(set(found.values())) == len(found), "two runs of the ablation are the same"


def test_ladder_changes_one_thing_a_rung():
    """Groups that differ between neighbours; the curriculum changes twice: its target first, its shape later."""
    rungs = [settings("cifar10_ict", overrides) for overrides in runs_of("ladder").values()]
    assert rungs[-1] == settings("cifar10_ict", [])
    changes = []
    for a, b in itertools.pairwise(rungs):
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


def test_key_of_an_override():
    assert key("++callbacks.x.y=[1,2]") == "callbacks.x.y"
