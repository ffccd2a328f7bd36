"""Starting and ending W&B's run so that neither its account, its network nor the job before stops a training run."""

from __future__ import annotations

import logging
import os
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_REFUSED = re.compile(r"error 40[0134]|permission denied|unauthorized|forbidden", re.IGNORECASE)


def run_id(own: str | None) -> str | None:
    """W&B's name of the run: that of the environment, which a sweep's agent sets, or our own."""
    return os.environ.get("WANDB_RUN_ID") or own


def start_run(options: dict[str, Any], *, offline: bool, init_timeout: float, finish_timeout: float) -> Any:
    """W&B's run: online, offline or disabled as the options and `WANDB_MODE` say; offline where the network is down.

    Args:
        options: Of `wandb.init`.
        offline: Write to disk only.
        init_timeout: Seconds to wait for the server now.
        finish_timeout: Seconds to wait at the end until everything is sent.

    Raises:
        ValueError: if there is no account, or the server refuses it.
    """
    import wandb

    end_runs_left_open()
    options = {name: value for name, value in options.items() if value is not None}
    options["id"] = run_id(options.get("id"))
    if "WANDB_SWEEP_ID" in os.environ:  # its agent has said which run of which project this is
        options = {name: value for name, value in options.items() if name not in ("id", "project", "entity")}
    if offline and os.environ.get("WANDB_MODE") != "disabled":
        options["mode"] = "offline"
    limits: dict[str, Any] = {"init_timeout": init_timeout}
    if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):  # not in older versions
        limits |= {"finish_timeout": finish_timeout, "finish_timeout_raises": True}
    options["settings"] = wandb.Settings(**limits)
    try:
        return wandb.init(**options)
    except (wandb.Error, TimeoutError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        is_network = isinstance(error, wandb.errors.CommError | TimeoutError)
        if not is_network or isinstance(error, wandb.errors.AuthenticationError) or _REFUSED.search(reason):
            raise ValueError(
                f"W&B could not start ({reason}); log in with `wandb login`, check logger.wandb.entity and "
                "logger.wandb.project, or use logger.wandb.offline=true or WANDB_MODE=offline"
            ) from None
    with suppress(Exception):
        wandb.teardown()  # the id is in use until then
    run = wandb.init(**{**options, "mode": "offline"})
    log.warning("W&B cannot be reached (%s); the run goes on offline. Send it with: %s", reason, sync_command(run))
    return run


def end_run(run: Any, exit_code: int) -> None:
    """End it and W&B's process, without waiting for ever: what does not arrive is on disk.

    `finish` returns before that process has written the end of its file, which the next session will read.
    """
    import wandb

    try:
        run.finish(exit_code=exit_code)
    except Exception as error:
        reason = str(error) or type(error).__name__
        log.warning("W&B has not got the end of the run (%s). Send it with: %s", reason, sync_command(run))
    with suppress(Exception):
        wandb.teardown()


def end_runs_left_open() -> None:
    """A run that something in this process has left open would get the points of the next one."""
    import wandb

    for end in (wandb.finish, wandb.teardown):
        if wandb.run is not None:
            with suppress(Exception):
                end()


def sync_command(run: Any) -> str:
    """The command that sends what this run has on disk."""
    session = Path(run.dir).parent
    folder = session.parent if run.offline else session
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    path = shlex.quote(str(folder))
    return f"wandb sync {path}/offline-run-*-{run.id}*" if run.offline else f"wandb sync --include-online {path}"
