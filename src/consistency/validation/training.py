"""The options of consistency-train."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from consistency.files import is_name
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
    _validate_method(cfg)
    if not _is_distillation(cfg):  # its network is the teacher's
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
    require(cfg.randomness in ("per_rank", "per_image"), "randomness", cfg.randomness, "per_rank or per_image")
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
    noise = ("sigma_min", "sigma_max", "rho", "sigma_data", "noise_scale")
    for option in ("optimizer.lr", *(f"noise.{name}" for name in noise)):
        require_positive(cfg, option)
    low, high = cfg.noise.sigma_min, cfg.noise.sigma_max
    require(low < high, "noise.sigma_min", low, f"between 0 and noise.sigma_max={high}")


def validate_data(cfg: DictConfig) -> None:
    """Check the options of `data=`, of every command that reads a data set.

    Raises:
        ValueError: one line, as `validate`.
    """
    for option, low in (("batch_size", 1), ("image_size", 1), ("num_classes", 0), ("num_workers", 0)):
        require_integer(cfg, f"data.{option}", low)
    channels, limit = cfg.data.channels, cfg.data.dataset.get("limit")
    require(type(channels) is int and channels in (1, 3), "data.channels", channels, "1 (grey) or 3 (colour)")
    is_limit = limit is None or (type(limit) is int and limit >= 1)
    require(is_limit, "data.dataset.limit", limit, "an integer, at least 1, or null for all images")
    for option in ("flip", "on_device"):
        value = cfg.data[option]
        require(isinstance(value, bool), f"data.{option}", value, "true or false")


def _validate_network(cfg: DictConfig) -> None:
    for option in ("channels", "num_blocks"):
        require_integer(cfg, f"network.{option}", 1)
    given = {option: value for option, value in cfg.network.items() if value is not None}
    for option in ("head_channels", "num_heads", "norm_groups", "dropout_max_resolution"):
        if option in given:
            require_integer(cfg, f"network.{option}", 1)
    for option in ("fourier_scale", "noise_channel_mult", "emb_channel_mult", "skip_scale", "norm_eps"):
        if option in given:
            require_positive(cfg, f"network.{option}")
    for option in ("scale_shift", "input_pyramid", "conv_resample", "adm"):
        value = given.get(option, False)
        require(isinstance(value, bool), f"network.{option}", value, "true or false")
    require_integer(cfg, "network.augment_channels", 0)
    dropout, taps = cfg.network.dropout, cfg.network.resample_filter
    require(is_number(dropout) and 0 <= dropout < 1, "network.dropout", dropout, "a number from 0 to below 1")
    hidden = cfg.network.get("label_dropout", 0.0)
    is_probability = is_number(hidden) and 0 <= hidden < 1 and (hidden == 0 or cfg.network.num_classes > 0)
    allowed = "a number from 0 to below 1, and 0 with network.num_classes=0"
    require(is_probability, "network.label_dropout", hidden, allowed)
    is_filter = isinstance(taps, ListConfig) and len(taps) % 2 == 0 and all(map(is_number, taps)) and sum(taps) > 0
    require(is_filter, "network.resample_filter", taps, "a list of an even number of taps, as [1,1] or [1,3,3,1]")
    _validate_sizes(cfg)


def _validate_sizes(cfg: DictConfig) -> None:
    """Of the feature maps, and where attention is."""
    mult, size, classes = cfg.network.channel_mult, cfg.data.image_size, cfg.network.num_classes
    is_list = isinstance(mult, ListConfig) and len(mult) > 0 and all(isinstance(m, int) and m > 0 for m in mult)
    require(is_list, "network.channel_mult", mult, "a list of positive integers, one for each size")
    allowed = f"short enough that data.image_size={size} can be halved {len(mult) - 1} times"
    require(size % 2 ** (len(mult) - 1) == 0, "network.channel_mult", list(mult), allowed)
    allowed = f"0 (unconditional) or data.num_classes={cfg.data.num_classes}"
    require(classes in (0, cfg.data.num_classes), "network.num_classes", classes, allowed)
    listed, sizes = cfg.network.attention_resolutions, [size >> level for level in range(len(mult))]
    is_list = isinstance(listed, ListConfig) and all(type(entry) is int and entry > 0 for entry in listed)
    require(is_list, "network.attention_resolutions", listed, f"a list of sizes in pixels, of {sizes}")
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
    is_single = draw in ("LogNormal", "UniformTime", "FixedLevel")
    single = "lognormal, uniform_time or fixed (one level an image)"
    pairs = "uniform_index, lognormal_index or ratio (pairs)"
    require(is_single == is_edm, "draw", draw, single if is_edm else pairs)
    if draw == "FixedLevel":
        require_positive(cfg, "draw.sigma")
    if is_edm:
        allowed = "uniform, edm, snr, snr_plus_one, truncated_snr or velocity with method=edm or flow"
        require(not cfg.weighting._target_.endswith("inverse_gap"), "weighting", "inverse_gap", allowed)
    if is_distillation:
        require(is_number(cfg.method.guidance), "method.guidance", cfg.method.guidance, "a number; 1 for none")
    # What augment=edm sets is there without a network.
    has_network = cfg.network is not None and "channel_mult" in cfg.network
    require(has_network or is_distillation, "network", None, "unet_tiny, or method=cd (the teacher's)")
    augmented = cfg.data.get("augment") is not None
    require(is_edm or not augmented, "augment", "edm", "none, but with method=edm (the network is told of it)")
    if augmented:
        require(not cfg.data.flip, "data.flip", cfg.data.flip, "false with augment=edm, which mirrors by itself")
        channels = cfg.network.get("augment_channels")
        require(channels == 9, "network.augment_channels", channels, "9 with augment=edm")
    if draw == "RatioPairs":
        gap = cfg.draw.q ** -(cfg.trainer.max_steps // cfg.draw.steps_per_stage + 1.0)
        allowed = "so many that the pairs of the last stage stay apart (q^-stages above 1e-6)"
        require(gap > 1e-6, "draw.steps_per_stage", cfg.draw.steps_per_stage, allowed)
    if cfg.get("metric") is not None and cfg.metric._target_.endswith("LPIPS") and cfg.metric.resize is None:
        require(cfg.data.image_size >= 16, "metric.resize", None, "224, or images of at least 16 pixels")
    require(cfg.teacher is not None or not is_distillation, "teacher", None, "a run or model of method=edm")
    for option in ("teacher", "init_from"):
        source = cfg.get(option)
        if source is not None:
            hint = (
                f"train it (consistency-train experiment={Path(str(source)).name}) or import one (consistency-convert)"
            )
            allowed = f"an existing run, model folder or .ckpt file; {hint}"
            require(Path(str(source)).exists(), option, source, allowed)


def _is_distillation(cfg: DictConfig) -> bool:
    return cfg.method._target_.endswith(".ConsistencyDistillation")
