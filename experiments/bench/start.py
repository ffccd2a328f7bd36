"""How long commands take to start, and which imports they wait for.

    python experiments/bench/start.py                  # 5 interleaved rounds, a few minutes
    python experiments/bench/start.py --rounds 1

Each start is a fresh process on one thread. CPU seconds stand beside the wall clock: they do not suffer from what else
the machine does.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

COMMANDS = Path(sys.executable).parent
HELP = ("sample", "train")  # the others are as quick as the first
TINY = ("experiment=smoke_ict", "trainer.accelerator=cpu", "overwrite=true", "run_name=tiny")
DRAW = ("ckpt=outputs/tiny", "num_samples=4", "device=cpu", "out=four.png")


def measure(rounds: int = 5) -> dict[str, Any]:
    """Median seconds of each start, wall and CPU, over interleaved rounds, and the 8 heaviest imports of sampling."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        starts = _starts()
        made = _run(
            starts["consistency-train experiment=smoke_ict"], folder, env
        )  # makes the model, and warms the disk
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in starts}
        if rounds == 1:
            seconds["consistency-train experiment=smoke_ict"].append(made)
        for _ in range(rounds):
            for name, command in starts.items():
                if rounds == 1 and seconds[name]:
                    continue
                seconds[name].append(_run(command, folder, env))
        imports = _imports("consistency.commands.sample", env)
    medians = {
        name: {"wall": statistics.median(wall for wall, _ in both), "cpu": statistics.median(cpu for _, cpu in both)}
        for name, both in seconds.items()
    }
    return {"rounds": rounds, "seconds": medians, "imports of sampling": imports}


def _starts() -> dict[str, list[str]]:
    """Name -> command line."""
    python = sys.executable
    starts = {
        "python": [python, "-c", ""],
        "import torch": [python, "-c", "import torch"],
        "import consistency": [python, "-c", "import consistency"],
        "from consistency import load": [python, "-c", "from consistency import load"],
    }
    starts |= {f"consistency-{name} --help": [str(COMMANDS / f"consistency-{name}"), "--help"] for name in HELP}
    starts["consistency-sample, 4 images"] = [str(COMMANDS / "consistency-sample"), *DRAW]
    starts["consistency-train experiment=smoke_ict"] = [str(COMMANDS / "consistency-train"), *TINY]
    return starts


def _run(command: list[str], folder: str, env: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process and its children."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _imports(module: str, env: dict[str, str], count: int = 8) -> dict[str, float]:
    """The packages (first two names) that take longest to import, without what they import, in seconds."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stderr
    own: dict[str, float] = {}
    for microseconds, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", said):
        package = ".".join(name.split(".")[:2])
        own[package] = own.get(package, 0.0) + int(microseconds) / 1e6
    return dict(sorted(own.items(), key=lambda item: -item[1])[:count])


def tell(result: dict[str, Any]) -> None:
    """Print the result as Markdown."""
    print(f"\n| start, median of {result['rounds']} | wall, s | CPU, s |\n|---|---|---|")
    for name, row in result["seconds"].items():
        print(f"| {name} | {row['wall']:.2f} | {row['cpu']:.2f} |")
    print("\n| heaviest imports of sampling | own, s |\n|---|---|")
    for name, seconds in result["imports of sampling"].items():
        print(f"| {name} | {seconds:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    tell(measure(parser.parse_args().rounds))
