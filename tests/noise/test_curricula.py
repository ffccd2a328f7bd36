import math

import pytest

from consistency.noise.curricula import (
    AdaptiveDecay,
    CosineLevels,
    DoublingLevels,
    FixedDecay,
    FixedLevels,
    LinearLevels,
    SqrtLevels,
    SquareLevels,
)

CIFAR = SqrtLevels(start=2, end=150, total_steps=800_000)
IMAGENET = SqrtLevels(start=2, end=200, total_steps=800_000)
LSUN = SqrtLevels(start=2, end=150, total_steps=1_000_000)
GROWING = [SqrtLevels, DoublingLevels, LinearLevels, SquareLevels, CosineLevels]


# Made by running create_ema_and_scales_fn of openai/consistency_models.
@pytest.mark.parametrize(
    ("curriculum", "values"),
    [
        (CIFAR, {0: 2, 1: 3, 1000: 6, 10_000: 17, 200_000: 76, 400_000: 107, 799_999: 151, 800_000: 151}),
        (IMAGENET, {0: 2, 1: 3, 100: 4, 1000: 8, 10_000: 23, 200_000: 101, 400_000: 143, 799_999: 201, 800_000: 201}),
        (LSUN, {0: 2, 1: 3, 1000: 6, 10_000: 16, 250_000: 76, 500_000: 107, 999_999: 151, 1_000_000: 151}),
    ],
    ids=["cifar", "imagenet", "lsun"],
)
def test_sqrt_levels_match_openai(curriculum, values):
    assert {step: curriculum(step) for step in values} == values


# iCT, Fig. 3 and Eq. 9: 10, 20, ..., 1280 gaps.
@pytest.mark.parametrize("stage", range(8))
def test_doubling_levels_of_ict(stage):
    curriculum = DoublingLevels(start=10, end=1280, total_steps=400_000)
    assert curriculum.steps_per_stage == 50_000
    num_levels = 10 * 2**stage + 1
    assert curriculum(50_000 * stage) == num_levels
    assert curriculum(50_000 * stage + 49_999) == num_levels


def test_doubling_levels_of_ict_on_imagenet():
    curriculum = DoublingLevels(start=10, end=1280, total_steps=800_000)
    assert (curriculum(699_999), curriculum(700_000)) == (641, 1281)


def test_doubling_between_powers_of_two():
    # floor(50 / 10) = 5 is floored before its logarithm, the logarithm itself is not.
    curriculum = DoublingLevels(start=10, end=59, total_steps=1000)
    assert curriculum.steps_per_stage == math.floor(1000 / (math.log2(5) + 1)) == 301
    assert [curriculum(step) for step in (0, 300, 301, 602, 903)] == [11, 11, 21, 41, 60]


@pytest.mark.parametrize("total_steps", range(1, 9))
def test_doubling_survives_runs_shorter_than_its_stages(total_steps):
    curriculum = DoublingLevels(start=10, end=1280, total_steps=total_steps)
    assert curriculum.steps_per_stage == 1
    assert [curriculum(step) for step in (0, 1, 7, 8)] == [11, 21, 1281, 1281]


@pytest.mark.parametrize("kind", GROWING)
def test_stays_at_its_last_value_past_the_end(kind):
    curriculum = kind(start=10, end=1280, total_steps=100)
    assert {curriculum(step) for step in (100, 101, 10_000, 10**12)} == {1281}


@pytest.mark.parametrize("kind", GROWING)
def test_grows_from_start_to_end(kind):
    values = [kind(start=4, end=64, total_steps=40)(step) for step in range(41)]
    assert values[0] == 4 + (kind is not SqrtLevels)  # ceil(4 - 1) + 1: the square root starts at s0 points
    assert values[-1] == 65
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(LinearLevels, [11, 33, 56, 101]), (SquareLevels, [11, 16, 34, 101]), (CosineLevels, [11, 24, 57, 101])],
)
def test_other_shapes(kind, expected):
    curriculum = kind(start=10, end=100, total_steps=100)
    assert [curriculum(step) for step in (0, 25, 51, 100)] == expected


def test_fixed_levels():
    assert {FixedLevels(18)(step) for step in (0, 1, 10**9)} == {18}


# (steps, code, paper): the code divides by the gaps, the paper by the points.
@pytest.mark.parametrize(
    ("levels", "mu0", "step", "code", "paper"),
    [
        (CIFAR, 0.9, 0, 0.81, 0.9),
        (CIFAR, 0.9, 1, 0.9, 0.932170),
        (CIFAR, 0.9, 10_000, 0.986916, 0.987681),
        (CIFAR, 0.9, 800_000, 0.998596, 0.998605),
        (IMAGENET, 0.95, 0, 0.9025, 0.95),
        (IMAGENET, 0.95, 1, 0.95, 0.966383),
        (IMAGENET, 0.95, 10_000, 0.995348, 0.995550),
        (IMAGENET, 0.95, 800_000, 0.999487, 0.999490),
    ],
)
def test_adaptive_decay(levels, mu0, step, code, paper):
    assert AdaptiveDecay(levels, start=2, decay=mu0)(step) == pytest.approx(code, abs=6e-7)
    assert AdaptiveDecay(levels, start=2, decay=mu0, per_gap=False)(step) == pytest.approx(paper, abs=6e-7)


def test_adaptive_decay_follows_its_curriculum_past_the_end():
    decay = AdaptiveDecay(CIFAR, start=2, decay=0.9)
    assert decay(10**9) == decay(800_000)


def test_fixed_decay():
    assert {FixedDecay(0.95)(step) for step in (0, 10**9)} == {0.95}


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_refuses_decays_outside_their_range(decay):
    with pytest.raises(ValueError, match="target decay"):
        FixedDecay(decay)
    with pytest.raises(ValueError, match="target decay"):
        AdaptiveDecay(CIFAR, start=2, decay=decay)


def test_adaptive_decay_refuses_zero():
    with pytest.raises(ValueError, match="target_decay=null"):
        AdaptiveDecay(CIFAR, start=2, decay=0)


@pytest.mark.parametrize("kind", GROWING)
@pytest.mark.parametrize(("start", "end", "total_steps"), [(0, 10, 10), (11, 10, 10), (1, 10, 0)])
def test_refuses_impossible_curricula(kind, start, end, total_steps):
    with pytest.raises(ValueError, match="curriculum needs"):
        kind(start=start, end=end, total_steps=total_steps)


def test_refuses_fewer_than_two_levels():
    with pytest.raises(ValueError, match="at least 2"):
        FixedLevels(1)
