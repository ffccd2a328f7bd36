"""What evaluation costs beside Inception itself, and the Frechet step next to torch-fidelity's.

    python experiments/benchmark_evaluation.py                        # CPU; a few minutes
    python experiments/benchmark_evaluation.py --device cuda --images 5000

(a) Sums over 50,000 feature vectors of 2048 numbers and 1008 logits, measured in full, against the pass of Inception,
measured on a few images and scaled up. The weights are random: time does not depend on them.
(b) The Frechet distance of two moments at 2048 dimensions, interleaved with torch-fidelity's function on the same ones.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from consistency.evaluation.scores import frechet_distance
from consistency.evaluation.statistics import FeatureMoments, FeatureStatistics, Moments

TOTAL, DIM, NUM_LOGITS = 50_000, 2048, 1008


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="of Inception and the sums")
    parser.add_argument("--images", type=int, default=192, help="that Inception sees, after one batch to warm up")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each Frechet step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"{platform.machine()}, {args.threads} threads, {device}, torch {torch.__version__}\n")
    per_image = inception_seconds(args.images, args.batch_size, device)
    features_pass = per_image * TOTAL
    print(f"Inception: {1e3 * per_image:.2f} ms an image on {args.images} images of 32x32, batch {args.batch_size}")
    print(f"-> {features_pass:.0f} s for {TOTAL:,} (scaled)\n")
    print("| kept | statistics, s (measured on 50,000) | share of the feature pass |\n|---|---|---|")
    for kept, logits, features in [
        ("moments", False, False),
        ("moments, class probabilities", True, False),
        ("moments, class probabilities, features", True, True),
    ]:
        seconds = statistics_seconds(args.batch_size, device, logits, features)
        print(f"| {kept} | {seconds:.1f} | {100 * seconds / features_pass:.2f} % |", flush=True)
    compare_frechet(args.repeats)


def inception_seconds(count: int, batch_size: int, device: torch.device) -> float:
    """Seconds an image of torch-fidelity's Inception with random weights."""
    network = random_inception().to(device).eval()
    batches = torch.randint(256, (count + batch_size, 3, 32, 32), dtype=torch.int64).to(torch.uint8).split(batch_size)
    with torch.no_grad():
        network(batches[0].to(device))
        return timed(lambda: [network(batch.to(device)) for batch in batches[1:]], device)[0] / count


def random_inception() -> nn.Module:
    """The network without its file of weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: dict) -> None:  # type: ignore[override]
            pass

    import io

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return Random("random", ["2048", "logits_unbiased"], empty)


def statistics_seconds(batch_size: int, device: torch.device, with_logits: bool, with_features: bool) -> float:
    """Seconds for the sums of all 50,000, without what makes the features."""
    features = torch.rand(8, batch_size, DIM, device=device)
    logits = torch.randn(8, batch_size, NUM_LOGITS, device=device)

    def run() -> FeatureStatistics:
        sums = FeatureStatistics(
            DIM, NUM_LOGITS if with_logits else 0, total=TOTAL, keep_features=with_features, device=device
        )
        for number, indices in enumerate(torch.arange(TOTAL).split(batch_size)):
            batch = number % 8, slice(len(indices))
            sums.add(features[batch], logits[batch], indices)
        sums.all_reduce()
        return sums

    return timed(run, device)[0]


def compare_frechet(repeats: int) -> None:
    """The table of the Frechet step: moments of 4,000 vectors each, with a spectrum that falls by 1e7."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    a, b = (some_moments(seed) for seed in (0, 1))
    theirs = [{"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()} for moments in (a, b)]
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: frechet_distance(a, b),
        "torch-fidelity": lambda: fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    values = {}
    for _ in range(repeats):
        for name, run in sides.items():
            spent, values[name] = timed(run, torch.device("cpu"))
            seconds[name].append(spent)
    print("\n| Frechet distance at 2048 | median, s | lowest | highest | value |\n|---|---|---|---|---|")
    for name, spent in seconds.items():
        cells = (statistics.median(spent), min(spent), max(spent))
        print(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + f" | {values[name]:.9f} |")
    ratio = statistics.median(seconds["torch-fidelity"]) / statistics.median(seconds["ours"])
    difference = abs(values["ours"] / values["torch-fidelity"] - 1)
    print(f"\n{ratio:.1f} times as fast, relative difference {difference:.1e}")


def some_moments(seed: int) -> Moments:
    """Moments of 4,000 vectors in another basis each."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0.5, -3, DIM, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q
    sums = FeatureMoments(DIM).add(torch.randn(4000, DIM, generator=generator, dtype=torch.float64) * scales @ basis)
    return Moments(sums.mean, sums.covariance)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds and result of a call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
