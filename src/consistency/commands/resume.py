"""Where a run goes on: the newest checkpoint that is whole and complete, under settings that do not change it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consistency.checkpoints.native import read_checkpoint
from consistency.commands.folder import RefusedError
from consistency.data.module import ImageDataModule
from consistency.io.atomic import atomic_write, verify_manifest
from consistency.io.run_dir import CHECKPOINT, PREVIOUS_CHECKPOINT
from consistency.io.safe_load import table_of
from consistency.training.csv_logger import CsvLogger

log = logging.getLogger(__name__)


def find_checkpoint(run_dir: Path, *, is_first_rank: bool) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to continue from and its contents; (None, {}) for a run that has none.

    A damaged `last.ckpt` is kept as `damaged.ckpt`, and the one before it takes its place.

    Raises:
        ValueError: if there are checkpoints, and none can be read.
    """
    last, previous = run_dir / CHECKPOINT, run_dir / PREVIOUS_CHECKPOINT
    if not last.exists() and not previous.exists():
        return None, {}
    try:
        if not last.exists():
            raise ValueError(f"{last} is not there")
        return last, read_checkpoint(last)
    except ValueError as error:
        damage = error
    try:
        if not previous.exists():
            raise ValueError("missing")
        checkpoint = read_checkpoint(previous)
    except ValueError as error:
        there = f"; nor can the one before it: {error}" if previous.exists() else ", and there is none before it"
        raise ValueError(
            f"{damage}{there}. Bring a whole one back, or overwrite=true to set the run aside and start afresh"
        ) from error
    step = checkpoint.get("state_dict", {}).get("progress._extra_state", {}).get("step")
    log.warning("%s; going on from the one before it, at step %s", damage, step)
    if is_first_rank:
        if last.exists():
            os.replace(last, last.with_name("damaged.ckpt"))
            log.warning("the damaged file is kept as %s", last.with_name("damaged.ckpt"))
        with atomic_write(last) as fresh:
            shutil.copyfile(previous, fresh)
    return previous, checkpoint


def settings_of(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration that a checkpoint was written under; a `config.yaml` beside it may be of another command.

    Raises:
        ValueError: if the checkpoint does not say.
    """
    try:
        settings = table_of(metadata["config"], path)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say under which settings it was written: {error}") from None
    return settings


def check_complete(checkpoint: dict[str, Any], path: Path, method: Any, trainer: Any) -> None:
    """Refuse a checkpoint that lacks a part of this run.

    Raises:
        ValueError: with the part's name.
    """
    needed = dict.fromkeys([*(name for name, _ in method.named_children()), "optimizer_states[0]", "loops"], 1)
    needed |= {"lr_schedulers[0]": 1} if method.lr_schedule is not None else {}
    needed |= {"MixedPrecision": 1} if getattr(trainer.precision_plugin, "scaler", None) is not None else {}
    without_state = {name for name, part in method.named_children() if not part.state_dict()}
    verify_manifest(checkpoint, path, {name: count for name, count in needed.items() if name not in without_state})


def drop_rows_after(checkpoint: dict[str, Any], trainer: Any) -> None:
    """Take steps past the checkpoint out of metrics.csv; called by the first rank."""
    for logger in trainer.loggers:
        if isinstance(logger, CsvLogger):
            logger.drop_rows_after(checkpoint["state_dict"]["progress._extra_state"]["step"])


def check_same_data(before: dict[str, Any] | None, data: ImageDataModule, run_dir: Path) -> None:
    """Refuse to continue on other images: their order is a function of how many there are."""
    if before is None:
        return
    now = data.identity()
    digests = {before["sha256"], now["sha256"]} - {None}  # of cached sets; a run may go on without the cache
    is_other = len(digests) > 1
    if is_other or before["images"] != now["images"]:
        counts = f"{before['images']:,} images then, {now['images']:,} now"
        raise RefusedError(
            f"{run_dir} was trained on other data ({counts}{', of other content' if is_other else ''}); bring "
            "them back, or run_name=NAME for another run, or overwrite=true to set it aside and start afresh"
        )


def check_same_ranks(before: dict[str, Any], trainer: Any, *, per_image: bool, allowed: Sequence[str]) -> None:
    """Refuse another number of processes, whose random numbers are others, unless it is allowed."""
    then, now = before.get("world_size"), trainer.world_size
    if then in (None, now) or per_image or "trainer.devices" in allowed:
        return
    raise RefusedError(
        f"the run was trained by {then} processes, there are {now} now: schedules and averages would go on as they "
        "are, the random numbers of the rest would be others. allow_changes=[trainer.devices] accepts that; a run "
        "started with randomness=per_image does not mind"
    )
