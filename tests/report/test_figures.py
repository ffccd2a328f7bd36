"""Figures: which there are, of what size, and that odd numbers do not break them."""

import io
import math
import random

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from consistency.report.figures import MAX_BYTES, best_groups, choices, curves, png, samples, set_scale
from consistency.report.group import make_groups
from consistency.report.load import read_study

ONESTEP = "fd_classifier_onestep"


def groups_of(folder):
    return make_groups(read_study(folder))


def curves_of(folder, score=ONESTEP):
    study = read_study(folder)
    return list(curves(study, make_groups(study), score))


def choices_of(folder, *scores):
    return list(choices(groups_of(folder), scores or [ONESTEP]))


def is_png(picture):
    image = Image.open(io.BytesIO(picture.data))
    image.load()
    return image.format == "PNG" and len(picture.data) < MAX_BYTES


def test_curves(two_metrics):
    (curve,) = curves_of(two_metrics)
    assert is_png(curve)
    assert "Bands" in curve.caption
    (loss,) = curves_of(two_metrics, "loss")
    assert is_png(loss)
    assert "N(k)" in loss.caption


def test_nothing_to_draw_is_no_picture(study):
    study.run("a", "seed=0", scores=(3.0,))
    (study.path / "a" / "metrics.csv").unlink()
    folder = study.note(("b", ["seed=1"]))
    assert curves_of(folder) == curves_of(folder, "loss") == choices_of(folder) == []
    assert list(samples(groups_of(folder), [ONESTEP])) == []


@pytest.mark.parametrize("odd", [math.nan, math.inf, 0.0, -1.0, 1e30])
def test_odd_scores_are_drawn(two_metrics, study, odd):
    study.run("odd", "experiment=digits_ict", "metric=l2", "seed=5", seed=5, scores=(odd, odd))
    study.note()
    assert all(map(is_png, [*curves_of(two_metrics), *choices_of(two_metrics)]))


def test_scores_that_are_all_nan_have_no_curve(study):
    study.run("a", "seed=0", scores=(math.nan, math.nan))
    assert curves_of(study.note()) == []


def test_runs_that_are_not_finished_are_dashed(study):
    study.run("a", "seed=0", scores=(3.0, 2.0), state="failed")
    (curve,) = curves_of(study.note())
    assert "Dashed" in curve.caption


def test_a_grid_has_a_figure_an_axis(study):
    for metric in ("l2", "pseudo_huber"):
        for lr in (0.001, 0.01, 0.1):
            typed = (f"metric={metric}", f"optimizer.lr={lr}", "seed=0")
            study.run(f"{metric}-{lr}", *typed, metric=metric, lr=lr)
    drawn = choices_of(study.note(), ONESTEP, "fd_classifier_twostep")
    assert [picture.file for picture in drawn] == ["choice_metric", "choice_optimizer.lr"]
    assert all(map(is_png, drawn))


def test_a_search_has_a_cloud_an_axis(study):
    chance = random.Random(0)
    for trial in range(30):
        lr, start = round(10 ** chance.uniform(-4, -2), 6), chance.choice([2, 10, 20])
        study.run(f"t{trial}", f"optimizer.lr={lr}", f"curriculum.start={start}", lr=lr, start=start)
    drawn = choices_of(study.note())
    assert [picture.file for picture in drawn] == ["choice_optimizer.lr", "choice_curriculum.start"]
    assert all("other settings differ" in picture.caption for picture in drawn)


def test_variants_are_drawn_by_their_names(study):
    for c in (0.0, 0.01, 0.03):
        study.run(f"c{c}", f"variant=c{c}", "seed=0", variant=f"c{c}", metric="pseudo_huber", c=c)
    (picture,) = choices_of(study.note())
    assert picture.file == "choice_variant"
    assert is_png(picture)


def test_the_best_of_many_groups_have_colours(study):
    for index in range(20):
        study.run(f"t{index:02d}", f"optimizer.lr={index}", lr=float(index), scores=(9.0, 100.0 - index))
    assert best_groups(groups_of(study.note()), ONESTEP, 3) == ["lr=17", "lr=18", "lr=19"]
    (curve,) = curves_of(study.path)
    assert "Coloured: the best 12 of 20." in curve.caption


@pytest.mark.parametrize(
    ("values", "scale"), [([1, 19], "linear"), ([1, 21], "log"), ([0, 100], "linear"), ([-1, 100], "linear")]
)
def test_an_axis_is_logarithmic_where_the_range_is_wide(values, scale):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    set_scale(axes, "y", pd.Series(values, dtype=float))
    assert axes.get_yscale() == scale


def test_samples_side_by_side(two_metrics, study):
    for seed, colour in ((0, (200, 0, 0)), (1, (0, 0, 200))):
        study.grid(f"l2-seed{seed}", colour=colour)
        study.grid(f"pseudo_huber-seed{seed}", images_seen=100, colour=(9, 0, 9))
        study.grid(f"pseudo_huber-seed{seed}", images_seen=200, colour=(0, 200, 0))
    (picture,) = samples(groups_of(two_metrics), [ONESTEP])
    assert picture.file == "samples_onestep"
    assert is_png(picture)
    colours = {colour for _, colour in Image.open(io.BytesIO(picture.data)).convert("RGB").getcolors(1 << 20)}
    # the first seed of each, its last grid
    assert {(200, 0, 0), (0, 200, 0)} <= colours
    assert not {(0, 0, 200), (9, 0, 9)} & colours


def test_a_damaged_grid_is_passed_over(two_metrics, study):
    study.grid("l2-seed0")
    (study.path / "l2-seed0" / "samples" / "onestep_000000200.png").write_bytes(b"\x89PNG broken")
    study.grid("l2-seed1", colour=(3, 3, 3))
    (study.path / "l2-seed1" / "samples" / "notes_x.png").write_bytes(b"")
    assert all(map(is_png, samples(groups_of(two_metrics), [ONESTEP])))
    (study.path / "l2-seed1" / "samples" / "onestep_000000200.png").write_bytes(b"")
    assert list(samples(groups_of(two_metrics), [ONESTEP])) == []


def test_pictures_stay_small():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8))
    figure.add_subplot().imshow(np.random.default_rng(0).random((800, 800, 3)))
    assert len(png(figure)) <= MAX_BYTES
