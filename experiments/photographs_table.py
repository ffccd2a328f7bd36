"""The table of photographs for experiments/README.md, from what measure_photographs.py has measured; no torch."""

from __future__ import annotations

from typing import Any

NAMES = {"edm": "EDM", "cd": "CD", "ct": "CT", "ict": "iCT", "ect": "ECT"}
_SAMPLERS = ("1-step", "2-step", "Heun-18")
_SAMPLES = (10_000, 50_000)  # and whatever else was measured


def table(report: dict[str, Any]) -> str:
    """Markdown: a row for each method, measured or not, and what it was measured with.

    Args:
        report: Of measure_photographs.py: about, yardsticks, runs.
    """
    measured = (int(n) for run in report["runs"].values() for by_count in run["scores"].values() for n in by_count)
    columns = [(sampler, n) for sampler in _SAMPLERS for n in sorted({*_SAMPLES, *measured})]
    scores = [f"{sampler}, {n / 1000:g}k" for sampler, n in columns]
    head = ["method", "images seen", "training", "images/s", "share of peak", *scores]
    rows = [_row(method, report["runs"].get(method), columns) for method in NAMES]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", _about(report)])


def replaced(text: str, name: str, content: str) -> str:
    """The text with `content` between the marker comments of that name, and nothing else changed.

    Raises:
        ValueError: if it does not have each of the two markers once, in their order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"no place for the table: expected {begin!r} once, and {end!r} once after it")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def _row(method: str, run: dict[str, Any] | None, columns: list[tuple[str, int]]) -> list[str]:
    if run is None:
        return [NAMES[method], *["not measured"] * (4 + len(columns))]
    scores = [_cell(method, run["scores"], sampler, str(n)) for sampler, n in columns]
    rate, share = run["images_per_second"], run["share_of_peak"]
    return [
        NAMES[method],
        f"{run['images_seen']:,}",
        f"{run['seconds']:,.0f} s",
        f"{rate:,.0f}",
        f"{share:.0%}",
        *scores,
    ]


def _cell(method: str, scores: dict[str, dict[str, float]], sampler: str, n: str) -> str:
    if (method == "edm") != (sampler == "Heun-18"):
        return "-"  # one step of a diffusion model, or Heun's method on a consistency model, draws nonsense
    value = scores.get(sampler, {}).get(n)
    return "not measured" if value is None else f"{value:,.1f}"


def _about(report: dict[str, Any]) -> str:
    about, marks, size = report["about"], report["yardsticks"], report["about"]["image_size"]
    data = f"{about['reference_count']:,} training images ({about['data']}, {size}x{size})"
    there = about["machine"]
    accuracy = f"{about['classifier_accuracy']:.1%}"
    lines = (
        f"`fd_classifier` of samples of seed {about['sample_seed']} against all {data},",
        f"in {about['classifier_features']} features of a classifier, right on {accuracy} of images kept from it.",
        f"Yardsticks: random halves of the real images {marks['halves']:.2f}, 10,000 of them against all",
        f"{marks['real_10000']:.2f} (means of 5), uniform noise {marks['uniform_noise']:,.0f}.",
        f"{about['date']}, {there['name']}, CPU threads: {there['threads']}, torch {there['torch']}.",
        f"Peak: {about['peak_flops'] / 1e12:.3g} TFLOP/s ({about['peak_of']}), measured with the scores.",
    )
    return "\n".join(lines)
