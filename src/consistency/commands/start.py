"""One run from its start to its end: nothing twice, nothing at the same time, and how it ended is written down."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from consistency.commands.checks import check
from consistency.commands.folder import (
    RefusedError,
    archive_run,
    check_same_settings,
    log_outputs,
    objective_of,
    status_of,
    write_status,
)
from consistency.io.run_dir import locked
from consistency.io.safe_load import read_yaml

log = logging.getLogger(__name__)

# Given to a run by the launcher of a multirun: the run ends when its standard input does, that is with the launcher.
WATCH_STDIN = "CONSISTENCY_WATCH_STDIN"
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
_OTHERS_STARTED = ("TORCHELASTIC_RUN_ID",)  # ranks that start together, and see the directory together
REFUSED = 3  # exit code: nothing was done to the run
_SECONDS_FOR_THE_LAST = 20.0  # a run that was told to stop may still be writing its checkpoint


def start(cfg: DictConfig, job: Callable[[], float | None]) -> float | None:
    """Do `job` in the run directory, unless it is done already; write its failure into `status.json` and the log.

    Returns:
        The objective of the run, for sweeps.

    Raises:
        RefusedError: if another process is at this run, or the run that lies there is of other settings.
    """
    run_dir = Path(cfg.paths.output_dir)
    if not is_first_rank():  # the first rank is in the middle of `job` and looks after the directory
        return _of_finished(cfg, run_dir) if _is_done(cfg, run_dir) else job()
    if _needs_own_processes(cfg):
        return _in_own_process(cfg)
    patience = None if _end_with_launcher() else _SECONDS_FOR_THE_LAST
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run_dir / "run", patience=patience))
        except TimeoutError as error:
            raise RefusedError(f"{error}: this run is under way; wait for it, or run_name=NAME for another") from None
        if cfg.overwrite:
            if any(name in os.environ for name in _OTHERS_STARTED):
                raise RefusedError(
                    "overwrite=true is for one command, not for ranks that a scheduler starts; run_name=NAME"
                )
            check("train", cfg)  # a wrong option must not set a good run aside
            archive_run(run_dir)
        if _is_done(cfg, run_dir):
            if (file := run_dir / "config.yaml").exists():
                check_same_settings(cfg, read_yaml(file), run_dir)
            return _of_finished(cfg, run_dir)
        try:
            return job()
        except Exception as error:
            with suppress(OSError):  # the folder may be what is gone
                _record(run_dir, error)
            raise


def is_first_rank() -> bool:
    """Whether this is the process that was started by a person, or the first of those that a scheduler started."""
    return all(os.environ.get(name, "0") == "0" for name in _RANK_VARIABLES)


def _is_done(cfg: DictConfig, run_dir: Path) -> bool:
    return not cfg.overwrite and status_of(run_dir).get("state") in ("finished", "pruned")


def _of_finished(cfg: DictConfig, run_dir: Path) -> float | None:
    status = status_of(run_dir)
    advice = "overwrite=true trains it again, run_name=NAME trains another."
    log.info("%s is %s already; %s", run_dir, status["state"], advice)
    if status["state"] == "finished":
        log_outputs(run_dir, cfg.get("imports", ()))
    return objective_of(status, cfg.objective)


def _record(run_dir: Path, error: Exception) -> None:
    """Into status.json and the run's own log, at once: the end of a sweep may be days away."""
    if isinstance(error, RefusedError):
        return  # says nothing of the run that lies there
    cause = error.__cause__ or error
    told = "".join(traceback.format_exception(error))
    earlier = status_of(run_dir)
    line = f"{type(cause).__name__}: {cause}".splitlines()[0]
    facts = {key: earlier[key] for key in ("step", "images_seen", "seconds") if key in earlier}
    diverged = isinstance(error, FloatingPointError) or None
    write_status(run_dir, **facts, state="failed", error=line, traceback=told, diverged=diverged)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):  # on screen it is one line
            handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "the run failed\n%s", (told,), None))


def _end_with_launcher() -> bool:
    """When the launcher dies, even by SIGKILL, save and stop: no run goes on that nobody waits for."""
    if os.environ.pop(WATCH_STDIN, None) is None:
        return False

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return True


def _needs_own_processes(cfg: DictConfig) -> bool:
    """Whether a run of several processes is started from inside a multirun: its ranks would start the multirun anew."""
    in_multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if not in_multirun:
        return False
    is_one = cfg.trainer.get("devices") == 1 and cfg.trainer.get("num_nodes", 1) == 1
    by_scheduler = int(os.environ.get("SLURM_NTASKS", "1")) > 1  # srun has started every rank
    return not is_one and not by_scheduler


def _in_own_process(cfg: DictConfig) -> float | None:
    hydra, run_dir = HydraConfig.get(), Path(cfg.paths.output_dir)
    command = command_of(hydra, hydra.overrides.task, run_dir, cfg.study_name)
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment_of_run(), start_new_session=True)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()  # it saves
        child.wait()
        raise
    status: dict[str, Any] = status_of(run_dir)
    if code != 0:
        raise RuntimeError(status.get("error") or f"{run_dir} ended with exit code {code}; its train.log says why")
    return objective_of(status, cfg.objective)


def environment_of_run(**variables: str) -> dict[str, str]:
    """What a run of its own gets: it watches its standard input, and is found and tracked as if typed by a person."""
    environment = {**os.environ, **variables, WATCH_STDIN: "1", "PYTHONSAFEPATH": "1"}  # -m would import from the cwd
    environment.pop("WANDB_RUN_ID", None)  # of one run, not of many
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):  # one run of many must not queue the job again
        environment.pop(name, None)
    if "SLURM_NTASKS" in environment:
        # Lightning takes a job of one task on SLURM for one rank of it, unless the job is called interactive.
        environment["SLURM_JOB_NAME"] = "interactive"
    return environment


def command_of(hydra: Any, overrides: Sequence[str], run_dir: Path, study_name: str) -> list[str]:
    """The command line that makes one run of a multirun by itself, in a process of its own."""
    sources = hydra.runtime.config_sources
    folders = [source.path for source in sources if source.provider == "command-line"]
    main = next(source.path for source in sources if source.provider == "main")
    of_multirun = ("hydra.mode", "hydra.run", "hydra.sweep", "hydra/sweeper", "hydra/launcher", "hydra.launcher")
    kept = [override for override in hydra.overrides.hydra if not override.lstrip("+~").startswith(of_multirun)]
    return [
        *(sys.executable, "-m", "consistency.cli", "--config-path", main, "--config-name", hydra.job.config_name),
        *(argument for folder in folders for argument in ("--config-dir", folder)),
        *overrides,
        f"study_name={_quoted(study_name)}",
        *kept,
        *("hydra.mode=RUN", f"hydra.run.dir={_quoted(run_dir.absolute())}"),
    ]


def _quoted(value: object) -> str:
    text = str(value).replace("'", "\\'")
    return f"'{text}'"
