"""The run directory: what a run leaves there, and what that says to the next start of the same command."""

from __future__ import annotations

import json
import logging
import os
import shlex
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from consistency.config import is_neutral
from consistency.files import CHECKPOINT, MODEL_FOLDER

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


class RefusedError(ValueError):
    """This start is wrong, and says nothing of the run that lies in the directory."""


def status_of(run_dir: Path) -> dict[str, Any]:
    """What the run last said of itself: state, step, images seen, seconds; empty for a new directory."""
    file = run_dir / "status.json"
    try:
        status = json.loads(file.read_text()) if file.exists() else {}
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
    partial = run_dir / f"status.json.{os.getpid()}.partial"
    with partial.open("w") as file:
        file.write(json.dumps(status, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, run_dir / "status.json")


def set_aside(run_dir: Path) -> None:
    """Move the files of an earlier run into previous/1, 2, ...: nothing of the user's is deleted."""
    files = [run_dir / name for name in _RUN_FILES if (run_dir / name).exists()]
    if not files:
        return
    numbers = [int(folder.name) for folder in (run_dir / "previous").glob("*") if folder.name.isdigit()]
    aside = run_dir / "previous" / str(max(numbers, default=0) + 1)
    aside.mkdir(parents=True)
    for file in files:
        file.rename(aside / file.name)
    log.info("set the earlier run aside: %s", aside)


def check_same_settings(cfg: DictConfig, run_dir: Path) -> None:
    """Refuse to continue a run under settings that would change it."""
    file = run_dir / "config.yaml"
    if not file.exists() or not (run_dir / CHECKPOINT).exists():
        return  # nothing was trained under the old settings
    old = _flat(OmegaConf.to_container(OmegaConf.load(file), resolve=True))
    new = _flat(OmegaConf.to_container(cfg, resolve=True))
    # Data may have moved; whether they are the same is checked by what they hold.
    ignored = {"data.dataset.path", "paths.data_dir", "paths.cache_dir"}
    keys = [key for key in old.keys() | new.keys() if key not in ignored and not is_neutral(key)]
    changed = sorted(key for key in keys if old.get(key) != new.get(key))
    if changed:
        listed = ", ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed[:5])
        raise RefusedError(
            f"{run_dir} was started with other settings ({listed}); use them, or run_name=NAME for another run, or "
            "overwrite=true to set it aside and start afresh"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def say_where(run_dir: Path) -> None:
    """Log where the results are, and the command that samples from them."""
    method = json.loads((run_dir / MODEL_FOLDER / "config.json").read_text())["info"]["method"]
    run_dir = Path(os.path.relpath(run_dir)) if run_dir.is_relative_to(Path.cwd()) else run_dir
    newest = {grid.name.rsplit("_", 1)[0]: grid for grid in sorted((run_dir / "samples").glob("*.png"))}
    log.info("run directory   %s", run_dir)
    for grid in newest.values():
        log.info("sample grid     %s", grid)
    log.info("exported model  %s", run_dir / MODEL_FOLDER)
    ckpt = shlex.quote(f"ckpt={run_dir}")
    sampler = " sampler=heun" if method == "EDM" else ""
    log.info("sample from it  consistency-sample %s num_samples=100 seed=0%s out=samples.png", ckpt, sampler)
