"""Where the configuration lies, how it is composed, and what is checked before anything heavy is imported."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from consistency.validation import check_ranges

_PACKAGE = Path(__file__).parent
# Inside the package when installed from a wheel, at the top of the repository otherwise.
_ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parents[1]
CONF_DIR = _ROOT / "conf"
EXPERIMENTS_DIR = _ROOT / "experiments"

log = logging.getLogger(__name__)

# Settings below these keys leave the result of a run as it is: they neither change its name nor keep it from going on.
_NEUTRAL = (
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
    base = given.get("variant", _base_name(choices))
    named = ("seed",) if "variant" in given else ("seed", "experiment")
    changing = sorted(
        override
        for override in overrides
        if (key := override.lstrip("+~").split("=")[0]) not in named and not is_neutral(key)
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


def is_name(name: object) -> bool:
    """Whether this can be the name of a folder of runs."""
    return isinstance(name, str) and re.fullmatch(r"[\w.,=+-]*\w[\w.,=+-]*", name) is not None


def validate_variants(cfg: DictConfig, hydra: Any) -> None:
    """Refuse an ablation that would train one ordinary run.

    Args:
        cfg: Of the run.
        hydra: Hydra's own configuration.

    Raises:
        ValueError: one line, as `validate`.
    """
    for group in ("ablation", "sweep"):
        if group in cfg:
            raise ValueError(f"{group}={hydra.runtime.choices.get(group)} must begin with '# @package _global_'")
    has_variants = bool(hydra.sweeper.get("variants"))
    if has_variants and cfg.variant is None:
        raise ValueError("the ablation has variants; it needs hydra.mode: MULTIRUN in its file, or -m in the command")


def is_neutral(key: str) -> bool:
    """Whether a setting leaves the result of a run as it is."""
    return any(key == neutral or key.startswith((f"{neutral}.", f"{neutral}@")) for neutral in _NEUTRAL)


def validate(cfg: DictConfig) -> None:
    """Check what can be checked without torch, so that a wrong configuration fails in a second.

    Raises:
        ValueError: one line that says what was got, what is allowed and which option to change.
    """
    measures = OmegaConf.to_container(cfg, resolve=False)["callbacks"].get("quality") is not None  # type: ignore
    allowed = "digits, classifier, proxy or full with callbacks=quality"
    _require(not measures or cfg.get("evaluation") is not None, "evaluation", None, allowed)
    try:
        settings = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationKeyError as error:
        what = str(error).splitlines()[0]
        raise ValueError(
            f"{error.full_key} needs a part that is not there: {what}; choose parts of one method"
        ) from None
    assert isinstance(settings, dict)
    check_ranges(settings)  # type: ignore[arg-type]
    _validate_data(cfg)
    _validate_values(cfg)
    _validate_method(cfg)
    if not _is_distillation(cfg):  # its network is the teacher's
        _validate_network(cfg)


def validate_prepare(cfg: DictConfig) -> None:
    """Check the options of consistency-data.

    Raises:
        ValueError: one line, as `validate`.
    """
    _require_integer(cfg, "seed", 0, 2**32 - 1)
    is_png = isinstance(cfg.out, str) and Path(cfg.out).suffix.lower() == ".png"
    _require(cfg.out is None or is_png, "out", cfg.out, "a name that ends in .png, or null for no grid")
    _validate_data(cfg)


def _validate_values(cfg: DictConfig) -> None:
    for option in ("run_name", "study_name"):
        name = cfg[option]
        _require(is_name(name), option, repr(name), "letters, digits and . , = + - _ (a folder in outputs/)")
    for option in ("overwrite", "estimate"):
        _require(isinstance(cfg[option], bool), option, cfg[option], "true or false")
    backend = cfg.compile
    is_backend = isinstance(backend, bool | str) and backend != ""
    _require(is_backend, "compile", backend, "true, false, or the name of a backend of torch.compile")
    _require(cfg.randomness in ("per_rank", "per_image"), "randomness", cfg.randomness, "per_rank or per_image")
    is_list = isinstance(cfg.allow_changes, ListConfig) and all(isinstance(key, str) for key in cfg.allow_changes)
    _require(is_list, "allow_changes", cfg.allow_changes, "a list of options, as [optimizer.lr,trainer.devices]")
    _require_integer(cfg, "seed", 0, 2**32 - 1)
    _require_integer(cfg, "trainer.max_steps", 1)
    if cfg.optimizer.get("fused"):
        half, clip = cfg.trainer.get("precision") in ("16-mixed", "16", 16), cfg.trainer.get("gradient_clip_val")
        allowed = "false or left out with precision=fp16 and with gradient clipping, which it would pass by"
        _require(not half and clip is None, "optimizer.fused", True, allowed)
    strategy = str(cfg.trainer.get("strategy"))
    is_sharded = any(name in strategy.lower() for name in ("fsdp", "deepspeed", "modelparallel"))
    _require(
        not is_sharded,
        "trainer.strategy",
        strategy,
        "auto or ddp: networks are whole on each device (docs/robustness.md)",
    )
    if (parts := cfg.trainer.accumulate_grad_batches) != "auto":
        is_count = type(parts) is int and parts >= 1
        _require(is_count, "trainer.accumulate_grad_batches", parts, "an integer, at least 1, or auto")
        allowed = f"a multiple of trainer.accumulate_grad_batches={parts}"
        _require(cfg.data.batch_size % parts == 0, "data.batch_size", cfg.data.batch_size, allowed)
    noise = ("sigma_min", "sigma_max", "rho", "sigma_data", "noise_scale")
    for option in ("optimizer.lr", *(f"noise.{name}" for name in noise)):
        _require_positive(cfg, option)
    low, high = cfg.noise.sigma_min, cfg.noise.sigma_max
    _require(low < high, "noise.sigma_min", low, f"between 0 and noise.sigma_max={high}")


def _validate_data(cfg: DictConfig) -> None:
    for option, low in (("batch_size", 1), ("image_size", 1), ("num_classes", 0), ("num_workers", 0)):
        _require_integer(cfg, f"data.{option}", low)
    channels, limit = cfg.data.channels, cfg.data.dataset.get("limit")
    _require(type(channels) is int and channels in (1, 3), "data.channels", channels, "1 (grey) or 3 (colour)")
    is_limit = limit is None or (type(limit) is int and limit >= 1)
    _require(is_limit, "data.dataset.limit", limit, "an integer, at least 1, or null for all images")
    for option in ("flip", "on_device"):
        value = cfg.data[option]
        _require(isinstance(value, bool), f"data.{option}", value, "true or false")


def _validate_network(cfg: DictConfig) -> None:
    for option in ("channels", "num_blocks"):
        _require_integer(cfg, f"network.{option}", 1)
    given = {option: value for option, value in cfg.network.items() if value is not None}
    for option in ("head_channels", "num_heads", "norm_groups", "dropout_max_resolution"):
        if option in given:
            _require_integer(cfg, f"network.{option}", 1)
    for option in ("fourier_scale", "noise_channel_mult", "emb_channel_mult", "skip_scale", "norm_eps"):
        if option in given:
            _require_positive(cfg, f"network.{option}")
    for option in ("scale_shift", "input_pyramid", "conv_resample", "adm"):
        value = given.get(option, False)
        _require(isinstance(value, bool), f"network.{option}", value, "true or false")
    _require_integer(cfg, "network.augment_channels", 0)
    dropout, taps = cfg.network.dropout, cfg.network.resample_filter
    _require(_is_number(dropout) and 0 <= dropout < 1, "network.dropout", dropout, "a number from 0 to below 1")
    is_filter = isinstance(taps, ListConfig) and len(taps) % 2 == 0 and all(map(_is_number, taps)) and sum(taps) > 0
    _require(is_filter, "network.resample_filter", taps, "a list of an even number of taps, as [1,1] or [1,3,3,1]")
    _validate_sizes(cfg)


def _validate_sizes(cfg: DictConfig) -> None:
    """Of the feature maps, and where attention is."""
    mult, size, classes = cfg.network.channel_mult, cfg.data.image_size, cfg.network.num_classes
    is_list = isinstance(mult, ListConfig) and len(mult) > 0 and all(isinstance(m, int) and m > 0 for m in mult)
    _require(is_list, "network.channel_mult", mult, "a list of positive integers, one for each size")
    allowed = f"short enough that data.image_size={size} can be halved {len(mult) - 1} times"
    _require(size % 2 ** (len(mult) - 1) == 0, "network.channel_mult", list(mult), allowed)
    allowed = f"0 (unconditional) or data.num_classes={cfg.data.num_classes}"
    _require(classes in (0, cfg.data.num_classes), "network.num_classes", classes, allowed)
    listed, sizes = cfg.network.attention_resolutions, [size >> level for level in range(len(mult))]
    is_list = isinstance(listed, ListConfig) and all(type(entry) is int and entry > 0 for entry in listed)
    _require(is_list, "network.attention_resolutions", listed, f"a list of sizes in pixels, of {sizes}")
    if absent := [entry for entry in listed if entry not in sizes]:
        # No error: a recipe's list goes with its image size, and the network is as good a one at another.
        what = (
            "network.attention_resolutions lists %s, but the network has feature maps of %s pixels; no attention there"
        )
        log.warning(what, absent, sizes)


def _validate_method(cfg: DictConfig) -> None:
    """Parts that do not go together."""
    method, draw = (part._target_.rpartition(".")[2] for part in (cfg.method, cfg.draw))
    is_edm, is_distillation = method == "EDM", _is_distillation(cfg)
    single, pairs = "lognormal (one level an image)", "uniform_index, lognormal_index or ratio (pairs)"
    _require((draw == "LogNormal") == is_edm, "draw", draw, single if is_edm else pairs)
    if is_edm:
        allowed = "uniform, edm, snr, snr_plus_one or truncated_snr with method=edm"
        _require(not cfg.weighting._target_.endswith("inverse_gap"), "weighting", "inverse_gap", allowed)
    # What augment=edm sets is there without a network.
    has_network = cfg.network is not None and "channel_mult" in cfg.network
    _require(has_network or is_distillation, "network", None, "unet_tiny, or method=cd (the teacher's)")
    augmented = cfg.data.get("augment") is not None
    _require(is_edm or not augmented, "augment", "edm", "none, but with method=edm (the network is told of it)")
    if augmented:
        _require(not cfg.data.flip, "data.flip", cfg.data.flip, "false with augment=edm, which mirrors by itself")
        channels = cfg.network.get("augment_channels")
        _require(channels == 9, "network.augment_channels", channels, "9 with augment=edm")
    if draw == "RatioPairs":
        gap = cfg.draw.q ** -(cfg.trainer.max_steps // cfg.draw.steps_per_stage + 1.0)
        allowed = "so many that the pairs of the last stage stay apart (q^-stages above 1e-6)"
        _require(gap > 1e-6, "draw.steps_per_stage", cfg.draw.steps_per_stage, allowed)
    if cfg.get("metric") is not None and cfg.metric._target_.endswith("LPIPS") and cfg.metric.resize is None:
        _require(cfg.data.image_size >= 16, "metric.resize", None, "224, or images of at least 16 pixels")
    _require(cfg.teacher is not None or not is_distillation, "teacher", None, "a run or model of method=edm")
    for option in ("teacher", "init_from"):
        source = cfg.get(option)
        if source is not None:
            hint = (
                f"train it (consistency-train experiment={Path(str(source)).name}) or import one (consistency-convert)"
            )
            allowed = f"an existing run, model folder or .ckpt file; {hint}"
            _require(Path(str(source)).exists(), option, source, allowed)


def validate_sample(cfg: DictConfig) -> None:
    """Check the options of consistency-sample that need no model.

    Raises:
        ValueError: one line, as `validate`.
    """
    _require_integer(cfg, "num_samples", 1)
    _require_integer(cfg, "batch_size", 1)
    _require_integer(cfg, "seed", 0, 2**63 - 1)
    for option in ("ckpt", "out", "device"):
        _require(isinstance(cfg[option], str) and cfg[option] != "", option, repr(cfg[option]), "a name")


def validate_evaluate(cfg: DictConfig) -> None:
    """Check the options of consistency-evaluate.

    Raises:
        ValueError: one line, as `validate`.
    """
    subjects = [option for option in ("ckpt", "samples") if cfg[option] is not None]
    given = " and ".join(subjects) or "neither"
    _require(len(subjects) == 1, "ckpt or samples", given, "one of them: ckpt=RUN_OR_MODEL or samples=FOLDER_OR_NPZ")
    for option in (*subjects, *(["reference"] if cfg.reference is not None else [])):
        _require(Path(str(cfg[option])).exists(), option, cfg[option], "a file or folder that exists")
    seeds = cfg.seeds
    is_list = isinstance(seeds, ListConfig) and len(seeds) > 0 and all(isinstance(s, int) and s >= 0 for s in seeds)
    _require(is_list and len(set(seeds)) == len(seeds), "seeds", seeds, "a list of different integers, e.g. [0,1,2]")
    _require(
        cfg.ckpt is not None or list(seeds) == [0], "seeds", seeds, "left out with samples=, which are drawn already"
    )


def validate_search(cfg: DictConfig) -> None:
    """Check the options of consistency-search.

    Raises:
        ValueError: one line, as `validate`.
    """
    validate_evaluate(cfg)
    _require(cfg.ckpt is not None, "ckpt", None, "a run or model")
    _require_integer(cfg, "num_levels", 3)
    _require_integer(cfg, "parts", 1)
    _require_integer(cfg, "steps", 2, 1 + (cfg.num_levels - 2))
    _require_integer(cfg, "seed", 0)
    _require(isinstance(cfg.scan, bool), "scan", cfg.scan, "true or false")
    _require(not cfg.scan or cfg.steps == 2, "steps", cfg.steps, "2 with scan=true")


def validate_curve(cfg: DictConfig) -> None:
    """Check the options of consistency-curve.

    Raises:
        ValueError: one line, as `validate`.
    """
    validate_evaluate(cfg)
    _require(cfg.ckpt is not None, "ckpt", None, "a run or model")
    for option in ("steps", "heun_steps"):
        value = cfg[option]
        is_list = isinstance(value, ListConfig) and len(value) > 0 and all(isinstance(n, int) and n > 0 for n in value)
        _require(is_list, option, value, "a list of positive integers")
    _require(str(cfg.out).endswith(".png"), "out", cfg.out, "a name that ends in .png")


def validate_convert(cfg: DictConfig) -> None:
    """Check the options of consistency-convert.

    Raises:
        ValueError: one line, as `validate`.
    """
    _require(cfg.format in ("openai", "edm", "diffusers"), "format", cfg.format, "openai, edm or diffusers")
    for option in ("source", "out"):
        _require(isinstance(cfg[option], str) and cfg[option] != "", option, repr(cfg[option]), "a name")
    wanted, exists = ("a folder", Path.is_dir) if cfg.format == "diffusers" else ("a file", Path.is_file)
    _require(exists(Path(cfg.source)), "source", cfg.source, f"{wanted} that exists")
    kinds = {"openai": ("consistency", "edm"), "edm": ("edm",), "diffusers": ("consistency",)}[cfg.format]
    _require(cfg.kind in (None, *kinds), "kind", cfg.kind, f"{' or '.join(kinds)} with format={cfg.format}")
    used = {"openai": ("image_size", "head_channels", "num_heads"), "edm": ("head_channels",), "diffusers": ()}
    for option in ("image_size", "head_channels", "num_heads"):
        if cfg[option] is not None:
            _require(
                option in used[cfg.format], option, cfg[option], f"null with format={cfg.format}, the file says it"
            )
            _require_integer(cfg, option, 1)
    both = cfg.head_channels is not None and cfg.num_heads is not None
    _require(not both, "num_heads", cfg.num_heads, "null where head_channels is given")
    for option in ("noise_scale", "sigma_data", "sigma_min", "sigma_max"):
        value = cfg[option]
        is_positive = _is_number(value) and 0 < value < math.inf
        _require(value is None or is_positive, option, value, "a positive number, or null")


def validate_export(cfg: DictConfig) -> None:
    """Check the options of consistency-export.

    Raises:
        ValueError: one line, as `validate`.
    """
    _require(cfg.format in ("safetensors", "diffusers"), "format", cfg.format, "safetensors or diffusers")
    for option in ("ckpt", "out"):
        _require(isinstance(cfg[option], str) and cfg[option] != "", option, repr(cfg[option]), "a name")
    _require_integer(cfg, "num_levels", 2)


def _is_distillation(cfg: DictConfig) -> bool:
    return cfg.method._target_.endswith(".ConsistencyDistillation")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_positive(cfg: DictConfig, option: str) -> None:
    value = OmegaConf.select(cfg, option)
    _require(_is_number(value) and 0 < value < math.inf, option, value, "a positive number")


def _require_integer(cfg: DictConfig, option: str, low: int, high: int | None = None) -> None:
    value = OmegaConf.select(cfg, option)
    allowed = f"an integer, at least {low}" + (f" and at most {high}" if high is not None else "")
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    _require(is_integer and value >= low and (high is None or value <= high), option, value, allowed)


def _require(condition: bool, option: str, got: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{option} is {got}; allowed: {allowed}")
