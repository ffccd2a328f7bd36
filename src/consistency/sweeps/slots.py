"""Where runs go: the GPUs or cores of this machine, in groups."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Slot:
    """Room for one run: variables that its process gets before torch is imported."""

    what: str
    environment: dict[str, str]


def find_slots(slots: int | str, *, gpus: int, threads: int) -> list[Slot]:
    """Cut this machine into slots.

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
    found = visible_gpus() if gpus else []
    if found:
        if gpus > len(found):
            raise ValueError(f"hydra.launcher.gpus is {gpus}, but this machine shows {len(found)} GPUs; lower it")
        groups = [found[i : i + gpus] for i in range(0, len(found) - gpus + 1, gpus)]
        count = len(groups) if slots == "auto" else int(slots)
        chosen = [",".join(groups[i % len(groups)]) for i in range(count)]
        return [Slot(f"{gpus} GPU each", {"CUDA_VISIBLE_DEVICES": devices}) for devices in chosen]
    count = max(len(os.sched_getaffinity(0)) // threads, 1) if slots == "auto" else int(slots)
    environment = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    return [Slot(f"CPU, {threads} thread{'s' * (threads > 1)} each", environment) for _ in range(count)]


def visible_gpus() -> list[str]:
    """Names for `CUDA_VISIBLE_DEVICES`, found without torch: its import costs seconds, and would hold a GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return asked.stdout.split() if asked.returncode == 0 else []
