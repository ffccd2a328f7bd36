"""The run directory: what a run leaves there, and what that says to the next start of the same command."""

from __future__ import annotations

import copy
import json
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from consistency.config import is_neutral
from consistency.io.atomic import write_text
from consistency.io.nested import flatten
from consistency.io.run_dir import MODEL_FOLDER
from consistency.io.safe_load import read_json
from consistency.models.legacy import upgrade_settings

log = logging.getLogger(__name__)

# What a run leaves in its directory, beside Hydra's own .hydra/ and log.
_RUN_FILES = (
    "config.yaml",
    "status.json",
    "metrics.csv",
    "quality.jsonl",
    "checkpoints",
    MODEL_FOLDER,
    "samples",
    "tensorboard",
    "wandb",
    "wandb_id.txt",
)


# How the work is divided; runs.resume looks at the number of processes.
_OF_MACHINE = ("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator")


class RefusedError(ValueError):
    """This start is wrong, and says nothing of the run that lies in the directory."""


def status_of(run_dir: Path) -> dict[str, Any]:
    """What the run last said of itself: state, step, images seen, seconds; empty for a new directory."""
    file = run_dir / "status.json"
    try:
        status = read_json(file) if file.exists() else {}
    except ValueError:
        log.warning("%s cannot be read; taken as if it were not there", file)
        return {}
    return status if isinstance(status, dict) else {}


def objective_of(status: dict[str, Any], name: str | None) -> float | None:
    """The objective of a run that is over: the score of that name, or the one that it was trained with.

    Raises:
        RefusedError: if the run did not measure it.
    """
    if name is None:
        return status.get("objective")
    scores = status.get("scores", {})
    if name not in scores:
        raise RefusedError(f"objective={name} was not measured by this run, which has {', '.join(scores) or 'none'}")
    return scores[name]


def write_status(run_dir: Path, **status: Any) -> None:
    """Write `status.json` in one rename; what is None is left out."""
    status = {key: value for key, value in status.items() if value is not None}
    write_text(run_dir / "status.json", json.dumps(status, indent=2) + "\n")


def archive_run(run_dir: Path) -> None:
    """Move the files of an earlier run into previous/1, 2, ...: nothing of the user's is deleted."""
    files = [run_dir / name for name in _RUN_FILES if (run_dir / name).exists()]
    files += run_dir.glob("nonfinite_rank*.json")
    if not files:
        return
    numbers = [int(folder.name) for folder in (run_dir / "previous").glob("*") if folder.name.isdigit()]
    aside = run_dir / "previous" / str(max(numbers, default=0) + 1)
    aside.mkdir(parents=True)
    for file in files:
        file.rename(aside / file.name)
    log.info("set the earlier run aside: %s", aside)


def check_same_settings(cfg: DictConfig, before: dict[str, Any], run_dir: Path) -> None:
    """Refuse to continue a run under settings that would change it, unless `allow_changes` lists them.

    Args:
        cfg: Of now.
        before: Resolved, as the checkpoint or `config.yaml` has it; nothing of it is resolved again.
        run_dir: For the message.

    Raises:
        RefusedError: with the settings that differ.
    """
    old, now = upgrade_settings({"randomness": "per_rank", **before}), OmegaConf.to_container(cfg, resolve=True)
    as_before = copy.deepcopy(cfg)
    for option in cfg.allow_changes:
        if not _has(old, option) and not _has(now, option):
            raise RefusedError(f"allow_changes lists {option}, which is no setting of {run_dir}, then or now")
        OmegaConf.update(as_before, option, _at(old, option), merge=False, force_add=True)
    refused = _differences(old, as_before)
    if refused:
        raise RefusedError(
            f"{run_dir} was started with other settings ({refused}); use them, or run_name=NAME for another run, or "
            "overwrite=true to set it aside and start afresh, or allow_changes=[OPTION,...] to go on with the new ones"
        )
    if allowed := _differences(old, cfg):
        log.warning("%s goes on with other settings: %s", run_dir, allowed)


def _differences(old: dict[str, Any], cfg: DictConfig) -> str:
    """Settings that differ and change the result, as text; those that only repeat another one are left out."""
    was, now = flatten(old), flatten(OmegaConf.to_container(cfg, resolve=True))
    # Data may have moved; whether they are the same is checked by what they hold. So is the number of processes.
    ignored = ["data.dataset.path", "paths.data_dir", "paths.cache_dir", *_OF_MACHINE]
    if is_rank_invariant(cfg):
        ignored.append("trainer.accumulate_grad_batches")
    keys = [key for key in was.keys() | now.keys() if key not in ignored and not is_neutral(key)]
    changed = sorted(key for key in keys if was.get(key) != now.get(key))
    written = flatten(OmegaConf.to_container(cfg, resolve=False))
    own = [key for key in changed if key in written and not str(written[key]).startswith("${")]
    return ", ".join(f"{key}: {was.get(key)} -> {now.get(key)}" for key in (own or changed)[:5])


def is_rank_invariant(cfg: DictConfig) -> bool:
    """Whether all random numbers of training do: dropout masks belong to ranks and micro-batches."""
    dropout = [OmegaConf.select(cfg, f"{part}.dropout") or 0 for part in ("network", "method")]
    return cfg.randomness == "per_image" and not any(dropout)


def _has(tree: Any, option: str) -> bool:
    parent, _, name = option.rpartition(".")
    parent = _at(tree, parent) if parent else tree
    return isinstance(parent, dict) and name in parent


def _at(tree: Any, option: str) -> Any:
    for name in option.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def log_outputs(run_dir: Path, imports: Sequence[str] = ()) -> None:
    """Log where the results are, and the command that samples from them, with the modules that it needs."""
    run_dir = Path(os.path.relpath(run_dir)) if run_dir.is_relative_to(Path.cwd()) else run_dir
    newest = {grid.name.rsplit("_", 1)[0]: grid for grid in sorted((run_dir / "samples").glob("*.png"))}
    log.info("run directory   %s", run_dir)
    for grid in newest.values():
        log.info("sample grid     %s", grid)
    log.info("exported model  %s", run_dir / MODEL_FOLDER)
    needed = [f"ckpt={run_dir}", *([f"imports=[{','.join(imports)}]"] if imports else [])]
    log.info("sample from it  consistency-sample %s num_samples=100 seed=0 out=samples.png", shlex.join(needed))
