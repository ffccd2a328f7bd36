"""Kill a run of the digits recipe again and again, and compare its end with a run that nobody touched.

    make test-faults                     50 kills of the recipe; about half an hour on 2 cores
    python tests/faults.py --kills 6 --recipe smoke_ict ...   the short form, which is in the suite

Half of the kills are SIGKILL, the others SIGTERM and Ctrl-C, at moments drawn by seed: in the start, in training, in
saving. After each the same command is typed again. The weights, target, averages, optimizer and logged
rows at the end must be those of the straight run, bit for bit.
"""

from __future__ import annotations

import argparse
import csv
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

TRAIN = [sys.executable, "-m", "consistency.cli"]
NOT_COMPARED = ("images_per_second", "quality_time_share")


def train(folder: Path, name: str, overrides: list[str]) -> subprocess.Popen[bytes]:
    """Start the command in its own process group."""
    log = (folder / f"{name}.log").open("ab")
    command = [*TRAIN, f"run_name={name}", *overrides]
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def step_of(run: Path) -> int:
    """Of the newest whole checkpoint; 0 before there is one."""
    for name in ("last", "previous"):
        try:
            state = torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]
            return state["progress._extra_state"]["step"]
        except Exception:
            continue
    return 0


def kill_at(child: subprocess.Popen[bytes], run: Path, number: int, moment: random.Random, kind: int) -> str | None:
    """Send the signal at a random moment; None if the run was over before, else where it was.

    Of five kills one comes at any time from the start on, one waits for a file that is being written, and three come
    within six seconds of training.
    """
    began, partial = time.time(), run / "checkpoints/last.partial"
    if kind == 0:
        deadline = time.monotonic() + moment.uniform(0.5, 12.0)
    else:
        while child.poll() is None and not _is_training(run, began):
            time.sleep(0.05)
        deadline = time.monotonic() + moment.uniform(0.0, 6.0)
    while time.monotonic() < deadline and not (kind == 1 and partial.exists()):
        if child.poll() is not None:
            return None
        time.sleep(0.0005 if kind == 1 else 0.02)
    where = "saving" if partial.exists() else "training" if _is_training(run, began) else "starting"
    child.send_signal(number)
    try:
        child.wait(timeout=600)
    except subprocess.TimeoutExpired:
        child.kill()
        raise AssertionError(f"signal {number} did not end the run within ten minutes") from None
    return where


def _is_training(run: Path, since: float) -> bool:
    file = run / "config.yaml"
    return file.exists() and file.stat().st_mtime >= since


def rows(run: Path) -> list[dict[str, str]]:
    """Of metrics.csv, without times."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in csv.DictReader(file)]


def differences(a: object, b: object, path: str = "") -> list[str]:
    """Places where two checkpoints differ in any bit; times are not looked at."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: other keys"]
        skipped = ("seconds", "config")
        return [line for key in a if key not in skipped for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        pairs = enumerate(zip(a, b, strict=False))
        return (
            [line for i, (x, y) in pairs for line in differences(x, y, f"{path}/{i}")] if len(a) == len(b) else [path]
        )
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    return [] if a == b else [f"{path}: {a} and {b}"]


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--at-least", type=int, help="kills that must have come before the run's end; default: all")
    parser.add_argument("--recipe", default="digits_ict")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("outputs/faults"))
    parser.add_argument("overrides", nargs="*", help="for both runs, e.g. trainer.max_steps=300")
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"experiment={options.recipe}", "callbacks.checkpoint.every_n_steps=10", "callbacks.progress=null"]
    overrides += ["callbacks.log.every_n_steps=10", *options.overrides]

    straight, run = folder / "outputs/straight", folder / "outputs/killed"
    code = train(folder, "straight", overrides).wait()
    assert code == 0, f"the straight run failed: see {folder / 'straight.log'}"
    print(f"straight run: {step_of(straight)} steps", flush=True)

    moment, kills = random.Random(options.seed), []
    while len(kills) < options.kills:
        number = moment.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        child = train(folder, "killed", overrides)
        where = kill_at(child, run, number, moment, kind=(len(kills) + 1) % 5)
        if where is None:
            break
        kills.append((signal.Signals(number).name, where, step_of(run), child.returncode))
        print(f"{len(kills):3d}  {kills[-1][0]:8s} {where:10s} checkpoint of step {kills[-1][2]:5d}", flush=True)
    code = train(folder, "killed", overrides).wait()
    print("kills: " + ", ".join(f"{n} {what} ({where})" for (what, where), n in Counter(k[:2] for k in kills).items()))
    enough = options.kills if options.at_least is None else options.at_least
    if code != 0 or len(kills) < enough:
        print(f"FAILED: exit code {code} after {len(kills)} kills; see {folder / 'killed.log'}")
        return 1
    a, b = (torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (straight, run))
    found = differences(a, b)
    if rows(straight) != rows(run):
        found.append("metrics.csv: other rows")
    left = [file.name for file in run.rglob("*partial*")]
    print("\n".join(found[:20]) or "weights, averages, optimizer, counters and logged rows are equal, bit for bit")
    print(f"left over: {left}" if left else "nothing left over")
    return 1 if found or left else 0


if __name__ == "__main__":
    sys.exit(main())
