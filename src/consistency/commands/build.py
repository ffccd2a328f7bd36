"""The parts of a run, made from its configuration: data, method, callbacks, loggers, Lightning's trainer."""

from __future__ import annotations

import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from consistency.checkpoints.native import load_denoiser
from consistency.commands.slurm import slurm_plugins
from consistency.commands.tracking import describe_wandb_run, typed_overrides
from consistency.data.module import ImageDataModule, warn_about_sigma_data
from consistency.methods.base import Method
from consistency.models.denoiser import Denoiser
from consistency.models.execution import configure_execution, matmul_in_tf32
from consistency.training.memory import AutoAccumulate, fit
from consistency.training.wandb_logger import WandbLogger

log = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and device lists
_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",
    ".*`tensorboardX`.*",
    ".*LeafSpec.*",
    ".*in eval mode at the start of training.*",  # the teacher, on purpose
)


def build_data(cfg: DictConfig) -> ImageDataModule:
    """The data module, checked against what the configuration says of the data."""
    data: ImageDataModule = instantiate(cfg.data, _convert_="object")
    data.setup("fit")
    return data


def make_method(cfg: DictConfig) -> Method:
    """The method of a configuration.

    Raises:
        ValueError: if it is none, or its network has no registered name: it could be trained, and never be loaded.
    """
    try:
        method = instantiate(cfg.method, _convert_="object")
    except InstantiationException as error:
        if isinstance(error.__cause__, TypeError):
            _refuse_unknown_options(cfg.method)
        raise
    if not isinstance(method, Method):  # what was given is a method or none; nothing is decided by which
        raise ValueError(f"method is a {type(method).__name__}; allowed: a subclass of consistency.Method")
    _ = method.denoiser.config
    return method


def _refuse_unknown_options(method: DictConfig) -> None:
    """Name an option of a method's file that its class does not take, as a class that extends another file may not."""
    takes = inspect.signature(get_object(method._target_)).parameters
    unknown = [name for name in map(str, method) if not name.startswith("_") and name not in takes]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        raise ValueError(
            f"{method._target_} does not take the option {unknown[0]}; leave it out with ~method.{unknown[0]}, or take "
            "**options and hand them on"
        )


def prepare_method(method: Method, cfg: DictConfig, data: ImageDataModule, *, is_new: bool) -> None:
    """Check a method against the data, and give it its first weights and the way its networks run.

    Args:
        method: Just made.
        cfg: Of the run.
        data: What it trains on.
        is_new: Whether `init_from` counts; a run that goes on has weights of its own.
    """
    if cfg.init_from and is_new:
        _start_from(method, cfg.init_from)
    if "denoiser" not in cfg.method:
        log.info("the network is that of teacher=%s; network= is not used", cfg.get("teacher"))
    _check_fits(method.denoiser, data)
    if data.augment is not None and not method.takes_augment_labels:
        raise ValueError(
            f"augment is on, but {type(method).__name__} does not tell its network what was done to the images; "
            "allowed: augment=none, or method=edm"
        )
    warn_about_sigma_data(data.measure_sigma_data(), data.sigma_data)
    for denoiser in method.networks():
        configure_execution(denoiser, compile=cfg.compile, channels_last=cfg.channels_last)
    method.progress.batch_size = data.batch_size


def build_method(cfg: DictConfig, data: ImageDataModule) -> Method:
    """A new method for these data: `make_method` and `prepare_method`."""
    method = make_method(cfg)
    prepare_method(method, cfg, data, is_new=True)
    return method


def build_parts(group: DictConfig) -> list[Any]:
    """Instantiate a dictionary of parts; those set to null are switched off."""
    for name, part in group.items():
        if part is not None and "_target_" not in part:
            options = ", ".join(map(str, part))
            raise ValueError(
                f"callbacks.{name!s} has options ({options}) but is not part of this choice; set it to null, or choose "
                "the group that has it (callbacks=quality, say)"
            )
    return [instantiate(part, _convert_="object") for part in group.values() if part is not None]


def build_loggers(cfg: DictConfig, run_dir: Path) -> list[Any]:
    """The loggers; W&B is told what the run is."""
    wandb = cfg.logger.get("wandb")
    if wandb is not None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        describe_wandb_run(wandb, cfg, run_dir)
    return build_parts(cfg.logger)


def build_trainer(cfg: DictConfig, callbacks: list[Any], loggers: list[Any], run_dir: Path | None) -> L.Trainer:
    """Lightning's trainer; it makes no checkpoint or bar of its own where ours is switched off."""
    is_auto = cfg.trainer.accumulate_grad_batches == "auto"
    callbacks = [*callbacks, AutoAccumulate()] if is_auto else callbacks
    trainer = instantiate(
        cfg.trainer,
        _convert_="object",
        accumulate_grad_batches=1 if is_auto else cfg.trainer.accumulate_grad_batches,
        max_steps=-1,  # StopAtStep stops, by steps that happened
        callbacks=callbacks,
        logger=loggers or False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        default_root_dir=run_dir,
        **({"plugins": plugins} if (plugins := slurm_plugins()) and "plugins" not in cfg.trainer else {}),
    )
    if str(cfg.trainer.get("precision")).startswith("16") and trainer.strategy.root_device.type == "cpu":
        raise ValueError("precision is fp16 on a CPU; allowed there: fp32 or bf16 (Lightning would take bf16 unasked)")
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    for logger in loggers:
        more = {"overrides": typed_overrides()} if isinstance(logger, WandbLogger) else {}
        logger.log_hyperparams({**settings, **more})
    return trainer


def fit_quietly(
    trainer: L.Trainer, method: Any, data: ImageDataModule, checkpoint: Path | None, *, tf32: bool = False
) -> None:
    """Train, without warnings that are expected; with `tf32`, matrices are multiplied in TF32 meanwhile."""
    with warnings.catch_warnings(), matmul_in_tf32(tf32):
        for expected in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=expected)
        fit(trainer, method, data, checkpoint)


def _check_fits(denoiser: Denoiser, data: ImageDataModule) -> None:
    """Refuse a network (of a teacher, say) that was made for other images: convolutions would run all the same."""
    if denoiser.image_shape != data.image_shape:
        raise ValueError(
            f"the network is for images {list(denoiser.image_shape)}, the data set has {list(data.image_shape)}; "
            "change data.image_size and data.channels, or teacher"
        )
    if denoiser.num_classes not in (0, data.num_classes):
        raise ValueError(
            f"the network has {denoiser.num_classes} classes, the data set {data.num_classes}; "
            "change network.num_classes (0 for unconditional), or teacher"
        )
    own = getattr(denoiser.parametrization, "sigma_data", data.sigma_data)
    if own != data.sigma_data:
        raise ValueError(
            f"the model has sigma_data {own:g}, data.sigma_data is {data.sigma_data:g}; "
            f"set data.sigma_data={own:g}, or change teacher"
        )


def _start_from(method: Method, source: str) -> None:
    """Give the online (and target) network the weights of another model of the same architecture."""
    start = load_denoiser(source)
    # What a model means depends on settings without weights too: noise_scale, sigma_data, skip_scale, ...
    training_only = (
        *("kind", "label_dropout", "parametrization.boundary"),
        *("network.dropout", "network.dropout_max_resolution"),
    )
    different = method.denoiser.differences(start.config, ignore=training_only)
    if different:
        raise ValueError(f"init_from={source} is another model ({different}); use its settings")
    method.denoiser.network.load_state_dict(start.network.state_dict())
    if method.target is not None:
        method.target.load_state_dict(method.denoiser.state_dict())
