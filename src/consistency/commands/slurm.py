"""On a SLURM cluster: a job that is told of its end in advance is queued again, and goes on from its checkpoint."""

from __future__ import annotations

import logging
import os
import subprocess
from typing import Any

log = logging.getLogger(__name__)


def slurm_plugins() -> list[Any]:
    """Lightning on SLURM without its own requeueing, which leaves a new checkpoint of the whole run each time."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def requeue() -> None:
    """Queue this job (or task of an array) again, if it is one: called after a checkpoint that SIGUSR1 asked for.

    A job script asks for the signal with `#SBATCH --signal=USR1@90`, 90 seconds before its time is over.
    """
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
        log.info("SLURM job %s is queued again", job)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        log.warning("SLURM job %s could not be queued again (%s); submit it once more, and it goes on", job, told)
