"""The options of a command, checked before anything heavy is imported: one line says what was got and what is allowed.

The constructors check what they are given. Here and in rules.py stand the options that no constructor of ours sees
(Lightning's, torch's, the commands' own), and those that must go together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from consistency.commands.rules import EXISTS, RULES, integer

log = logging.getLogger(__name__)

_MAX_IN_GRID, _MAX_IN_TRAJECTORY = 4096, 64
_ABSENT: Any = object()


def check(command: str, cfg: DictConfig) -> None:
    """Check the options of a command.

    Args:
        command: Its name without `consistency-`.
        cfg: As it was composed.

    Raises:
        ValueError: one line that says what was got, what is allowed and which option to change.
    """
    if command == "train":
        _check_complete(cfg)
    for option, rule in RULES[command].items():
        value = OmegaConf.select(cfg, option, default=_ABSENT, throw_on_missing=True)
        if value is not _ABSENT:
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            require(rule.holds(value), option, value, rule.allowed)
    if command in _TOGETHER:
        _TOGETHER[command](cfg)


def require(condition: bool, option: str, got: Any, allowed: str) -> None:
    """Refuse an option in one line.

    Raises:
        ValueError: unless `condition` holds.
    """
    if not condition:
        raise ValueError(f"{option} is {got if got != '' else repr(got)}; allowed: {allowed}")


def ending_of(out: str) -> str:
    """Of what consistency-sample writes, in small letters; empty for a folder."""
    return "" if out.endswith("/") else Path(out).suffix.lower()


def _check_sample(cfg: DictConfig) -> None:
    ending, allowed = ending_of(cfg.out), "an ending .png (a grid), .npz, or none (a folder of PNGs)"
    require(ending in (".png", ".npz", ".gif", ""), "out", cfg.out, allowed)
    if cfg.trajectory:
        require(ending in (".png", ".gif"), "out", cfg.out, "a name that ends in .png or .gif with trajectory=true")
        few = f"at most {_MAX_IN_TRAJECTORY} with trajectory=true"
        require(cfg.num_samples <= _MAX_IN_TRAJECTORY, "num_samples", cfg.num_samples, few)
    require(ending != ".gif" or cfg.trajectory, "out", cfg.out, f"{allowed}; a .gif with trajectory=true")
    if ending in (".png", ".gif"):
        folder = f"at most {_MAX_IN_GRID:,} in one picture; for more let out end in .npz, or name a folder"
        require(cfg.num_samples <= _MAX_IN_GRID, "num_samples", cfg.num_samples, folder)
        require(cfg.devices in (1, "auto"), "devices", cfg.devices, "1 or auto for one picture")


def _check_edit(cfg: DictConfig) -> None:
    if missing := OmegaConf.missing_keys(cfg.task):
        require(False, f"task.{min(missing)}", "not given", "see consistency-edit task=... --cfg job -p task")


def _check_evaluate(cfg: DictConfig) -> None:
    subjects = [option for option in ("ckpt", "samples") if cfg[option] is not None]
    given = " and ".join(subjects) or "neither"
    require(len(subjects) == 1, "ckpt or samples", given, "one of them: ckpt=RUN_OR_MODEL or samples=FOLDER_OR_NPZ")
    require(EXISTS.holds(cfg[subjects[0]]), subjects[0], cfg[subjects[0]], EXISTS.allowed)
    seeds = list(cfg.seeds)
    require(len(set(seeds)) == len(seeds), "seeds", seeds, RULES["evaluate"]["seeds"].allowed)
    if cfg.ckpt is None:
        for option, plain in (("seeds", [0]), ("compile", False), ("channels_last", False), ("dtype", "fp32")):
            allowed = "left out with samples=, which are drawn already"
            require(cfg[option] == plain, option, cfg[option], allowed)


def _check_search(cfg: DictConfig) -> None:
    _check_evaluate(cfg)
    require(cfg.ckpt is not None, "ckpt", None, "a run or model")
    steps = integer(2, 1 + (cfg.num_levels - 2))
    require(steps.holds(cfg.steps), "steps", cfg.steps, steps.allowed)
    require(not cfg.scan or cfg.steps == 2, "steps", cfg.steps, "2 with scan=true")


def _check_curve(cfg: DictConfig) -> None:
    _check_evaluate(cfg)
    require(cfg.ckpt is not None, "ckpt", None, "a run or model")
    require(str(cfg.out).endswith(".png"), "out", cfg.out, "a name that ends in .png")


def _check_convert(cfg: DictConfig) -> None:
    wanted, exists = ("a folder", Path.is_dir) if cfg.format == "diffusers" else ("a file", Path.is_file)
    require(exists(Path(cfg.source)), "source", cfg.source, f"{wanted} that exists")
    kinds = {"openai": ("consistency", "edm"), "edm": ("edm",), "diffusers": ("consistency",)}[cfg.format]
    require(cfg.kind in (None, *kinds), "kind", cfg.kind, f"{' or '.join(kinds)} with format={cfg.format}")
    used = {"openai": ("image_size", "head_channels", "num_heads"), "edm": ("head_channels",), "diffusers": ()}
    for option in ("image_size", "head_channels", "num_heads"):
        is_used = cfg[option] is None or option in used[cfg.format]
        require(is_used, option, cfg[option], f"null with format={cfg.format}, the file says it")
    both = cfg.head_channels is not None and cfg.num_heads is not None
    require(not both, "num_heads", cfg.num_heads, "null where head_channels is given")


def check_variants(cfg: DictConfig, hydra: Any) -> None:
    """Refuse an ablation that would train one ordinary run.

    Args:
        cfg: Of the run.
        hydra: Hydra's own configuration.

    Raises:
        ValueError: one line, as `check`.
    """
    for group in ("ablation", "sweep"):
        if group in cfg:
            raise ValueError(f"{group}={hydra.runtime.choices.get(group)} must begin with '# @package _global_'")
    has_variants = bool(hydra.sweeper.get("variants"))
    if has_variants and cfg.variant is None:
        raise ValueError("the ablation has variants; it needs hydra.mode: MULTIRUN in its file, or -m in the command")


def check_teachers_settings(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse settings of a denoiser where the teacher's is taken: they would do nothing.

    Args:
        cfg: Of the run.
        overrides: As a person typed them.

    Raises:
        ValueError: one line, as `check`.
    """
    for override in overrides:
        option = override.lstrip("+~").partition("=")[0]
        is_teachers = option.partition(".")[0] == "parametrization" or option == "model.label_dropout"
        if is_teachers and "denoiser" not in cfg.method:
            raise ValueError(f"{option} was given, but with this method it is the teacher's; leave it out")


