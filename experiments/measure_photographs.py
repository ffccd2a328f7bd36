"""Train the five methods on small photographs, measure them, and write the table of experiments/README.md.

    python experiments/measure_photographs.py gpu        # make results-gpu: 32x32, experiment=photos_*
    python experiments/measure_photographs.py cpu        # make results-cpu: 16x16, a tiny network

A run that is finished is used as it is, one that was stopped goes on from its checkpoint; --measure-only trains nothing
and leaves out what is missing. Scores are Frechet distances (`fd_classifier`) in the features of a classifier of the
same photographs, `evaluation=photographs`, which is trained once and kept in .data/cache. Writes
experiments/results/photographs_{gpu,cpu}.json, the table between its markers, and docs/images/photographs_*.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench.timing import device_rates, machine
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from photographs_ladder import LADDERS, METHODS, Ladder
from photographs_table import replaced, table
from torch import Tensor

from consistency import config
from consistency.checkpoints.native import load_denoiser
from consistency.commands.evaluate import Subject, load_subject, row_of, write_json
from consistency.commands.folder import status_of
from consistency.commands.rundata import data_of
from consistency.commands.sample import sample_in_batches
from consistency.data.image_files import save_grid
from consistency.evaluation.extractors import extract
from consistency.evaluation.scores import frechet_distance
from consistency.evaluation.statistics import FeatureMoments
from consistency.models.flops import flops_of_image
from consistency.sampling.samplers import ConsistencySampler, OdeSampler, sample_heun

# Forward passes of a training step beside the one that is differentiated: the target's, and CD's two of the teacher.
EXTRA_PASSES = {"edm": 0, "cd": 3, "ct": 1, "ict": 1, "ect": 1}
SAMPLERS: dict[str, Any] = {
    "1-step": ConsistencySampler(),
    "2-step": ConsistencySampler([0.821]),
    "Heun-18": OdeSampler(sample_heun, num_steps=18),
}
SPLITS = 5


def main() -> None:
    """Train what is missing, measure what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=tuple(LADDERS))
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of the runs")
    parser.add_argument("--data", default="cifar10_jpeg", help="or cifar10, which is downloaded")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--samples", nargs="+", type=int, help="default: 10000 50000, on a CPU 10000")
    parser.add_argument("--measure-only", action="store_true", help="train nothing")
    parser.add_argument("--into", type=Path, default=Path(__file__).parents[1], help="repository to write to")
    args = parser.parse_args()
    ladder = LADDERS[args.kind]
    if args.kind == "gpu" and not torch.cuda.is_available():
        parser.error("gpu: there is no CUDA device here; take cpu (make results-cpu)")
    if not args.measure_only:
        for method in args.methods:
            train(ladder.command(method, args.outputs, args.data), args.outputs / f"{ladder.prefix}{method}")
    measure_all(args.kind, ladder, args)


def train(overrides: list[str], run: Path) -> None:
    """Start or continue a run, unless it is finished."""
    if status_of(run).get("state") != "finished":
        subprocess.run([Path(sys.executable).parent / "consistency-train", *overrides], check=True)


def measure_all(kind: str, ladder: Ladder, args: argparse.Namespace) -> None:
    """Measure the finished runs, one after the other; each is written down before the next."""
    file = args.into / "experiments" / "results" / f"photographs_{kind}.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    report: dict[str, Any] = {}
    for method in args.methods:
        run = args.outputs / f"{ladder.prefix}{method}"
        if status_of(run).get("state") != "finished":
            print(f"{run} is not finished: not measured", flush=True)
            continue
        cfg = composed("evaluate", f"ckpt={run}", "evaluation=photographs", *ladder.data(args.data), *ladder.evaluate)
        subject = load_subject(cfg)
        if not report:
            report = {"about": about(subject, args.data), "yardsticks": yardsticks(subject, cfg), "runs": {}}
            same = old.get("about", {}).get("classifier_digest") == report["about"]["classifier_digest"]
            report["runs"] = old["runs"] if same else {}  # scores of another classifier do not compare
        row = training_of(run, method, report["about"]["peak_flops"])
        samplers = ("Heun-18",) if method == "edm" else ("1-step", "2-step")
        before = report["runs"].get(method, {})
        kept = before["scores"] if before.get("seconds") == row["seconds"] else {}  # of the same run
        row["scores"] = {
            name: kept.get(name, {})
            | {str(n): score(cfg, subject, SAMPLERS[name], n) for n in args.samples or ladder.samples}
            for name in samplers
        }
        report["runs"][method] = row
        picture = args.into / "docs" / "images" / f"photographs_{kind}_{method}.png"
        images, _ = sample_in_batches(
            subject.denoiser, SAMPLERS[samplers[0]], num_samples=80, seed=0, batch_size=80, labels="balanced"
        )
        save_grid(images, picture, columns=10)  # a class a column
        write_json(report, file)
        readme = args.into / "experiments" / "README.md"
        readme.write_text(replaced(readme.read_text(), f"photographs {kind}", table(report)))
    print(table(report) if report else "nothing measured")


