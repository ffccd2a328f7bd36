"""The options of the commands beside consistency-train."""

from __future__ import annotations

import math
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from consistency.validation.require import is_number, require, require_integer
from consistency.validation.training import validate_data

_MAX_IN_GRID, _MAX_IN_TRAJECTORY = 4096, 64


def validate_sample(cfg: DictConfig) -> None:
    """Check the options of consistency-sample that need no model.

    Raises:
        ValueError: one line, as `validate`.
    """
    require_integer(cfg, "num_samples", 1)
    require_integer(cfg, "batch_size", 1)
    require_integer(cfg, "seed", 0, 2**63 - 1)
    for option in ("ckpt", "out", "device"):
        require(isinstance(cfg[option], str) and cfg[option] != "", option, repr(cfg[option]), "a name")
    _require_guidance(cfg)
    labels, kinds = cfg.labels, "a label, a list of labels, balanced, or null for random by seed"
    require(not isinstance(labels, str) or labels == "balanced", "labels", labels, kinds)
    count, is_count = cfg.devices, isinstance(cfg.devices, int) and not isinstance(cfg.devices, bool)
    require(count == "auto" or (is_count and count >= 1), "devices", count, "auto, or an integer, at least 1")
    require(isinstance(cfg.trajectory, bool), "trajectory", cfg.trajectory, "true or false")
    _require_execution(cfg)
    _check_out_of_samples(cfg)


def _check_out_of_samples(cfg: DictConfig) -> None:
    ending = ending_of(cfg.out)
    allowed = "an ending .png (a grid), .npz, or none (a folder of PNGs)"
    require(ending in (".png", ".npz", ".gif", ""), "out", cfg.out, allowed)
    if cfg.trajectory:
        require(ending in (".png", ".gif"), "out", cfg.out, "a name that ends in .png or .gif with trajectory=true")
        require(cfg.num_samples <= _MAX_IN_TRAJECTORY, "num_samples", cfg.num_samples,
                f"at most {_MAX_IN_TRAJECTORY} with trajectory=true")  # fmt: skip
    require(ending != ".gif" or cfg.trajectory, "out", cfg.out, f"{allowed}; a .gif with trajectory=true")
    if ending in (".png", ".gif"):
        folder = f"at most {_MAX_IN_GRID:,} in one picture; for more let out end in .npz, or name a folder"
        require(cfg.num_samples <= _MAX_IN_GRID, "num_samples", cfg.num_samples, folder)
        require(cfg.devices in (1, "auto"), "devices", cfg.devices, "1 or auto for one picture")


def ending_of(out: str) -> str:
    """Of what consistency-sample writes, in small letters; empty for a folder."""
    return "" if out.endswith("/") else Path(out).suffix.lower()


def validate_prepare(cfg: DictConfig) -> None:
    """Check the options of consistency-data.

    Raises:
        ValueError: one line, as `validate`.
    """
    require_integer(cfg, "seed", 0, 2**32 - 1)
    is_png = isinstance(cfg.out, str) and Path(cfg.out).suffix.lower() == ".png"
    require(cfg.out is None or is_png, "out", cfg.out, "a name that ends in .png, or null for no grid")
    validate_data(cfg)


def validate_edit(cfg: DictConfig) -> None:
    """Check the options of consistency-edit that need no model.

    Raises:
        ValueError: one line, as `validate`.
    """
    for option in ("num_images", "batch_size"):
        require_integer(cfg, option, 1)
    require_integer(cfg, "seed", 0, 2**63 - 1)
    for option in ("ckpt", "out", "device"):
        require(isinstance(cfg[option], str) and cfg[option] != "", option, repr(cfg[option]), "a name")
    require(cfg.images is None or Path(str(cfg.images)).exists(), "images", cfg.images, "a file or folder that exists")
    _require_guidance(cfg)
    require(isinstance(cfg.gif, bool), "gif", cfg.gif, "true or false")
    if cfg.steps is not None:
        require_integer(cfg, "steps", 1)
    levels = cfg.sigmas
    is_list = isinstance(levels, ListConfig) and len(levels) > 0 and all(is_number(level) for level in levels)
    require(levels is None or is_list, "sigmas", levels, "a list of decreasing noise levels, as [80,0.821], or null")
    if missing := OmegaConf.missing_keys(cfg.task):
        require(False, f"task.{min(missing)}", "not given", "see consistency-edit task=... --cfg job -p task")


def validate_evaluate(cfg: DictConfig) -> None:
    """Check the options of consistency-evaluate.

    Raises:
        ValueError: one line, as `validate`.
    """
    subjects = [option for option in ("ckpt", "samples") if cfg[option] is not None]
    given = " and ".join(subjects) or "neither"
    require(len(subjects) == 1, "ckpt or samples", given, "one of them: ckpt=RUN_OR_MODEL or samples=FOLDER_OR_NPZ")
    for option in (*subjects, *(["reference"] if cfg.reference is not None else [])):
        require(Path(str(cfg[option])).exists(), option, cfg[option], "a file or folder that exists")
    _require_guidance(cfg)
    _require_execution(cfg)
    seeds = cfg.seeds
    is_list = isinstance(seeds, ListConfig) and len(seeds) > 0 and all(isinstance(s, int) and s >= 0 for s in seeds)
    require(is_list and len(set(seeds)) == len(seeds), "seeds", seeds, "a list of different integers, e.g. [0,1,2]")
    require(
        cfg.ckpt is not None or list(seeds) == [0], "seeds", seeds, "left out with samples=, which are drawn already"
    )
    for option, plain in (("compile", False), ("channels_last", False), ("dtype", "fp32")):
        allowed = "left out with samples=, which are drawn already"
        require(cfg.ckpt is not None or cfg[option] == plain, option, cfg[option], allowed)


