"""Time of the same runs on one slot and on several, interleaved. python experiments/benchmark_sweep.py

One thread a run. Prints the median ratio, which a machine with as many idle cores as slots brings near 1 / slots.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = Path(sys.executable).parent / "consistency-train"


def seconds(folder: str, name: str, slots: int, runs: int, steps: int) -> float:
    """Wall time of a multirun of `runs` seeds of digits_ict."""
    seeds = ",".join(map(str, range(runs)))
    overrides = [f"seed={seeds}", f"study_name={name}", f"trainer.max_steps={steps}", f"hydra.launcher.slots={slots}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    subprocess.run(
        [COMMAND, "-m", "experiment=digits_ict", "callbacks.quality=null", *overrides],
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(args.pairs):
            alone = seconds(folder, f"alone{pair}", 1, args.runs, args.steps)
            together = seconds(folder, f"together{pair}", args.slots, args.runs, args.steps)
            ratios.append(together / alone)
            print(f"{args.runs} runs: 1 slot {alone:.1f} s, {args.slots} slots {together:.1f} s, {ratios[-1]:.2f}x")
    print(f"median {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