def _check_complete(cfg: DictConfig) -> None:
    """Everything that the configuration refers to is there."""
    measures = OmegaConf.to_container(cfg, resolve=False)["callbacks"].get("quality") is not None  # type: ignore
    allowed = "digits, classifier, proxy or full with callbacks=quality"
    require(not measures or cfg.get("evaluation") is not None, "evaluation", None, allowed)
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except InterpolationKeyError as error:
        what = str(error).splitlines()[0]
        raise ValueError(
            f"{error.full_key} needs a part that is not there: {what}; choose parts of one method"
        ) from None


def _check_train(cfg: DictConfig) -> None:
    alarm = cfg.callbacks.get("nonfinite")
    if alarm is not None and alarm.get("wait") is False:  # rows of the log are where it looks
        require(cfg.callbacks.get("log") is not None, "callbacks.nonfinite.wait", False, "true without callbacks.log")
    _check_optimizer(cfg)
    strategy = str(cfg.trainer.get("strategy"))
    is_sharded = any(name in strategy.lower() for name in ("fsdp", "deepspeed", "modelparallel"))
    replicated = "auto or ddp: networks are whole on each device (docs/robustness.md)"
    require(not is_sharded, "trainer.strategy", strategy, replicated)
    if (parts := cfg.trainer.accumulate_grad_batches) != "auto":
        allowed = f"a multiple of trainer.accumulate_grad_batches={parts}"
        require(cfg.data.batch_size % parts == 0, "data.batch_size", cfg.data.batch_size, allowed)
    if cfg.compile in ("reduce-overhead", "max-autotune"):  # gradients of a replay lie where the next one puts its own
        allowed = f"1 with compile={cfg.compile}, or compile=true"
        require(parts == 1, "trainer.accumulate_grad_batches", parts, allowed)
    low, high = OmegaConf.select(cfg, "model.sigma_min"), OmegaConf.select(cfg, "model.sigma_max")
    in_order = low is None or high is None or low < high
    require(in_order, "model.sigma_min", low, f"between 0 and model.sigma_max={high}")
    _check_parts(cfg)
    _check_sources(cfg)
    if "denoiser" in cfg.method:  # else the network is another model's, as a teacher's
        _check_network(cfg)


