"""Measures editing and composing on the digits, and draws the pictures of docs/editing.md.

Needs, in outputs/ (each about 4 minutes on 2 cores):

    consistency-train experiment=digits_ict
    consistency-train experiment=digits_edm
    consistency-train experiment=digits_edm model.label_dropout=0.1 run_name=digits_edm_guided
    consistency-train experiment=digits_flow
    consistency-train experiment=digits_ict data=digits_tinted callbacks.quality=null run_name=digits_tinted_ict
    consistency-train experiment=digits_denoiser

Then: python experiments/measure_editing.py [outputs]. Writes experiments/results/editing_digits.json and docs/images/.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from consistency import load
from consistency.api import Model, shrink
from consistency.commands.evaluate import write_json
from consistency.data.datasets import digits, tinted_digits
from consistency.data.image_files import image_grid, save_png
from consistency.evaluation.extractors import classifier_extractor
from consistency.ops import to_uint8
from consistency.sampling.operators import LUMA, enlarge, grey, hidden, named_mask
from consistency.sampling.wrappers import TURNS, low_pass

ROOT = Path(__file__).parents[1]
PICTURES, RESULTS = ROOT / "docs" / "images", ROOT / "experiments" / "results" / "editing_digits.json"
CASES = 200
PAIRS = [(6, 9, "rotate"), (5, 5, "rotate"), (2, 2, "rotate"), (3, 5, "rotate"), (2, 5, "flip")]
WEIGHTS = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)


class Judge:
    """The classifier that measures the digits everywhere in this project."""

    def __init__(self, cache: str) -> None:
        data = digits()
        self.network = classifier_extractor(data.images, data.labels, cache)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Label and confidence of each image."""
        with torch.no_grad():
            best = torch.softmax(self.network(images)[1], dim=1).max(dim=1)
        return best.indices, best.values

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """How often it sees the label."""
        return float((self(images)[0] == labels).float().mean())

    def sure(self, images: Tensor) -> float:
        """How often it sees some digit with a confidence above 0.9."""
        return float((self(images)[1] > 0.9).float().mean())

    def spread(self, images: Tensor, labels: Tensor) -> float:
        """Mean distance of the features of two images of one label."""
        with torch.no_grad():
            features = self.network(images)[0]
        return float(torch.stack([torch.pdist(features[labels == label]).mean() for label in labels.unique()]).mean())


