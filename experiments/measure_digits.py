"""Measure digits runs: Frechet distances in a classifier's features, and the table of experiments/README.md.

    python experiments/measure_digits.py outputs/digits_ict outputs/digits_ct      # or no argument: outputs/digits_*

For each run: 1,797 samples (as many as there are real digits) against the 1,797 real digits, one-step and two-step for
consistency models, 18 Heun steps for EDM. Yardsticks: the distance between random halves of the real digits, and that
of 1,797 digits drawn with replacement, which is what a model that only repeats its training images would get.
Writes experiments/results/digits.json and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from consistency.checkpoints.native import load_model
from consistency.commands.sample import sample_in_batches
from consistency.data.datasets import digits
from consistency.evaluation.features import classifier_moments, train_classifier
from consistency.evaluation.scores import frechet_distance
from consistency.sampling.samplers import ConsistencySampler, OdeSampler, sample_heun

NUM_SPLITS = 20
RESULTS = Path(__file__).parent / "results" / "digits.json"


def main() -> None:
    """Measure the runs named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories; default: outputs/digits_*")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--mid-sigma", type=float, nargs="+", default=[0.821], help="levels of two-step sampling")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = args.runs or sorted(p for p in Path("outputs").glob("digits_*") if (p / "model" / "config.json").exists())

    real = digits()
    classifier, accuracy = train_classifier(real.images, real.labels)
    moments = classifier_moments(classifier, real.images)
    generator = torch.Generator().manual_seed(0)
    halves = []
    for _ in range(NUM_SPLITS):
        order = torch.randperm(len(real), generator=generator)
        a, b = (classifier_moments(classifier, real.images[part]) for part in order.chunk(2))
        halves.append(frechet_distance(a, b))
    noise = torch.randint(0, 256, real.images.shape, generator=generator).to(torch.uint8)
    resampled = []
    for _ in range(NUM_SPLITS):
        index = torch.randint(0, len(real), (len(real),), generator=generator)
        resampled.append(frechet_distance(moments, classifier_moments(classifier, real.images[index])))
    report: dict[str, Any] = {
        "classifier_accuracy": accuracy,
        "halves": {"mean": sum(halves) / NUM_SPLITS, "min": min(halves), "max": max(halves), "splits": NUM_SPLITS},
        "resampled": {"mean": sum(resampled) / NUM_SPLITS, "min": min(resampled), "max": max(resampled)},
        "uniform_noise": frechet_distance(moments, classifier_moments(classifier, noise)),
        "num_samples": len(real),
        "sample_seed": args.seed,
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}",
        "runs": {},
    }
    print(f"classifier accuracy on held-out digits: {accuracy:.4f}")
    for name in ("halves", "resampled"):
        print(f"{name}: {report[name]}")
    print(f"uniform noise: {report['uniform_noise']:.0f}\n")
    print("| run | images seen | wall time | 1-step | 2-step | 18-step Heun |\n|---|---|---|---|---|---|")
    for run in runs:
        row = measure(
            run, args, len(real), lambda images: frechet_distance(moments, classifier_moments(classifier, images))
        )
        report["runs"][run.name] = row
        cells = [f"{row[key]:.1f}" if key in row else "-" for key in ("onestep", "twostep", "heun18")]
        print(
            f"| {run.name} | {row['images_seen']:,} | {row.get('seconds', 0):.0f} s | {' | '.join(cells)} |", flush=True
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


def measure(run: Path, args: argparse.Namespace, num_samples: int, distance: Any) -> dict[str, Any]:
    """Distances of one run, as they apply to its method."""
    denoiser, info = load_model(run)
    status = json.loads((run / "status.json").read_text()) if (run / "status.json").exists() else {}
    row = {**info, "seconds": status.get("seconds", 0)}
    samplers: dict[str, Any]
    if denoiser.kind == "diffusion":
        samplers = {"heun18": OdeSampler(sample_heun, num_steps=18)}
    else:
        samplers = {"onestep": ConsistencySampler()}
        for level in args.mid_sigma:
            samplers["twostep" if len(args.mid_sigma) == 1 else f"twostep@{level}"] = ConsistencySampler([level])
    for name, sampler in samplers.items():
        images, _ = sample_in_batches(denoiser, sampler, num_samples=num_samples, seed=args.seed, batch_size=599)
        row[name] = distance(images)
    return row


if __name__ == "__main__":
    main()
