"""Figures: which there are, of what size, and that odd numbers do not break them."""

import io
import math
import random

import pytest
from PIL import Image

from consistency.report.choices import choices_of, draw_choice
from consistency.report.figures import MAX_BYTES, draw_loss, draw_quality, featured, set_scale, smaller
from consistency.report.groups import make_groups
from consistency.report.samples import draw_samples, samplers_of
from consistency.report.study import read_study

ONESTEP = "fd_classifier_onestep"


def groups_of(folder):
    return make_groups(read_study(folder).runs)


def is_png(picture):
    image = Image.open(io.BytesIO(picture.data))
    image.load()
    return image.format == "PNG" and len(picture.data) < MAX_BYTES


def test_curves(two_metrics):
    groups = groups_of(two_metrics)
    assert is_png(draw_quality(groups, ONESTEP, "a.png"))
    loss = draw_loss(groups, "b.png")
    assert is_png(loss)
    assert "N(k)" in loss.caption


def test_nothing_to_draw_is_no_picture(study):
    study.run("a", "seed=0", scores=(3.0,))
    (study.path / "a" / "metrics.csv").unlink()
    groups = groups_of(study.note(("b", ["seed=1"])))
    assert draw_quality(groups, ONESTEP, "a.png") is None
    assert draw_loss(groups, "a.png") is None
    assert choices_of(groups, ONESTEP) == []
    assert samplers_of(groups) == []


@pytest.mark.parametrize("odd", [math.nan, math.inf, 0.0, -1.0, 1e30])
def test_odd_scores_are_drawn(two_metrics, study, odd):
    study.run("odd", "experiment=digits_ict", "metric=l2", "seed=5", seed=5, scores=(odd, odd))
    groups = groups_of(study.note())
    assert is_png(draw_quality(groups, ONESTEP, "a.png"))
    (choice,) = choices_of(groups, ONESTEP)
    assert is_png(draw_choice(choice, [ONESTEP], "a.png"))


def test_scores_that_are_all_nan_have_no_curve(study):
    study.run("a", "seed=0", scores=(math.nan, math.nan))
    assert draw_quality(groups_of(study.note()), ONESTEP, "a.png") is None


def test_a_grid_has_a_figure_an_axis(study):
    for metric in ("l2", "pseudo_huber"):
        for lr in (0.001, 0.01, 0.1):
            typed = (f"metric={metric}", f"optimizer.lr={lr}", "seed=0")
            study.run(f"{metric}-{lr}", *typed, metric=metric, lr=lr)
    choices = choices_of(groups_of(study.note()), ONESTEP)
    assert [choice.name for choice in choices] == ["metric", "optimizer.lr"]
    assert choices[1].values[:3] == ["0.001", "0.01", "0.1"]
    assert set(choices[1].series) == {"metric=l2", "metric=pseudo_huber"}
    assert all(is_png(draw_choice(choice, [ONESTEP, "fd_classifier_twostep"], "a.png")) for choice in choices)


def test_a_search_has_a_cloud_an_axis(study):
    chance = random.Random(0)
    for trial in range(30):
        lr, start = round(10 ** chance.uniform(-4, -2), 6), chance.choice([2, 10, 20])
        study.run(f"t{trial}", f"optimizer.lr={lr}", f"curriculum.start={start}", lr=lr, start=start)
    choices = choices_of(groups_of(study.note()), ONESTEP)
    assert [(choice.name, choice.is_grid) for choice in choices] == [
        ("optimizer.lr", False),
        ("curriculum.start", False),
    ]
    assert is_png(draw_choice(choices[0], [ONESTEP], "a.png"))


def test_variants_of_one_number_are_drawn_against_it(study):
    for c in (0.0, 0.01, 0.03):
        study.run(f"c{c}", f"variant=c{c}", "seed=0", variant=f"c{c}", metric="pseudo_huber", c=c)
    (choice,) = choices_of(groups_of(study.note()), ONESTEP)
    assert (choice.name, choice.values) == ("metric.c", ["0", "0.01", "0.03"])


def test_the_best_of_many_groups_are_featured(study):
    for index in range(20):
        study.run(f"t{index:02d}", f"optimizer.lr={index}", lr=float(index), scores=(9.0, 100.0 - index))
    groups = groups_of(study.note())
    assert [group.runs[0].folder for group in featured(groups, ONESTEP, 3)] == ["t17", "t18", "t19"]
    assert is_png(draw_quality(groups, ONESTEP, "a.png"))


@pytest.mark.parametrize(
    ("values", "scale"), [([1, 19], "linear"), ([1, 21], "log"), ([0, 100], "linear"), ([-1, 100], "linear")]
)
def test_an_axis_is_logarithmic_where_the_range_is_wide(values, scale):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    set_scale(axes, "y", values)
    assert axes.get_yscale() == scale


def test_samples_side_by_side(two_metrics, study):
    for seed, colour in ((0, (200, 0, 0)), (1, (0, 0, 200))):
        study.grid(f"l2-seed{seed}", colour=colour)
        study.grid(f"pseudo_huber-seed{seed}", images_seen=100, colour=(9, 0, 9))
        study.grid(f"pseudo_huber-seed{seed}", images_seen=200, colour=(0, 200, 0))
    groups = groups_of(two_metrics)
    assert samplers_of(groups) == ["onestep"]
    picture = draw_samples(groups, "onestep", ONESTEP, "samples.png")
    assert is_png(picture)
    colours = {colour for _, colour in Image.open(io.BytesIO(picture.data)).convert("RGB").getcolors(1 << 20)}
    # the first seed of each, its last grid
    assert {(200, 0, 0), (0, 200, 0)} <= colours
    assert not {(0, 0, 200), (9, 0, 9)} & colours
    assert "first 4 samples" in picture.caption


def test_a_damaged_grid_is_passed_over(two_metrics, study):
    study.grid("l2-seed0")
    (study.path / "l2-seed0" / "samples" / "onestep_000000200.png").write_bytes(b"\x89PNG broken")
    study.grid("l2-seed1", colour=(3, 3, 3))
    (study.path / "l2-seed1" / "samples" / "notes_x.png").write_bytes(b"")
    assert is_png(draw_samples(groups_of(two_metrics), "onestep", ONESTEP, "samples.png"))
    (study.path / "l2-seed1" / "samples" / "onestep_000000200.png").write_bytes(b"")
    assert draw_samples(groups_of(two_metrics), "onestep", ONESTEP, "samples.png") is None


@pytest.mark.slow
def test_pictures_stay_small():
    noise = random.Random(0).randbytes(600 * 600 * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (600, 600), noise).save(buffer, format="PNG")
    assert len(buffer.getvalue()) > 1_000_000
    assert len(smaller(buffer.getvalue())) <= MAX_BYTES
