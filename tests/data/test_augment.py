import cmath
import math

import numpy as np
import pytest
import torch

from consistency.data.augment import (
    AugmentParameters,
    NonLeakyAugment,
    apply_parameters,
    augment_labels,
    draw_parameters,
    inverse_affine,
    lowpass,
    warp,
)

P = 0.12


def parameters(batch_size=1, **values):
    """Nothing happens, except what is named: numbers, the same for every image."""
    fields = {name: torch.zeros(batch_size) for name in AugmentParameters._fields}
    fields["shift"] = torch.zeros(batch_size, 2)
    for name, value in values.items():
        fields[name] = torch.tensor(value, dtype=torch.float32).expand_as(fields[name])
    return AugmentParameters(**fields)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def draw_many(count=20_000, probability=P):
    return draw_parameters(count, probability, torch.Generator().manual_seed(0))


def blob(x, y, height=80, width=112):
    """A round spot of radius 2, x pixels right of the centre and y pixels above it."""
    columns = torch.arange(width) - (width - 1) / 2
    rows = torch.arange(height) - (height - 1) / 2
    return torch.exp(-((columns - x) ** 2 + (rows[:, None] + y) ** 2) / 8)[None, None]


def place_of(image):
    """Centre of mass (right, up) of the middle of [1, 1, H, W], in pixels from the centre; reflections lie outside."""
    middle = image[0, 0, 12:-12, 28:-28]
    weight = middle / middle.sum()
    height, width = weight.shape
    right = (weight.sum(0) * (torch.arange(width) - (width - 1) / 2)).sum()
    up = (weight.sum(1) * ((height - 1) / 2 - torch.arange(height))).sum()
    return float(right), float(up)


# Labels: order, scale.


