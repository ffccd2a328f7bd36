"""Where the time of a recipe goes, and how fast it is beside what people would use instead: `make bench`.

    python experiments/bench                                         # digits_ict on this CPU; about 4 minutes
    python experiments/bench --device cuda experiment=photos_ict speed=gpu
    python experiments/bench --only floor,start --out figures.json experiment=cifar10_ict data.batch_size=8

The images are random: time does not depend on them. What is measured is kept as JSON, with the machine's name.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import floor
import rival
import start
import torch
from omegaconf import OmegaConf
from timing import machine, say

import evaluation
import sampling

RESULTS = Path(__file__).parents[1] / "results" / "bench"
PARTS = ("floor", "training", "sampling", "evaluation", "start")
ALL = (*PARTS, "profile")


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ",".join(ALL))
    parser.add_argument("--rounds", type=int, default=7, help="interleaved pairs; at least 5 for figures that are told")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes first")
    parser.add_argument("--out", type=Path, help="JSON file; by default results/bench/MACHINE-RECIPE.json")
    parser.add_argument("overrides", nargs="*", help="of consistency-train; by default experiment=digits_ict")
    args = parser.parse_intermixed_args()
    if unknown := set(args.only.split(",")) - set(ALL):
        parser.error(f"--only has {', '.join(unknown)}; allowed: {', '.join(ALL)}, with commas")
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device={args.device} cannot be used here: {str(error).splitlines()[0]}")
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    overrides, device = args.overrides or ["experiment=digits_ict"], torch.device(args.device)
    found: dict[str, Any] = {"machine": machine(device), "recipe": overrides, "date": time.strftime("%Y-%m-%d")}
    print(f"{found['machine']['name']}, {device}, {args.threads} threads, torch {torch.__version__}")
    cfg = floor.compose_recipe(overrides)
    if cfg.network is None:
        parser.error("method=cd has the network of its teacher; bench the recipe of the teacher, or --only floor")
    network: Any = OmegaConf.to_container(cfg.network, resolve=True)
    compiled = not args.no_compile
    for part in args.only.split(","):
        began = time.perf_counter()
        if part == "floor":
            found[part] = floor.measure(overrides, device, rounds=args.rounds)
            tell_floor(found[part])
        elif part == "training":
            found[part] = rival.measure(network, device, batch=128, rounds=args.rounds, compiled=compiled)
            tell_rival(found[part], "training step")
        elif part == "sampling":
            found[part] = sampling.measure({**network, "in_channels": 3}, device, rounds=args.rounds, compiled=compiled)
            tell_rival(found[part], "one-step sampling")
        elif part == "evaluation":
            found[part] = evaluation.measure(device)
            print("\nEvaluation: " + evaluation.say(found[part]))
        elif part == "start":
            found[part] = start.measure(rounds=1)
            start.tell(found[part])
        else:
            found[part] = floor.Bench(overrides, device).profile()
            print(found[part])
        print(f"({part}: {time.perf_counter() - began:.0f} s)", flush=True)
    out = args.out or RESULTS / f"{_slug(found['machine']['name'])}-{_slug('-'.join(overrides))}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if "profile" in found:
        out.with_name(f"{out.stem}-profile.txt").write_text(found.pop("profile") + "\n")
    before = json.loads(out.read_text()) if out.exists() else {}
    if any(before.get(key) != found[key] for key in ("machine", "recipe")):
        before = {}
    out.write_text(json.dumps({**before, **found}, indent=1) + "\n")
    print(f"\n-> {out}")


def tell_floor(found: dict[str, Any]) -> None:
    """The table of a recipe's step."""
    counted, rates, loops = found["counted"], found["rates"], found["loops"]
    peak = found["peak"]
    floor_ms, bytes_ms = 1e3 * counted["flops"] / peak, 1e3 * counted["bytes"] / rates["copy_bytes"]
    print(f"\n{' '.join(found['recipe'])}: {found['parameters']:,} parameters, batch {found['batch']}")
    work = f"{counted['flops'] / 1e9:.4g} GFLOP a step, {counted['bytes'] / 1e9:.3g} GB in and out of operators"
    print(f"counted      {work}")
    print(f"device       {peak / 1e9:,.4g} GFLOP/s in a matrix product, {rates['copy_bytes'] / 1e9:.3g} GB/s in a copy")
    print("\n| | median, ms | lowest | highest |\n|---|---|---|---|")
    print(f"| floor: FLOPs at the matrix rate | {floor_ms:.1f} | | |")
    print(f"| bytes at the copy rate, as if there were no cache | {bytes_ms:.1f} | | |")
    for name, row in {**found["parts"], **loops}.items():
        print(f"| {name} | {row['median_ms']:.1f} | {row['low_ms']:.1f} | {row['high_ms']:.1f} |")
    print(f"\nLightning / bare loop: {say(found['lightning_over_bare'])}")
    share = 100 * found["share_of_peak"]
    print(f"{found['images_per_second']:,.0f} images/s, {share:.0f} % of the matrix rate")


def tell_rival(found: dict[str, Any], what: str) -> None:
    """The table of a comparison with diffusers."""
    print(f"\n| {what}, batch {found['batch']}, {found['parameters']:,} parameters | median, ms | times as fast |")
    print("|---|---|---|")
    for name, row in found["step"].items():
        times = found["times_as_fast"].get(name)
        print(f"| {name} | {row['median_ms']:.1f} | {say(times) if times else '1'} |")
    for name, value in found.get("latency_ms", {}).items():
        print(f"latency of one image, {name}: {value['median_ms']:.1f} ms")
    print(f"largest difference of the outputs: {found['largest_difference']:.1e}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    main()
