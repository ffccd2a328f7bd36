"""Where the configuration lies, how it is composed, and what is checked before anything heavy is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

_PACKAGE = Path(__file__).parent
# Inside the package when installed from a wheel, at the top of the repository otherwise.
_ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parents[1]
CONF_DIR = _ROOT / "conf"
EXPERIMENTS_DIR = _ROOT / "experiments"

# Settings below these keys leave the result of a run as it is: they neither change its name nor keep it from going on.
_NEUTRAL = (
    "run_name",
    "study_name",
    "overwrite",
    "logger",
    "paths",
    "hydra",
    "data.num_workers",
    "callbacks.progress",
    "callbacks.log",
    "callbacks.sample_grid",
    "callbacks.checkpoint",
)


class ExperimentsSearchPath(SearchPathPlugin):
    """Makes `experiments/` a second root of configuration: `experiment=`, `ablation=`, `sweep=`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder."""
        search_path.append(provider="consistency", path=f"file://{EXPERIMENTS_DIR}")


def register() -> None:
    """Tell Hydra of the search path and the resolver; harmless when repeated."""
    plugins = Plugins.instance()
    if ExperimentsSearchPath not in plugins.discover(SearchPathPlugin):
        plugins.register(ExperimentsSearchPath)
    OmegaConf.register_new_resolver("consistency.run_name", run_name, replace=True)


def run_name(choices: DictConfig, overrides: Sequence[str]) -> str:
    """Stable name of a run: the experiment (or method and data), and a hash of overrides that change the result.

    `digits_ict`, or `digits_ict-5f2a90` with `optimizer.lr=1e-4`; the same command always finds its run again.
    """
    experiment = choices.get("experiment")
    base = Path(experiment).name if experiment else f"{choices.get('method')}_{choices.get('data')}"
    changing = sorted(
        override
        for override in overrides
        if not override.startswith("experiment=") and not is_neutral(override.lstrip("+~").split("=")[0])
    )
    if not changing:
        return base
    return f"{base}-{hashlib.sha256(' '.join(changing).encode()).hexdigest()[:6]}"


def is_neutral(key: str) -> bool:
    """Whether a setting leaves the result of a run as it is."""
    return any(key == neutral or key.startswith((f"{neutral}.", f"{neutral}@")) for neutral in _NEUTRAL)


def validate(cfg: DictConfig) -> None:
    """Check what can be checked without torch, so that a wrong configuration fails in a second.

    Raises:
        ValueError: one line that says what was got, what is allowed and which option to change.
    """
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except InterpolationKeyError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{error.full_key} needs a part that is not there: {reason}; choose parts of one method"
        ) from None
    for option, kind in (
        ("trainer.max_steps", int),
        ("data.batch_size", int),
        ("optimizer.lr", float),
        ("noise.sigma_min", float),
        ("noise.sigma_max", float),
        ("noise.sigma_data", float),
    ):
        value = OmegaConf.select(cfg, option)
        is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        allowed = "an integer, at least 1" if kind is int else "a positive number"
        _require(is_number and value > 0, option, value, allowed)
    _require(
        0 < cfg.noise.sigma_min < cfg.noise.sigma_max,
        "noise.sigma_min",
        cfg.noise.sigma_min,
        f"between 0 and noise.sigma_max={cfg.noise.sigma_max}",
    )
    is_distillation = cfg.method._target_.endswith("ConsistencyDistillation")
    _require(cfg.network is not None or is_distillation, "network", None, "unet_tiny, or method=cd (the teacher's)")
    if cfg.network is not None:
        halvings, size = len(cfg.network.channel_mult) - 1, cfg.data.image_size
        allowed = f"short enough that data.image_size={size} can be halved {halvings} times"
        _require(size % 2**halvings == 0, "network.channel_mult", list(cfg.network.channel_mult), allowed)
        classes = cfg.network.num_classes
        allowed = f"0 (unconditional) or data.num_classes={cfg.data.num_classes}"
        _require(classes in (0, cfg.data.num_classes), "network.num_classes", classes, allowed)
    method = cfg.method._target_.rpartition(".")[2]
    draw = cfg.draw._target_.rpartition(".")[2]
    single = draw == "LogNormal"
    _require(
        single == (method == "EDM"),
        "draw",
        draw,
        "lognormal (one level an image)" if method == "EDM" else "uniform_index, lognormal_index or ratio (pairs)",
    )
    if method == "EDM":
        _require(
            not cfg.weighting._target_.endswith("inverse_gap"),
            "weighting",
            "inverse_gap",
            "uniform, edm, snr, snr_plus_one or truncated_snr with method=edm",
        )
    if cfg.get("metric") is not None and cfg.metric._target_.endswith("LPIPS") and cfg.metric.resize is None:
        _require(cfg.data.image_size >= 16, "metric.resize", None, "224, or images of at least 16 pixels")
    if draw == "RatioPairs":
        gap = cfg.draw.q ** -(cfg.trainer.max_steps // cfg.draw.steps_per_stage + 1.0)
        allowed = "so many that the pairs of the last stage stay apart (q^-(stages) above 1e-6 in float32)"
        _require(gap > 1e-6, "draw.steps_per_stage", cfg.draw.steps_per_stage, allowed)
    if is_distillation:
        _require(cfg.teacher is not None, "teacher", None, "a run, model folder or .ckpt file of method=edm")
    for option in ("teacher", "init_from"):
        source = cfg.get(option)
        if source is not None:
            hint = f"train one first, e.g. consistency-train experiment={Path(source).name}"
            _require(Path(source).exists(), option, source, f"an existing run, model folder or .ckpt file; {hint}")


def _require(condition: bool, option: str, got: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{option} is {got}; allowed: {allowed}")