@pytest.mark.parametrize(
    ("happens", "label"),
    [
        ({}, [0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ({"flip_x": 1}, [1, 0, 0, 0, 0, 0, 0, 0, 0]),
        ({"flip_y": 1}, [0, 1, 0, 0, 0, 0, 0, 0, 0]),
        ({"scale": -1.5}, [0, 0, -1.5, 0, 0, 0, 0, 0, 0]),
        ({"rotation": math.pi / 2}, [0, 0, 0, -1, 1, 0, 0, 0, 0]),
        ({"rotation": -math.pi / 6}, [0, 0, 0, math.sqrt(3) / 2 - 1, -0.5, 0, 0, 0, 0]),
        ({"stretch": 2}, [0, 0, 0, 0, 0, 2, 0, 0, 0]),
        ({"stretch": 2, "direction": math.pi / 2}, [0, 0, 0, 0, 0, 0, 2, 0, 0]),
        ({"stretch": -1, "direction": math.pi / 6}, [0, 0, 0, 0, 0, -math.sqrt(3) / 2, -0.5, 0, 0]),
        ({"direction": 1}, [0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ({"shift": [0.3, -0.7]}, [0, 0, 0, 0, 0, 0, 0, 0.3, -0.7]),
    ],
)
def test_labels(happens, label):
    labels = augment_labels(parameters(2, **happens))
    assert labels.dtype == torch.float32
    torch.testing.assert_close(labels, torch.tensor([label, label], dtype=torch.float32), atol=1e-6, rtol=0)


# Draws.


def happened(drawn):
    """Whether each transform happened, bool [B] by name."""
    return {name: value.reshape(len(value), -1).any(dim=1) for name, value in drawn._asdict().items()}


def assert_rate(happened, rate):
    sigma = math.sqrt(rate * (1 - rate) / len(happened))
    assert abs(float(happened.float().mean()) - rate) < 5 * sigma


def test_frequencies():
    rates = {"flip_x": 0.5, "flip_y": P / 2, "scale": P, "rotation": P, "stretch": P, "direction": 0.5, "shift": P}
    did = happened(draw_many())
    for name, rate in rates.items():
        assert_rate(did[name], rate)
        for other in rates.keys() - {name}:
            assert_rate(did[name] & did[other], rate * rates[other])


def test_distributions():
    drawn = draw_many(probability=1)
    assert_rate(drawn.flip_y == 1, 0.5)
    for flip in drawn.flip_x, drawn.flip_y:
        assert flip.unique().tolist() == [0, 1]
    for normal in drawn.scale, drawn.stretch, drawn.shift[:, 0], drawn.shift[:, 1]:
        assert abs(float(normal.mean())) < 5 / math.sqrt(20_000)
        assert abs(float(normal.var()) - 1) < 5 * math.sqrt(2 / 20_000)
    assert abs(float((drawn.shift[:, 0] * drawn.shift[:, 1]).mean())) < 5 / math.sqrt(20_000)
    for angle in drawn.rotation, drawn.direction[drawn.direction != 0]:
        uniform = angle / math.pi
        assert -1 <= float(uniform.min()) < -0.99
        assert 0.99 < float(uniform.max()) <= 1
        assert abs(float(uniform.mean())) < 5 / math.sqrt(3 * len(uniform))
        assert abs(float((uniform**2).mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / len(uniform))


def test_one_coin_for_both_shifts():
    shift = draw_many().shift
    assert torch.equal(shift[:, 0] != 0, shift[:, 1] != 0)


def test_same_seed_same_result_and_the_global_state_stays():
    images, augment = noise(64, 3, 8, 8), NonLeakyAugment()
    before = torch.get_rng_state()
    first, second, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1])


# Which images change.


def test_without_probability_only_mirrored():
    images = noise(200, 3, 9, 8)
    out, labels = NonLeakyAugment(0)(images, torch.Generator().manual_seed(0))
    assert labels.shape == (200, 9)
    assert not labels[:, 1:].any()
    assert 60 < labels[:, 0].sum() < 140
    for image, new, label in zip(images, out, labels, strict=True):
        assert torch.equal(new, image.flip(2) if label[0] else image)


def test_images_that_are_not_warped_keep_every_bit():
    images = noise(300, 1, 8, 8)
    kept = images.clone()
    out, labels = NonLeakyAugment(P)(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, kept)  # the input is not written to
    exact = torch.ones(300, dtype=torch.bool)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        image = image.flip(2) if label[0] else image
        image = image.flip(1) if label[1] else image
        exact[i] = torch.equal(out[i], image)
    assert torch.equal(exact, ~labels[:, 2:].any(dim=1))
    assert labels[exact, 1].any()
    assert 150 < exact.sum() < 210  # 0.88^4 of 300 is 180


def test_flips_come_before_the_warp():
    images = noise(1, 1, 16, 16)
    turned = apply_parameters(images, parameters(flip_x=1, flip_y=1, rotation=0.5, shift=[0.4, 0.2]))
    assert torch.equal(turned, apply_parameters(images.flip(2, 3), parameters(rotation=0.5, shift=[0.4, 0.2])))
    mirrored = apply_parameters(images, parameters(flip_x=1))
    assert torch.equal(mirrored[0, 0, :, 0], images[0, 0, :, -1])


# Directions: a spot is followed. Places are (right, up) of the centre, the image is 112 wide and 80 high.


@pytest.mark.parametrize(
    ("happens", "start", "end"),
    [
        ({"flip_x": 1}, (6, 4), (-6, 4)),
        ({"flip_y": 1}, (6, 4), (6, -4)),
        ({"shift": [1, 0]}, (6, 4), (20, 4)),  # right by 112 / 8
        ({"shift": [0, 1]}, (6, 4), (6, -6)),  # down by 80 / 8
        ({"scale": 1}, (6, 4), (6 * 2**0.2, 4 * 2**0.2)),  # enlarges
        ({"scale": -5}, (6, 4), (3, 2)),
        ({"rotation": math.pi / 2}, (6, 0), (0, 6)),  # counter-clockwise: right to top
        ({"rotation": -math.pi / 2}, (6, 0), (0, -6)),
        ({"stretch": 5}, (6, 4), (12, 2)),  # along x
        ({"stretch": 5, "direction": math.pi / 2}, (6, 4), (3, 8)),
        ({"stretch": 5, "direction": math.pi / 4}, (3, 3), (6, 6)),  # up to the right
        ({"stretch": 5, "direction": math.pi / 4}, (3, -3), (1.5, -1.5)),
    ],
)
def test_directions(happens, start, end):
    moved = apply_parameters(blob(*start), parameters(**happens))
    assert place_of(moved) == pytest.approx(end, abs=0.03)


def test_order_of_composition():
    values = {"scale": -1.2, "rotation": 0.9, "stretch": 1.7, "direction": -0.6, "shift": [-0.5, 0.4]}
    z = complex(7, -3) * 2 ** (0.2 * -1.2) * cmath.exp(0.9j)  # scaled, turned; the imaginary part points up
    u = z * cmath.exp(0.6j)
    s = 2 ** (0.2 * 1.7)
    z = complex(s * u.real, u.imag / s) * cmath.exp(-0.6j)
    z += complex(-0.5 * 112 / 8, -0.4 * 80 / 8)
    assert place_of(apply_parameters(blob(7, -3), parameters(**values))) == pytest.approx((z.real, z.imag), abs=0.03)


def test_matrix_is_edms_product_of_inverses():
    """G_inv = scale2d_inv @ rotate2d_inv(-w) @ rotate2d_inv(r) @ scale2d_inv(s, 1 / s) @ rotate2d_inv(-r) @ shift."""

    def turn(t):
        return np.array([[np.cos(t), -np.sin(t), 0], [np.sin(t), np.cos(t), 0], [0, 0, 1]])

    drawn = draw_many(50, probability=1)
    matrices = inverse_affine(drawn, height=20, width=28)
    assert matrices.shape == (50, 2, 3)
    for i, matrix in enumerate(matrices):
        _, _, scale, w, stretch, r, (right, down) = (value[i].double().numpy() for value in drawn)
        s, s_stretch = 2 ** (0.2 * scale), 2 ** (0.2 * stretch)
        expected = np.diag([1 / s, 1 / s, 1]) @ turn(w) @ turn(-r) @ np.diag([1 / s_stretch, s_stretch, 1]) @ turn(r)
        expected = expected @ np.array([[1, 0, -right * 28 / 8], [0, 1, -down * 20 / 8], [0, 0, 1]])
        np.testing.assert_allclose(matrix, expected[:2], atol=1e-4)


# Quality of the interpolation.


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 24, 24), (2, 3, 17, 17)])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_return_the_pixels(shape, turns):
    images = noise(*shape)
    turned = apply_parameters(images, parameters(2, rotation=turns * math.pi / 2))
    torch.testing.assert_close(turned, torch.rot90(images, turns, (2, 3)), atol=0.02, rtol=0)