def composed(command: str, *overrides: str) -> DictConfig:
    """Configuration of a command, as on its command line."""
    config.register()
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        return compose(command, overrides=list(overrides))


def score(cfg: DictConfig, subject: Subject, sampler: Any, num_samples: int) -> float:
    """Frechet distance of so many samples of seed 0."""
    subject = subject._replace(evaluation=replace(subject.evaluation, num_samples=num_samples))
    return row_of(cfg, subject, sampler, seed=0)["fd_classifier"]


def about(subject: Subject, data: str) -> dict[str, Any]:
    """What was measured with what."""
    device = subject.extractor.device
    rates = device_rates(device)
    kind = "bfloat16" if device.type == "cuda" else "float32"
    extractor: Any = subject.extractor
    return {
        "date": date.today().isoformat(),
        "data": data,
        "image_size": extractor.model.image_size,
        "machine": machine(device),
        "peak_flops": rates[f"matmul_{kind}"],
        "peak_of": f"a large matrix product in {kind}",
        "classifier_accuracy": extractor.accuracy,
        "classifier_digest": extractor.digest,
        "classifier_features": extractor.dim,
        "reference": subject.reference.id,
        "reference_count": subject.reference.count,
        "sample_seed": 0,
    }


def yardsticks(subject: Subject, cfg: DictConfig) -> dict[str, float]:
    """Distances of the real photographs from themselves, and of noise from them."""
    images: Tensor = data_of(cfg).dataset.images  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    features = torch.cat([extract(subject.extractor, batch)[0] for batch in images.split(500)])
    noise = torch.randint(0, 256, (10_000, *images.shape[1:]), generator=generator).to(torch.uint8)
    of_noise = torch.cat([extract(subject.extractor, batch)[0] for batch in noise.split(500)])

    def moments(rows: Tensor) -> FeatureMoments:
        return FeatureMoments(rows.shape[1], rows.device).add(rows)

    orders = [torch.randperm(len(images), generator=generator) for _ in range(SPLITS)]
    halves = [frechet_distance(*(moments(features[part]) for part in order.chunk(2))) for order in orders]
    some = [frechet_distance(moments(features[order[:10_000]]), moments(features)) for order in orders]
    return {
        "halves": statistics.mean(halves),
        "real_10000": statistics.mean(some),
        "uniform_noise": frechet_distance(moments(of_noise), moments(features)),
    }


def training_of(run: Path, method: str, peak: float) -> dict[str, Any]:
    """What a run says of its training, and the share of the peak that its rate is."""
    status, denoiser = status_of(run), load_denoiser(run)
    with (run / "metrics.csv").open() as file:
        rates = [float(row["images_per_second"]) for row in csv.DictReader(file) if row["images_per_second"]]
    flops, rate = flops_of_image(denoiser.config, EXTRA_PASSES[method]), statistics.median(rates)
    return {
        "images_seen": status["images_seen"],
        "seconds": status["seconds"],
        "images_per_second": rate,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "flops_of_an_image": flops,
        "share_of_peak": flops * rate / peak,
    }


if __name__ == "__main__":
    main()
