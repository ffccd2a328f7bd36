"""`consistency-evaluate` and `consistency-curve`: scores of a model or of images, with what makes them comparable."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from consistency.checkpoints.native import load_model
from consistency.commands.processes import ready
from consistency.commands.rundata import data_of
from consistency.commands.sample import check_sampler, execution_of, sampler_of
from consistency.data.image_files import read_images
from consistency.evaluation.extractors import Extractor
from consistency.evaluation.protocol import Evaluation
from consistency.evaluation.references import Reference, read_reference, reference_of_images
from consistency.io.atomic import write_text
from consistency.io.progress import counting
from consistency.models.denoiser import Denoiser
from consistency.noise.grids import descending
from consistency.ops import find_device
from consistency.sampling.samplers import ConsistencySampler, OdeSampler, sample_heun

log = logging.getLogger(__name__)


class Subject(NamedTuple):
    """A model and what it is measured with, on one device."""

    denoiser: Any  # or a guided view of it
    info: dict[str, Any]
    evaluation: Evaluation
    extractor: Extractor
    reference: Reference


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Scores of a model under several seeds, or of images on disk; written to `out` and shown as a table."""
    if cfg.samples is not None:
        rows = [_images_row(cfg)]
    else:
        subject = load_subject(cfg)
        sampler = instantiate(sampler_of(cfg, subject.denoiser.kind), _convert_="object")
        check_sampler(sampler, subject.denoiser.kind, cfg.ckpt)
        rows = [row_of(cfg, subject, sampler, seed) for seed in cfg.seeds]
    summaries = summary(rows)
    report: dict[str, Any] = {"summary": summaries, "rows": rows}
    write_json(report, Path(cfg.out))
    _show(rows, summaries)
    log.info("%s", cfg.out)
    return report


def curve(cfg: DictConfig) -> list[dict[str, Any]]:
    """Scores against the number of network evaluations: `steps` for consistency models, Heun's `heun_steps` for EDM."""
    subject = load_subject(cfg)
    samplers: list[Any] = (
        [OdeSampler(sample_heun, num_steps=steps) for steps in cfg.heun_steps]
        if subject.denoiser.kind == "diffusion"
        else [ConsistencySampler(_even_levels(subject.denoiser, steps)) for steps in cfg.steps]
    )
    rows = [row_of(cfg, subject, sampler, seed) for sampler in samplers for seed in cfg.seeds]
    out = Path(cfg.out)
    write_json({"rows": rows}, out.with_suffix(".json"))
    name = subject.evaluation.names(subject.extractor)[0]
    draw_plot(
        out,
        [row["nfe"] for row in rows],
        [row[name] for row in rows],
        labels=("network evaluations", f"{name}, {rows[0]['num_samples']:,} samples"),
        title=str(cfg.ckpt),
    )
    _show(rows)
    log.info("%s and %s", out, out.with_suffix(".json"))
    return rows


def load_subject(cfg: DictConfig) -> Subject:
    """The model of `ckpt`, and the extractor and reference that measure it; all that can be missing is missed here."""
    denoiser, info = load_model(cfg.ckpt, cfg.weights)
    device = find_device(cfg.device)
    evaluation: Evaluation = instantiate(cfg.evaluation, _convert_="object")
    batch_size = min(evaluation.batch_size, evaluation.num_samples)
    model = ready(denoiser, device, guidance=cfg.guidance, batch_size=batch_size, **execution_of(cfg))
    data = data_of(cfg)
    if cfg.reference is None:
        if data is None:
            raise ValueError(f"ckpt={cfg.ckpt} does not say what it was trained on; give data=... or reference=FILE")
        if data.image_shape != denoiser.image_shape:
            raise ValueError(
                f"the model draws images {list(denoiser.image_shape)}, the data set has {list(data.image_shape)}; "
                "change data, data.image_size or data.channels"
            )
        extractor, reference = evaluation.prepare(data, device)
    else:
        extractor = evaluation.make_extractor(data, device)
        reference = _named_reference(cfg.reference, evaluation, extractor.to(device))
        evaluation.check(extractor, reference)
    return Subject(model, info, evaluation, extractor.to(device), reference)