def test_shifts_by_whole_pixels_return_the_pixels():
    images = noise(2, 3, 16, 24)
    moved = apply_parameters(images, parameters(2, shift=[5 / 3, -1.5]))  # 5 right, 3 up
    torch.testing.assert_close(moved[:, :, :-3, 5:], images[:, :, 3:, :-5], atol=0.02, rtol=0)
    # Outside is the reflection about the centre of the border pixels.
    torch.testing.assert_close(moved[:, :, :-3, :5], images[:, :, 3:, 1:6].flip(3), atol=0.02, rtol=0)
    torch.testing.assert_close(moved[:, :, -3:, 5:], images[:, :, -4:-1, :-5].flip(2), atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (19, 26)])
def test_a_smooth_picture_is_warped_exactly(size):
    """Cosines that fit between the centres of the border pixels equal their own reflections: true everywhere."""
    height, width = size

    def picture(x, y):
        columns = torch.cos(2 * math.pi * (x / (width - 1) + 0.5))
        return columns * torch.cos(3 * math.pi * (y / (height - 1) + 0.5)) + 0.5 * columns

    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    drawn = draw_many(40, probability=1)
    matrices = inverse_affine(drawn, height, width)
    warped = warp(picture(x, y).expand(40, 1, -1, -1), matrices)
    a, b, c = (matrices[:, :, i, None, None] for i in range(3))
    source = a * x + b * y + c
    expected = picture(source[:, 0], source[:, 1])
    torch.testing.assert_close(warped[:, 0], expected, atol=0.03, rtol=0)
    assert float((warped[:, 0] - expected).square().mean().sqrt()) < 0.008


def test_brightness_is_kept():
    drawn = draw_many(16, probability=1)
    flat = torch.full((16, 3, 12, 12), 0.7)
    torch.testing.assert_close(apply_parameters(flat, drawn), flat, atol=1e-5, rtol=0)
    spot = apply_parameters(blob(2, 1), parameters(rotation=0.7, stretch=1.0, direction=0.3, shift=[0.3, 0.1]))
    assert float(spot[:, :, 12:-12, 28:-28].sum()) == pytest.approx(
        float(blob(2, 1).sum()), rel=1e-3
    )  # the area is kept


def test_each_image_has_its_own_warp():
    images, drawn = noise(6, 3, 12, 10), draw_many(6, probability=1)
    together = apply_parameters(images, drawn)
    for i in range(6):
        alone = apply_parameters(images[i : i + 1], AugmentParameters(*(value[i : i + 1] for value in drawn)))
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=0)
    only = AugmentParameters(
        *(value * (torch.arange(6) == 2).float().view(-1, *[1] * (value.ndim - 1)) for value in drawn)
    )
    mixed = apply_parameters(images, only)
    torch.testing.assert_close(mixed[2], together[2], atol=1e-5, rtol=0)
    assert torch.equal(mixed[[0, 1, 3, 4, 5]], images[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 3, 5, 31), (2, 3, 256, 256)])
def test_sizes(shape):
    images = noise(*shape)
    out, labels = NonLeakyAugment(1)(images, torch.Generator().manual_seed(3))
    assert out.shape == shape
    assert out.dtype == torch.float32
    assert labels.shape == (shape[0], 9)
    assert out.isfinite().all()
    far = apply_parameters(images, parameters(shape[0], scale=-12.0, shift=[20, -20], stretch=5.0))
    assert far.isfinite().all()
    assert float(far.abs().max()) < 2


def test_lowpass():
    taps = lowpass()
    torch.testing.assert_close(taps, taps.flip(0))
    assert float(taps.sum()) == pytest.approx(1)
    overlaps = torch.tensor([2 * float((taps[2 * k :] * taps[: 16 - 2 * k]).sum()) for k in range(8)])
    response = [overlaps[0] + 2 * sum(overlaps[k] * math.cos(k * w) for k in range(1, 8)) for w in np.linspace(0, 3.14)]
    assert max(abs(float(value) - 1) for value in response) < 0.0081


@pytest.mark.parametrize("probability", [-0.1, 1.2, float("nan")])
def test_refuses_a_probability(probability):
    with pytest.raises(ValueError, match=r"got (-0.1|1.2|nan); set data.augment.probability"):
        NonLeakyAugment(probability)