def validate_app(cfg: DictConfig) -> None:
    """Check the options of consistency-app.

    Raises:
        ValueError: one line, as `validate`.
    """
    for option in ("ckpt", "host", "device"):
        require(isinstance(cfg[option], str) and cfg[option] != "", option, repr(cfg[option]), "a name")
    if cfg.port is not None:
        require_integer(cfg, "port", 1, 65535)
    require_integer(cfg, "max_upload_mb", 1, 1024)


def validate_search(cfg: DictConfig) -> None:
    """Check the options of consistency-search.

    Raises:
        ValueError: one line, as `validate`.
    """
    validate_evaluate(cfg)
    require(cfg.ckpt is not None, "ckpt", None, "a run or model")
    require_integer(cfg, "num_levels", 3)
    require_integer(cfg, "parts", 1)
    require_integer(cfg, "steps", 2, 1 + (cfg.num_levels - 2))
    require_integer(cfg, "seed", 0)
    require(isinstance(cfg.scan, bool), "scan", cfg.scan, "true or false")
    require(not cfg.scan or cfg.steps == 2, "steps", cfg.steps, "2 with scan=true")


def validate_curve(cfg: DictConfig) -> None:
    """Check the options of consistency-curve.

    Raises:
        ValueError: one line, as `validate`.
    """
    validate_evaluate(cfg)
    require(cfg.ckpt is not None, "ckpt", None, "a run or model")
    for option in ("steps", "heun_steps"):
        value = cfg[option]
        is_list = isinstance(value, ListConfig) and len(value) > 0 and all(isinstance(n, int) and n > 0 for n in value)
        require(is_list, option, value, "a list of positive integers")
    require(str(cfg.out).endswith(".png"), "out", cfg.out, "a name that ends in .png")


def validate_convert(cfg: DictConfig) -> None:
    """Check the options of consistency-convert.

    Raises:
        ValueError: one line, as `validate`.
    """
    require(cfg.format in ("openai", "edm", "diffusers"), "format", cfg.format, "openai, edm or diffusers")
    for option in ("source", "out"):
        require(isinstance(cfg[option], str) and cfg[option] != "", option, repr(cfg[option]), "a name")
    wanted, exists = ("a folder", Path.is_dir) if cfg.format == "diffusers" else ("a file", Path.is_file)
    require(exists(Path(cfg.source)), "source", cfg.source, f"{wanted} that exists")
    kinds = {"openai": ("consistency", "edm"), "edm": ("edm",), "diffusers": ("consistency",)}[cfg.format]
    require(cfg.kind in (None, *kinds), "kind", cfg.kind, f"{' or '.join(kinds)} with format={cfg.format}")
    used = {"openai": ("image_size", "head_channels", "num_heads"), "edm": ("head_channels",), "diffusers": ()}
    for option in ("image_size", "head_channels", "num_heads"):
        if cfg[option] is not None:
            require(option in used[cfg.format], option, cfg[option], f"null with format={cfg.format}, the file says it")
            require_integer(cfg, option, 1)
    both = cfg.head_channels is not None and cfg.num_heads is not None
    require(not both, "num_heads", cfg.num_heads, "null where head_channels is given")
    for option in ("noise_scale", "sigma_data", "sigma_min", "sigma_max"):
        value = cfg[option]
        is_positive = is_number(value) and 0 < value < math.inf
        require(value is None or is_positive, option, value, "a positive number, or null")


def validate_export(cfg: DictConfig) -> None:
    """Check the options of consistency-export.

    Raises:
        ValueError: one line, as `validate`.
    """
    require(cfg.format in ("safetensors", "diffusers"), "format", cfg.format, "safetensors or diffusers")
    for option in ("ckpt", "out"):
        require(isinstance(cfg[option], str) and cfg[option] != "", option, repr(cfg[option]), "a name")
    require_integer(cfg, "num_levels", 2)


def _require_execution(cfg: DictConfig) -> None:
    """How the network is run; backends are looked up when torch is there."""
    names = "true, false, a mode such as reduce-overhead, or the name of a backend of torch.compile"
    require(isinstance(cfg.compile, bool) or (isinstance(cfg.compile, str) and cfg.compile != ""), "compile",
            cfg.compile, names)  # fmt: skip
    require(isinstance(cfg.channels_last, bool), "channels_last", cfg.channels_last, "true or false")
    require(cfg.dtype in ("fp32", "bf16", "fp16"), "dtype", cfg.dtype, "fp32, bf16 or fp16")


def _require_guidance(cfg: DictConfig) -> None:
    guidance = cfg.guidance
    require(is_number(guidance) and math.isfinite(guidance), "guidance", guidance, "a number; 1 for none")
