"""The file for W&B's agents stays a command that works: expanded as the agent does it, then composed and checked."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from composing import composed
from consistency import config
from consistency.commands import checks

SWEEP = yaml.safe_load((config.EXPERIMENTS_DIR / "wandb_sweep.yaml").read_text())
PARAMETERS = SWEEP["parameters"]


def values(parameter):
    """All of a list, or both ends of a range."""
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


def command(drawn):
    """The command line of a trial, made by W&B's own functions."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    macros = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in drawn.items()}})
    macros |= {"program": [SWEEP["program"]], "env": ["/usr/bin/env"]}
    line = []
    for part in utils.create_sweep_command(list(SWEEP["command"])):
        line += macros[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part]
    return line


def trials():
    """As many as it takes for every value to come once."""
    lists = {name: values(parameter) for name, parameter in PARAMETERS.items()}
    for i in range(max(map(len, lists.values()))):
        yield {name: listed[min(i, len(listed) - 1)] for name, listed in lists.items()}


@pytest.mark.slow  # for what wandb takes to be imported
@pytest.mark.parametrize("drawn", trials())
def test_every_value_makes_a_command_that_composes(drawn, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    monkeypatch.setenv("WANDB_SWEEP_ID", "xyz789")
    env, program, *overrides = command(drawn)
    assert (env, program) == ("/usr/bin/env", "consistency-train")
    cfg = composed("train", *overrides, "paths.output_dir=unused")
    checks.check("train", cfg)
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert (settings["run_name"], settings["logger"]["wandb"]["group"]) == ("trial-abc123", "sweep-xyz789")
    assert settings["trainer"]["max_steps"] * settings["data"]["batch_size"] >= 25600
    for name, value in drawn.items():
        assert OmegaConf.select(cfg, name) == value


def test_the_program_is_a_command_of_ours():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'{SWEEP["program"]} = "consistency.cli:train"' in project


def test_the_metric_is_one_that_the_recipe_logs():
    cfg = composed("train", "experiment=digits_ict", "paths.output_dir=unused")
    score, _, sampler = SWEEP["metric"]["name"].rpartition("_")
    assert sampler in cfg.callbacks.quality.samplers
    assert score == "fd_classifier"
    assert cfg.callbacks.quality.every_n_images > 0