def _check_optimizer(cfg: DictConfig) -> None:
    if not cfg.optimizer.get("fused"):
        return
    require(not cfg.optimizer.get("foreach"), "optimizer.foreach", True, "false with optimizer.fused=true")
    half, clip = cfg.trainer.get("precision") in ("16-mixed", "16", 16), cfg.trainer.get("gradient_clip_val")
    allowed = "false or left out with precision=fp16 and with gradient clipping, which it would pass by"
    require(not half and clip is None, "optimizer.fused", True, allowed)


def _check_parts(cfg: DictConfig) -> None:
    """Parts that do not go together."""
    if cfg.data.get("augment") is not None:
        require(not cfg.data.get("flip"), "data.flip", True, "false with augment=edm, which mirrors by itself")
        channels = (cfg.network or {}).get("augment_channels")
        require(channels == 9, "network.augment_channels", channels, "9 with augment=edm")
    if {"steps_per_stage", "q"} <= set(cfg.get("levels") or {}):
        gap = cfg.levels.q ** -(cfg.trainer.max_steps // cfg.levels.steps_per_stage + 1.0)
        allowed = "so many that the pairs of the last stage stay apart (q^-stages above 1e-6)"
        require(gap > 1e-6, "levels.steps_per_stage", cfg.levels.steps_per_stage, allowed)
    if "resize" in (cfg.get("metric") or {}) and cfg.metric.resize is None:
        require(cfg.data.image_size >= 16, "metric.resize", None, "224, or images of at least 16 pixels")


def _check_sources(cfg: DictConfig) -> None:
    """Models that a run starts from."""
    require(cfg.teacher is not None or "teacher" not in cfg.method, "teacher", None, "a run or model of method=edm")
    for option in ("teacher", "init_from"):
        if (source := cfg.get(option)) is not None:
            name = Path(str(source)).name
            hint = f"train it (consistency-train experiment={name}) or import one (consistency-convert)"
            allowed = f"an existing run, model folder or .ckpt file; {hint}"
            require(EXISTS.holds(source), option, source, allowed)


def _check_network(cfg: DictConfig) -> None:
    """The network, by making it without memory: its constructor knows best what is allowed."""
    require(cfg.network is not None and "_target_" in cfg.network, "network", None, "unet_tiny, or another network=")
    classes, number = cfg.network.get("num_classes", 0), cfg.data.num_classes
    require(classes in (0, number), "network.num_classes", classes, f"0 (unconditional) or data.num_classes={number}")
    import torch
    from hydra.errors import InstantiationException
    from hydra.utils import get_object, instantiate

    try:
        get_object(cfg.network._target_)  # imported outside, or the module's own tensors would be without memory too
    except (ImportError, ValueError) as error:
        raise ValueError(f"network._target_ is {cfg.network._target_}: {str(error).splitlines()[0]}") from error
    try:
        with torch.device("meta"):
            network = instantiate(cfg.network, _convert_="object")
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        if not isinstance(error.__cause__, NotImplementedError | RuntimeError):
            raise
        return  # some networks cannot be made without memory; the run will tell
    given: dict[str, Any] = getattr(network, "config", {})
    if {"image_size", "channel_mult", "attention_resolutions"} <= given.keys():
        sizes = [given["image_size"] >> level for level in range(len(given["channel_mult"]))]
        if absent := [size for size in given["attention_resolutions"] if size not in sizes]:
            # No error: a recipe's list goes with its image size, and the network is as good a one at another.
            what = "network.attention_resolutions lists %s, but the network has feature maps of %s pixels; no attention"
            log.warning(f"{what} there", absent, sizes)


_TOGETHER: dict[str, Callable[[DictConfig], None]] = {
    "train": _check_train,
    "sample": _check_sample,
    "edit": _check_edit,
    "evaluate": _check_evaluate,
    "search": _check_search,
    "curve": _check_curve,
    "convert": _check_convert,
}
