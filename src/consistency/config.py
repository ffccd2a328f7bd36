"""Where the configuration lies, how it is composed, and what a run is called."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

_PACKAGE = Path(__file__).parent
# Inside the package when installed from a wheel, at the top of the repository otherwise.
_ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parents[1]
CONF_DIR = _ROOT / "conf"
EXPERIMENTS_DIR = _ROOT / "experiments"


# Settings below these keys leave the result of a run as it is: they neither change its name nor keep it from going on.
_NEUTRAL = (
    "imports",
    "run_name",
    "study_name",
    "variant",
    "ablation",
    "sweep",
    "objective",
    "overwrite",
    "allow_changes",
    "estimate",
    "compile",
    "channels_last",
    "tf32",
    "optimizer.foreach",
    "method.optimizer.foreach",
    "logger",
    "paths",
    "hydra",
    "data.num_workers",
    "data.on_device",
    "data.dataset.cache_dir",
    "data.dataset.root",
    "callbacks.progress",
    "callbacks.log",
    "callbacks.sample_grid",
    "callbacks.checkpoint",
    "callbacks.prune",
    "callbacks.nonfinite",
    "callbacks.collapse",
)


class ExperimentsSearchPath(SearchPathPlugin):
    """Makes `experiments/` a second root of configuration: `experiment=`, `ablation=`, `sweep=`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder."""
        search_path.append(provider="consistency", path=f"file://{EXPERIMENTS_DIR}")


def register() -> None:
    """Tell Hydra of the search path and the resolvers; harmless when repeated."""
    plugins = Plugins.instance()
    if ExperimentsSearchPath not in plugins.discover(SearchPathPlugin):
        plugins.register(ExperimentsSearchPath)

    def of_run(*, _root_: DictConfig) -> str:
        hydra = _hydra(_root_)
        return run_name(hydra.runtime.choices, hydra.overrides.task) if hydra is not None else "run"

    def of_study(*, _root_: DictConfig) -> str:
        hydra = _hydra(_root_)
        return study_name(hydra.runtime.choices) if hydra is not None else "study"

    OmegaConf.register_new_resolver("consistency.run_name", of_run, replace=True)
    OmegaConf.register_new_resolver("consistency.study_name", of_study, replace=True)
    OmegaConf.register_new_resolver("consistency.steps", steps_for, replace=True)
    OmegaConf.register_new_resolver("consistency.if", lambda on, yes, no: yes if on is True else no, replace=True)


def steps_for(images: int, batch_size: int) -> int:
    """Optimizer steps in which a run sees that many images, rounded up.

    In configuration: `trainer.max_steps: ${consistency.steps:25600,${data.batch_size}}`. Runs of different batches are
    compared fairly after as many images, not after as many steps.

    Raises:
        ValueError: if one of them is not a positive integer.
    """
    for name, value in (("images", images), ("batch size", batch_size)):
        if type(value) is not int or value < 1:
            raise ValueError(f"${{consistency.steps:IMAGES,BATCH}} takes two positive integers, the {name} is {value}")
    return -(-images // batch_size)


def _hydra(root: DictConfig) -> Any:
    """Hydra's own configuration: part of the tree until a job starts, a global afterwards, nothing in a notebook."""
    if "hydra" in root:
        return root.hydra
    return HydraConfig.get() if HydraConfig.initialized() else None


def run_name(choices: DictConfig, overrides: Sequence[str]) -> str:
    """Stable name of a run: the experiment (or method and data), a hash of overrides that change the result, the seed.

    `digits_ict`, or `digits_ict-5f2a90-seed1` with `optimizer.lr=1e-4 seed=1`; in an ablation the variant's name takes
    the place of the experiment's. The same command always finds its run again.
    """
    given = dict(override.lstrip("+~").partition("=")[::2] for override in overrides)
    is_own = "experiment" not in given and not {"method", "data"}.isdisjoint(given)  # not the recipe of the default
    base = given.get("variant", f"{choices.get('method')}_{choices.get('data')}" if is_own else _base_name(choices))
    named = ("seed",) if "variant" in given else ("seed", "experiment")
    changing = sorted(
        override
        for override in overrides
        if (key := override.lstrip("+~").split("=")[0]) not in named
        and not is_neutral(key)
        and override != "speed=cpu"  # made of such settings alone; gpu is not, it changes the precision
    )
    digest = f"-{hashlib.sha256(' '.join(changing).encode()).hexdigest()[:6]}" if changing else ""
    return f"{base}{digest}{'-seed' + given['seed'] if 'seed' in given else ''}"


def study_name(choices: DictConfig) -> str:
    """Stable name of a multirun's folder: `ladder_digits_ict` of an ablation or sweep, else `study`."""
    study = choices.get("ablation") or choices.get("sweep")
    return f"{Path(study).name}_{_base_name(choices)}" if study else "study"


def _base_name(choices: DictConfig) -> str:
    experiment = choices.get("experiment")
    return Path(experiment).name if experiment else f"{choices.get('method')}_{choices.get('data')}"


def is_neutral(key: str) -> bool:
    """Whether a setting leaves the result of a run as it is."""
    return any(key == neutral or key.startswith((f"{neutral}.", f"{neutral}@")) for neutral in _NEUTRAL)
