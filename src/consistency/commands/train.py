"""`consistency-train`: configuration in, run directory out."""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from consistency.checkpoints.native import save_denoiser
from consistency.commands.build import (
    build_data,
    build_loggers,
    build_parts,
    build_trainer,
    fit_quietly,
    make_method,
    prepare_method,
)
from consistency.commands.folder import check_same_settings, is_rank_invariant, log_outputs, status_of, write_status
from consistency.commands.objective import check_objective, results
from consistency.commands.resume import (
    check_complete,
    check_same_data,
    check_same_ranks,
    drop_rows_after,
    find_checkpoint,
    settings_of,
)
from consistency.commands.slurm import requeue
from consistency.commands.tracking import finish_wandb
from consistency.io.atomic import write_text
from consistency.io.run_dir import MODEL_FOLDER
from consistency.methods.base import Method
from consistency.training.averaging import WeightEMA
from consistency.training.checkpointing import RunCheckpoint
from consistency.training.pruning import PruneTrial
from consistency.training.quality import QualityCallback
from consistency.training.required import RankConsistencyCheck, StepSeeds, StopAtStep

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float | None:
    """Train a model into its run directory, from its checkpoint where there is one; called by `runs.start`.

    Returns:
        The objective, for sweeps: a score of `callbacks=quality`, or the last logged loss.
    """
    run_dir = Path(cfg.paths.output_dir)
    is_first_rank = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    # A damaged file is an error before anything is built.
    checkpoint, contents = find_checkpoint(run_dir, is_first_rank=is_first_rank)
    before = contents.get("consistency", {})
    if checkpoint is not None:
        check_same_settings(cfg, settings_of(before, checkpoint), run_dir)

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    method = make_method(cfg)  # a wrong part is said before a data set is decoded
    data = build_data(cfg)
    check_same_data(before.get("data"), data, run_dir)
    prepare_method(method, cfg, data, is_new=checkpoint is None)
    per_image, stratified = cfg.randomness == "per_image", cfg.randomness == "stratified"
    always = [
        StepSeeds(cfg.seed, per_image=per_image, stratified=stratified),
        StopAtStep(cfg.trainer.max_steps),
        RankConsistencyCheck(),
    ]
    callbacks = [*always, *build_parts(cfg.callbacks)]
    for callback in callbacks:
        if isinstance(callback, QualityCallback):
            callback.prepare(data)  # what is missing is said before training starts
    check_objective(cfg.objective, callbacks)
    trainer = build_trainer(cfg, callbacks, build_loggers(cfg, run_dir), run_dir)

    if checkpoint is not None:
        check_complete(contents, checkpoint, method, trainer)
        check_same_ranks(before, trainer, per_image=is_rank_invariant(cfg), allowed=cfg.allow_changes)
        if is_first_rank:
            drop_rows_after(contents, trainer)
        del contents  # Lightning reads it again, and one copy of the weights is enough
    if is_first_rank:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        write_status(run_dir, **{**status_of(run_dir), "state": "running", "error": None, "traceback": None})
        count = sum(p.numel() for p in method.denoiser.parameters())
        what = f"{type(method).__name__}, {count:,} parameters, {cfg.trainer.max_steps} steps of {data.batch_size}"
        log.info("%s: %s%s", run_dir, what, f"; continuing from {checkpoint}" if checkpoint else "")
    saver = next((callback for callback in callbacks if isinstance(callback, RunCheckpoint)), None)
    if saver is not None:
        saver.metadata = {
            "config": OmegaConf.to_yaml(cfg, resolve=True),
            "method": type(method).__name__,
            "data": data.identity(),
        }

    started = time.perf_counter()
    try:
        fit_quietly(trainer, method, data, checkpoint, tf32=cfg.tf32)
    except SIGTERMException:  # Lightning's, before RunCheckpoint listens: in its eyes a success
        if is_first_rank:
            write_status(run_dir, **{**status_of(run_dir), "state": "interrupted"})
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        finish_wandb(trainer)

    seconds = saver.seconds if saver else time.perf_counter() - started
    return _end(cfg, method, callbacks, run_dir, seconds)


def _end(cfg: DictConfig, method: Method, callbacks: list[Any], run_dir: Path, seconds: float) -> float | None:
    """Write down how far the run came, and export the model of one that is finished.

    Raises:
        SystemExit: if it was stopped before its end.
    """
    is_first_rank = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    facts = {
        "step": method.progress.step,
        "images_seen": method.progress.images_seen,
        "seconds": round(seconds, 1),
        **results(cfg.objective, callbacks),
    }
    of_search = next((callback for callback in callbacks if isinstance(callback, PruneTrial)), None)
    if of_search is not None and of_search.pruned:
        if is_first_rank:
            write_status(run_dir, state="pruned", **facts)
            log.info("pruned after %s images: other trials of the search are better", f"{facts['images_seen']:,}")
        return facts["objective"]
    # What stopped it was a signal, or a limit of the trainer such as max_time.
    number = next((callback.interrupted_by for callback in callbacks if isinstance(callback, RunCheckpoint)), None)
    if number or not method.progress.is_over:
        if is_first_rank:
            write_status(run_dir, state="interrupted", **facts)
            log.info("stopped at step %d; the same command continues from the last checkpoint.", facts["step"])
            if number == signal.SIGUSR1:
                requeue()
        raise SystemExit(128 + number if number else 1)
    if is_first_rank:
        _export(method, callbacks, run_dir, cfg)
        write_status(run_dir, state="finished", **facts)
        log.info("trained %s images in %.0f s", f"{facts['images_seen']:,}", facts["seconds"])
        log_outputs(run_dir, cfg.get("imports", ()))
    return facts["objective"]


def _export(method: Method, callbacks: list[Any], run_dir: Path, cfg: DictConfig) -> None:
    """Write the model folder with the first average (raw weights where there is none)."""
    info: dict[str, Any] = {
        "method": type(method).__name__,
        "weights": "raw",
        "data": str(cfg.data.dataset.get("_target_", type(cfg.data.dataset).__name__)),
        "seed": cfg.seed,
        "step": method.progress.step,
        "images_seen": method.progress.images_seen,
    }
    weights = None
    for callback in callbacks:
        if isinstance(callback, WeightEMA):
            info["weights"] = callback.names[0]
            weights = callback.averages[callback.names[0]]
            break
    save_denoiser(method.denoiser, run_dir / MODEL_FOLDER, info, weights)
