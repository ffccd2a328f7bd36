"""Seconds of things that are run in turns, so that a busy machine slows all alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Seconds of a call, mean over so many in a row, the device's queue included."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait_for(device)
    return (time.perf_counter() - start) / repeats


def in_turns(
    sides: dict[str, Callable[[], Any]], device: torch.device, *, rounds: int = 7, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one call each to warm up; every other round goes backwards."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            seconds[name].append(seconds_of(sides[name], device, repeats))
    return seconds


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times as fast: the median over pairs of the same round, and the lowest and highest."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "pairs": len(ratios)}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, lowest and highest, in milliseconds."""
    parts = (statistics.median(seconds), min(seconds), max(seconds))
    return dict(zip(("median_ms", "low_ms", "high_ms"), (1e3 * part for part in parts), strict=True))


def say(ratios: dict[str, float]) -> str:
    """`1.31x (1.20 to 1.44, 7 pairs)`."""
    return f"{ratios['median']:.2f}x ({ratios['low']:.2f} to {ratios['high']:.2f}, {ratios['pairs']:.0f} pairs)"


def device_rates(device: torch.device, size: int = 2048) -> dict[str, float]:
    """Best of a few: matrix product in FLOP/s (float32, and bfloat16 on a GPU), copy in bytes/s (read and written)."""
    size = size if device.type == "cpu" else 4 * size
    source = torch.empty(64 * 2**20 // 4 * (1 if device.type == "cpu" else 16), device=device)
    target = torch.empty_like(source)
    rates = {"copy_bytes": 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))}
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        if dtype != torch.float32 and device.type == "cpu":
            continue  # without the instructions it would take minutes
        a = torch.randn(size, size, device=device, dtype=dtype)
        seconds = min(seconds_of(lambda a=a: a @ a, device) for _ in range(6))  # type: ignore[misc]
        rates[f"matmul_{name}"] = 2 * size**3 / seconds
    return rates


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    about = {"name": name, "device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return about | {"python": platform.python_version(), "platform": platform.platform(terse=True)}


def _processor() -> str:
    """The model of the CPU, as the system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
