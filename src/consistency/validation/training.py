"""The options of consistency-train."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from consistency.io.run_dir import is_name
from consistency.validation.ranges import check_ranges
from consistency.validation.require import is_number, require, require_integer, require_positive

log = logging.getLogger(__name__)


def validate(cfg: DictConfig) -> None:
    """Check what can be checked without torch, so that a wrong configuration fails in a second.

    Raises:
        ValueError: one line that says what was got, what is allowed and which option to change.
    """
    measures = OmegaConf.to_container(cfg, resolve=False)["callbacks"].get("quality") is not None  # type: ignore
    allowed = "digits, classifier, proxy or full with callbacks=quality"
    require(not measures or cfg.get("evaluation") is not None, "evaluation", None, allowed)
    try:
        settings = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationKeyError as error:
        what = str(error).splitlines()[0]
        raise ValueError(
            f"{error.full_key} needs a part that is not there: {what}; choose parts of one method"
        ) from None
    assert isinstance(settings, dict)
    check_ranges(settings)  # type: ignore[arg-type]
    validate_data(cfg)
    _validate_values(cfg)
    _validate_parts(cfg)
    if "denoiser" in cfg.method:  # else the network is another model's, as a teacher's
        _validate_network(cfg)


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


def _validate_values(cfg: DictConfig) -> None:
    for option in ("run_name", "study_name"):
        name = cfg[option]
        require(is_name(name), option, repr(name), "letters, digits and . , = + - _ (a folder in outputs/)")
    for option in ("overwrite", "estimate", "channels_last", "tf32"):
        require(isinstance(cfg[option], bool), option, cfg[option], "true or false")
    backend = cfg.compile
    is_backend = isinstance(backend, bool | str) and backend != ""
    require(is_backend, "compile", backend, "true, false, reduce-overhead, max-autotune, or a backend of torch.compile")
    alarm = cfg.callbacks.get("nonfinite")
    if alarm is not None and alarm.get("wait") is False:  # rows of the log are where it looks
        require(cfg.callbacks.get("log") is not None, "callbacks.nonfinite.wait", False, "true without callbacks.log")
    is_known = cfg.randomness in ("per_rank", "per_image", "stratified")
    require(is_known, "randomness", cfg.randomness, "per_rank, per_image or stratified")
    is_list = isinstance(cfg.allow_changes, ListConfig) and all(isinstance(key, str) for key in cfg.allow_changes)
    require(is_list, "allow_changes", cfg.allow_changes, "a list of options, as [optimizer.lr,trainer.devices]")
    require_integer(cfg, "seed", 0, 2**32 - 1)
    require_integer(cfg, "trainer.max_steps", 1)
    if cfg.optimizer.get("fused"):
        require(not cfg.optimizer.get("foreach"), "optimizer.foreach", True, "false with optimizer.fused=true")
        half, clip = cfg.trainer.get("precision") in ("16-mixed", "16", 16), cfg.trainer.get("gradient_clip_val")
        allowed = "false or left out with precision=fp16 and with gradient clipping, which it would pass by"
        require(not half and clip is None, "optimizer.fused", True, allowed)
    strategy = str(cfg.trainer.get("strategy"))
    is_sharded = any(name in strategy.lower() for name in ("fsdp", "deepspeed", "modelparallel"))
    require(
        not is_sharded,
        "trainer.strategy",
        strategy,
        "auto or ddp: networks are whole on each device (docs/robustness.md)",
    )
    if (parts := cfg.trainer.accumulate_grad_batches) != "auto":
        is_count = type(parts) is int and parts >= 1
        require(is_count, "trainer.accumulate_grad_batches", parts, "an integer, at least 1, or auto")
        allowed = f"a multiple of trainer.accumulate_grad_batches={parts}"
        require(cfg.data.batch_size % parts == 0, "data.batch_size", cfg.data.batch_size, allowed)
    if cfg.compile in ("reduce-overhead", "max-autotune"):  # gradients of a replay lie where the next one puts its own
        allowed = f"1 with compile={cfg.compile}, or compile=true"
        require(parts == 1, "trainer.accumulate_grad_batches", parts, allowed)
    require_positive(cfg, "optimizer.lr")
    for option in ("model.sigma_min", "model.sigma_max", "data.sigma_data"):
        if OmegaConf.select(cfg, option) is not None:  # parts of one's own may have none
            require_positive(cfg, option)
    low, high = OmegaConf.select(cfg, "model.sigma_min"), OmegaConf.select(cfg, "model.sigma_max")
    in_order = low is None or high is None or low < high
    require(in_order, "model.sigma_min", low, f"between 0 and model.sigma_max={high}")


def validate_data(cfg: DictConfig) -> None:
    """Check the options of `data=`, of every command that reads a data set.

    Raises:
        ValueError: one line, as `validate`.
    """
    for option, low in (("batch_size", 1), ("image_size", 1), ("num_classes", 0), ("num_workers", 0)):
        if option in cfg.data or option != "num_workers":
            require_integer(cfg, f"data.{option}", low)
    channels, limit = cfg.data.channels, cfg.data.dataset.get("limit")
    require(type(channels) is int and channels in (1, 3), "data.channels", channels, "1 (grey) or 3 (colour)")
    is_limit = limit is None or (type(limit) is int and limit >= 1)
    require(is_limit, "data.dataset.limit", limit, "an integer, at least 1, or null for all images")
    for option in ("flip", "on_device"):
        value = cfg.data.get(option, False)
        require(isinstance(value, bool), f"data.{option}", value, "true or false")


def _validate_network(cfg: DictConfig) -> None:
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


def _validate_parts(cfg: DictConfig) -> None:
    """Parts that do not go together."""
    if "guidance" in cfg.method:
        require(is_number(cfg.method.guidance), "method.guidance", cfg.method.guidance, "a number; 1 for none")
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
    require(cfg.teacher is not None or "teacher" not in cfg.method, "teacher", None, "a run or model of method=edm")
    for option in ("teacher", "init_from"):
        source = cfg.get(option)
        if source is not None:
            hint = (
                f"train it (consistency-train experiment={Path(str(source)).name}) or import one (consistency-convert)"
            )
            allowed = f"an existing run, model folder or .ckpt file; {hint}"
            require(Path(str(source)).exists(), option, source, allowed)
