"""Where runs go: the GPUs or cores of this machine, in groups."""

from __future__ import annotations

import os
import shutil
import subprocess

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def find_slots(slots: int | str, *, gpus: int, threads: int) -> list[dict[str, str]]:
    """Cut this machine into slots; each is the variables that a run's process gets before torch is imported.

    Args:
        slots: A number, or `auto`: as many as there are groups.
        gpus: GPUs a slot; 0 to leave them alone.
        threads: CPU threads a slot where there are no GPUs.

    Raises:
        ValueError: if one of them is not what it should be.
    """
    if slots != "auto" and (type(slots) is not int or slots < 1):
        raise ValueError(f"hydra.launcher.slots must be auto or a positive integer, got {slots}")
    for name, value, low in (("gpus", gpus, 0), ("threads", threads, 1)):
        if type(value) is not int or value < low:
            raise ValueError(f"hydra.launcher.{name} must be an integer of at least {low}, got {value}")
    names = visible_gpus() if gpus else []
    if gpus > len(names) > 0:
        raise ValueError(f"hydra.launcher.gpus is {gpus}, but this machine shows {len(names)} GPUs; lower it")
    groups = [
        {"CUDA_VISIBLE_DEVICES": ",".join(names[i : i + gpus])} for i in range(0, len(names) - gpus + 1, gpus or 1)
    ]
    if not names:
        groups = [dict.fromkeys(_THREAD_VARIABLES, str(threads))] * max(len(os.sched_getaffinity(0)) // threads, 1)
    count = len(groups) if slots == "auto" else int(slots)
    return [groups[i % len(groups)] for i in range(count)]


def visible_gpus() -> list[str]:
    """Names for `CUDA_VISIBLE_DEVICES`, found without torch: its import costs seconds, and would hold a GPU."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    answer = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return answer.stdout.split() if answer.returncode == 0 else []