def inpainting(model: Model, judge: Judge, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Each half hidden: what the filled image is."""
    rows = []
    for side in ("bottom", "top", "left", "right"):
        mask = named_mask(side, 8)[0, 0]
        for steps in (1, 2, 39):
            for given in (labels, None):
                filled = model.inpaint(images, mask, steps=steps, labels=given)
                assert torch.equal(filled * mask, images * mask)
                about = {"hidden": side, "steps": steps, "labels": "given" if given is not None else "guessed"}
                rows.append({**about, "sure": judge.sure(filled), "label": judge.accuracy(filled, labels)})
    return rows


def superresolution(model: Model, judge: Judge, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """From 4 x 4 to 8 x 8, beside bicubic interpolation."""
    small = shrink(images, 2)
    rows = []
    results = {"bicubic": to_uint8(F.interpolate(small / 127.5 - 1, (8, 8), mode="bicubic", align_corners=False))}
    for steps in (2, 39):
        results[f"{steps} steps, labels given"] = model.superresolve(small, 2, steps=steps, labels=labels)
        results[f"{steps} steps, labels guessed"] = model.superresolve(small, 2, steps=steps)
    for name, large in results.items():
        error = float((large.float() - images.float()).abs().mean())
        moved = (F.avg_pool2d(large.float(), 2) - F.avg_pool2d(images.float(), 2)).abs()
        about = {"by": name, "label": judge.accuracy(large, labels), "mean error in grey levels": error}
        rows.append({**about, "error of patch means": {"mean": float(moved.mean()), "max": float(moved.max())}})
    return rows


def strokes(model: Model, judge: Judge, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Digits painted in black and white become digits; also those painted with a brush of 2 x 2 pixels."""
    rows = []
    for name, painting in (("fine", two_tone(images)), ("coarse", enlarge(two_tone(shrink(images, 2)), 2))):
        about = {"painting": name, "sigma": 0.0, "what": "itself"}
        rows.append({**about, "label": judge.accuracy(painting, labels), "sure": judge.sure(painting)})
        for sigma in (0.17, 0.4, 0.8, 1.6):
            for given in (labels, None):
                drawn = model.stroke(painting, sigma, labels=given)
                what = "labels given" if given is not None else "labels guessed"
                about = {"painting": name, "sigma": sigma, "what": what}
                rows.append({**about, "label": judge.accuracy(drawn, labels), "sure": judge.sure(drawn)})
    return rows


def two_tone(images: Tensor) -> Tensor:
    """Black or white."""
    return ((images > 95) * 255).to(torch.uint8)


def anagrams(model: Model, judge: Judge, weight: float) -> dict[str, Any]:
    """20 tries of each of five pairs: both labels are seen."""
    seen = {}
    for up, down, turn in PAIRS:
        drawn = model.anagram(up, down, 20, turn=turn, guidance=weight)
        turned = TURNS[turn](drawn)
        both = (judge(drawn)[0] == up) & (judge(turned)[0] == down)
        seen[f"{up}, {turn}: {down}"] = int(both.sum())
    return {"guidance": weight, "seen in 20": seen, "seen in 100": sum(seen.values())}


def guidance(model: Model, judge: Judge) -> list[dict[str, Any]]:
    """1,000 samples a weight: how well labels are obeyed, and how much images of one label differ."""
    rows = []
    labels = torch.arange(1000) % 10
    for weight in WEIGHTS:
        drawn = model.sample(1000, labels=labels, guidance=weight)
        rows.append({"weight": weight, "label": judge.accuracy(drawn, labels), "spread": judge.spread(drawn, labels)})
    return rows


def colours(model: Model) -> dict[str, Any]:
    """Tinted digits from their grey: luma is kept, and an image has one hue, as those of the data."""
    data = tinted_digits(CASES)
    drawn = model.colorize(data.images, labels=data.labels)
    luma = torch.tensor(LUMA)[:, None, None]
    error = ((drawn.float() - data.images.float()) * luma).sum(1).abs()
    return {
        "luma error in grey levels": {"mean": float(error.mean()), "max": float(error.max())},
        "spread of hue, drawn": hue_spread(drawn),
        "spread of hue, data": hue_spread(data.images),
    }


def hue_spread(images: Tensor) -> float:
    """1 - length of the mean direction in the colour plane, over bright pixels; 0 for one hue; mean over images."""
    floats = images.float()
    x, y = floats[:, 0] - (floats[:, 1] + floats[:, 2]) / 2, (floats[:, 1] - floats[:, 2]) * 0.75**0.5
    weight = (floats.amax(1) > 100) * torch.hypot(x, y).clamp(min=1e-6)
    mean = torch.hypot(x.where(weight > 0, 0).sum((1, 2)), y.where(weight > 0, 0).sum((1, 2)))
    return float((1 - mean / weight.sum((1, 2)).clamp(min=1e-6)).mean())


def picture(name: str, *columns: Tensor, rows: int = 8) -> None:
    """A grid with a row an image and a column each."""
    channels = max(column.shape[1] for column in columns)
    cells = torch.stack([column[:rows].expand(-1, channels, -1, -1) for column in columns], dim=1)
    save_png(image_grid(cells.flatten(0, 1), columns=len(columns)), PICTURES / f"{name}.png")


def pictures(models: dict[str, Model], images: Tensor, labels: Tensor) -> None:
    """Those of docs/editing.md."""
    ict, edm, tinted = models["digits_ict"], models["digits_edm_guided"], models["digits_tinted_ict"]
    halves = [named_mask(side, 8)[0] for side in ("bottom", "left")] + [
        named_mask("random", 8, fraction=0.7, num_images=8)
    ]
    columns = []
    for mask in halves:
        mask = mask.expand(8, 1, 8, 8)
        columns += [hidden(images[:8], mask), ict.inpaint(images[:8], mask, labels=labels[:8])]
    picture("edit_inpaint", *columns, images)
    colour = tinted_digits(8).images
    picture(
        "edit_colorize",
        grey(colour),
        tinted.colorize(colour, labels=labels[:8]),
        tinted.colorize(colour, labels=labels[:8], seed=1),
        colour,
    )
    small = shrink(images[:8], 2)
    bicubic = to_uint8(F.interpolate(small / 127.5 - 1, (8, 8), mode="bicubic", align_corners=False))
    picture("edit_superresolve", enlarge(small, 2), bicubic, ict.superresolve(small, 2, labels=labels[:8]), images)
    painting = two_tone(images[:8])
    picture(
        "edit_stroke", painting, *(ict.stroke(painting, sigma, labels=labels[:8]) for sigma in (0.2, 0.4, 0.8, 1.6))
    )
    picture("edit_translate", images, *(edm.translate(images[:8], to, 1.2, guidance=3.0) for to in (0, 3, 6, 8)))
    columns = []
    for sigma in (0.5, 1.0, 2.0, 4.0):
        noisy = ict.noisy(images[:8], sigma)
        columns += [to_uint8(noisy), edm.denoise(noisy, sigma, labels=labels[:8])]
        columns += [edm.stroke(images[:8], sigma, labels=labels[:8]), ict.denoise(noisy, sigma, labels=labels[:8])]
    picture("edit_denoise", *columns, rows=4)
    strip = [ict.interpolate(seed, seed + 1, 10, labels=label) for seed, label in ((0, 3), (2, 8))]
    strip.append(edm.morph(images[[4, 9]], 10, labels=[4, 9]))
    picture("edit_interpolate", *torch.stack(strip).unbind(1), rows=3)
    columns = []
    for up, down, turn in PAIRS:
        drawn = edm.anagram(up, down, 4, turn=turn, guidance=3.0)
        columns += [drawn, TURNS[turn](drawn)]
    picture("edit_anagram", *columns)
    columns = []
    for far, near in ((0, 1), (0, 4), (8, 3), (6, 1)):
        drawn = edm.hybrid(far, near, 4, guidance=3.0)
        columns += [drawn, to_uint8(low_pass(drawn / 127.5 - 1, 1.0))]
    picture("edit_hybrid", *columns)
    one = models["digits_denoiser"]
    columns = []
    for sigma in (0.25, 0.5, 1.0, 2.0):
        noisy = one.noisy(images[:8], sigma)
        columns += [to_uint8(noisy), one.denoise(noisy, sigma, labels=labels[:8])]
    picture("edit_one_level", *columns, images, rows=4)


def draw_guidance(curves: dict[str, list[dict[str, Any]]]) -> None:
    """Accuracy and spread against the weight."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    for panel, key, title in zip(panels, ("label", "spread"), ("label accuracy", "spread within a label"), strict=True):
        for name, rows in curves.items():
            panel.plot([row["weight"] for row in rows], [row[key] for row in rows], "o-", markersize=4, label=name)
        panel.set(xlabel="guidance weight", title=title)
    panels[1].legend(frameon=False)
    figure.savefig(PICTURES / "guidance_digits.png", dpi=100)
    plt.close(figure)


def main(outputs: str = "outputs") -> None:
    """Measure, write, and say what was found."""
    names = ("digits_ict", "digits_edm_guided", "digits_flow", "digits_tinted_ict", "digits_denoiser")
    models = {name: load(Path(outputs) / name) for name in names}
    judge, data = Judge(".data/cache/evaluation"), digits(CASES)
    images, labels = data.images, data.labels
    ict, edm, flow = (models[name] for name in names[:3])
    curves = {"EDM": guidance(edm, judge), "flow matching": guidance(flow, judge)}
    found = {
        "cases": CASES,
        "models": {name: model.info for name, model in models.items()},
        "inpainting": inpainting(ict, judge, images, labels),
        "superresolution": superresolution(ict, judge, images, labels),
        "strokes": strokes(ict, judge, images, labels),
        "anagrams": {
            "EDM": [anagrams(edm, judge, weight) for weight in (1.0, 3.0)],
            "flow matching": [anagrams(flow, judge, weight) for weight in (1.0, 3.0)],
            "iCT": [anagrams(ict, judge, 1.0)],
        },
        "guidance": curves,
        "colours": colours(models["digits_tinted_ict"]),
    }
    pictures(models, images, labels)
    draw_guidance(curves)
    write_json(found, RESULTS)
    print(json.dumps({key: value for key, value in found.items() if key != "models"}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
