"""`consistency-search`: the best levels for sampling in a few steps, by search or by a scan."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from consistency.commands.evaluate import Subject, draw_plot, load_subject, row_of, write_json
from consistency.sampling.samplers import ConsistencySampler, OdeSampler, sample_heun
from consistency.sampling.search import greedy_search, remembered

log = logging.getLogger(__name__)


def search(cfg: DictConfig) -> dict[str, Any]:
    """Look for the levels after sigma_max of `steps` evaluations; the same images (seed) are drawn each time.

    Indices count down from sigma_max on the Karras grid of `num_levels` points, as in diffusers' `timesteps`.
    """
    subject = load_subject(cfg)
    if subject.denoiser.kind == "diffusion":
        raise ValueError(f"{cfg.ckpt} is a diffusion model, which has no levels to search for; use a consistency model")
    grid = OdeSampler(sample_heun, num_steps=cfg.num_levels).levels(subject.denoiser)[:-1]
    name = subject.evaluation.names(subject.extractor)[0]
    if not {"fd", "kd"}.intersection(subject.evaluation.metrics):
        raise ValueError(
            f"a search needs a distance, got evaluation.metrics={list(subject.evaluation.metrics)}; add fd"
        )
    rows: list[dict[str, Any]] = []

    def score(points: tuple[int, ...]) -> float:
        row = row_of(cfg, subject, ConsistencySampler([grid[point] for point in points]), cfg.seed)
        rows.append({"points": list(points), **row})
        levels = ", ".join(f"{grid[point]:.4g}" for point in points)
        log.info("%s at %s (index %s of %d): %.5g", name, levels, list(points), cfg.num_levels, row[name])
        return row[name]

    ask = remembered(score)
    points: tuple[int, ...]
    if cfg.scan:
        points = min(((index,) for index in range(1, cfg.num_levels - 1)), key=ask)
    else:
        points, _ = greedy_search(ask, cfg.num_levels, cfg.steps - 1, parts=cfg.parts)
    # Of all that were evaluated with so many steps: the first points are searched for alone.
    best = min((row for row in rows if len(row["points"]) == len(points)), key=lambda row: row[name])
    found = next(row for row in rows if row["points"] == list(points))
    out = Path(cfg.out)
    write_json({"best": best, "found": found, "metric": name, "num_levels": cfg.num_levels, "rows": rows}, out)
    if cfg.steps == 2:
        _plot(out.with_suffix(".png"), rows, grid, name, subject)
    levels = [float(f"{grid[point]:.4g}") for point in best["points"]]
    log.info("best of %d: %s %.5g at index %s", len(rows), name, best[name], best["points"])
    log.info("use it      sampler=multistep sampler.mid_sigmas=%s", levels)
    log.info("written     %s", out)
    return best


def _plot(path: Path, rows: list[dict[str, Any]], grid: list[float], name: str, subject: Subject) -> None:
    sigmas = [grid[row["points"][0]] for row in rows]
    label = f"{name}, {subject.evaluation.num_samples:,} samples"
    draw_plot(path, sigmas, [row[name] for row in rows], labels=("sigma of the second step", label), title="two steps")