def row_of(cfg: DictConfig, subject: Subject, sampler: Any, seed: int) -> dict[str, Any]:
    """One measurement, with a progress bar."""
    model, info, evaluation, extractor, reference = subject
    with counting(f"seed {seed}", evaluation.num_samples) as advance:
        row = evaluation.measure_sampler(model, sampler, extractor, reference, seed=seed, progress=advance)
    about = {"ckpt": str(cfg.ckpt), "weights": info.get("weights"), "method": info.get("method") or model.kind}
    about |= {"guidance": float(cfg.guidance)} if cfg.guidance != 1 else {}
    return {**row, **about, **execution_of(cfg), "images_seen": info.get("images_seen")}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Score -> mean, standard deviation and minimum over the seeds."""
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    values = {name: [row[name] for row in rows] for name in names}
    return {
        name: {"mean": mean(v), "std": stdev(v) if len(v) > 1 else 0.0, "min": min(v), "seeds": len(v)}
        for name, v in values.items()
    }


def write_json(report: Any, path: Path) -> None:
    """Write a report in one rename."""
    write_text(path, json.dumps(report, indent=2) + "\n")


def draw_plot(path: Path, x: list[float], y: list[float], *, labels: tuple[str, str], title: str) -> None:
    """A picture of scores: points, and a line through the means where x repeats; the x axis is logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = sorted(set(x))
    means = [mean(b for a, b in zip(x, y, strict=True) if a == place) for place in places]
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    axes.plot(places, means, color="0.6", linewidth=1)
    axes.plot(x, y, "o", markersize=4)
    axes.set(xscale="log", xlabel=labels[0], ylabel=labels[1], title=title)
    if len(places) <= 12:
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _images_row(cfg: DictConfig) -> dict[str, Any]:
    """Images on disk against a reference on disk, or a data set."""
    evaluation: Evaluation = instantiate(cfg.evaluation, _convert_="object")
    device, data = find_device(cfg.device), data_of(cfg)
    images = read_images(cfg.samples)
    if cfg.reference is None and data is None:
        raise ValueError("samples=... needs something to compare with; give reference=FOLDER_OR_NPZ or data=...")
    if cfg.reference is None:
        extractor, reference = evaluation.prepare(data, device)
    else:
        extractor = evaluation.make_extractor(data, device)
        reference = _named_reference(cfg.reference, evaluation, extractor.to(device), images)
    if data is not None and cfg.reference is None and images.shape[1:] != data.image_shape:
        raise _unlike(list(images.shape[1:]), list(data.image_shape))
    total = len(images)
    evaluation.check(extractor, reference, total)
    indices = torch.arange(total).split(evaluation.batch_size)
    with counting("images", total) as advance:

        def batches() -> Iterator[Any]:
            for part in indices:
                yield images[part], part
                advance(len(part))

        scores = evaluation.measure(batches(), extractor.to(device), reference, total)
    return {**scores, "samples": str(cfg.samples), **evaluation.about(extractor, reference, total)}


def _unlike(samples: list[int], reference: list[int]) -> ValueError:
    return ValueError(
        f"the samples are {samples} (channels, height, width), the reference {reference}; a score would compare sizes "
        "or colours, bring them to the same"
    )


def _named_reference(
    name: str, evaluation: Evaluation, extractor: Extractor, samples: torch.Tensor | None = None
) -> Reference:
    """A reference from an `.npz` file or a folder of images; a folder's must be like the samples."""
    keep = evaluation.keeps_features
    if Path(name).is_dir():
        images = read_images(name)
        if samples is not None and images.shape[1:] != samples.shape[1:]:
            raise _unlike(list(samples.shape[1:]), list(images.shape[1:]))
        return reference_of_images(images, id=Path(name).name, extractor=extractor, keep_features=keep)
    return read_reference(name, extractor, keep_features=keep)


def _even_levels(denoiser: Denoiser, steps: int) -> list[float]:
    """The levels after sigma_max of `steps` evaluations: evenly spread on the Karras grid of the model's range."""
    return descending(steps, sigma_min=denoiser.sigma_min, sigma_max=denoiser.sigma_max)[1:].tolist()


def _show(rows: list[dict[str, Any]], summaries: dict[str, Any] | None = None) -> None:
    """Rows as a table on the screen, under what they have in common."""
    from rich.console import Console
    from rich.table import Table

    first, console = rows[0], Console()
    for what in ("reference", "extractor"):
        console.print(f"{what:<10}  {first[what]} ({first[f'{what}_digest']})", highlight=False)
    console.print(f"samples     {first['num_samples']:,}, weights {first.get('weights', '-')}", highlight=False)
    scores = [name for name, value in first.items() if isinstance(value, float)]
    about = [name for name in ("seed", "nfe", "levels") if name in first]
    table = Table(*about, *scores)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in (*about, *scores)))
    if summaries and len(rows) > 1:
        for kind in ("mean", "std", "min"):
            table.add_row(kind, *[""] * (len(about) - 1), *(_cell(summaries[name][kind]) for name in scores))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{level:.3g}" for level in value) if len(value) <= 4 else f"{value[0]:.3g} ... ({len(value)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
