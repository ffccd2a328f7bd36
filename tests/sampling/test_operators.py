import math

import pytest
import torch
from torch.testing import assert_close

from consistency.sampling import operators
from consistency.sampling.samplers import sample_heun, sample_multistep
from consistency.sampling.wrappers import with_replacement


def orthogonal(first):
    """An orthogonal matrix whose first column is `first`, as the paper's code makes it: QR, and the sign put right."""
    matrix = torch.eye(len(first), dtype=torch.float64)
    matrix[:, 0] = first
    q, _ = torch.linalg.qr(matrix)
    return q if q[:, 0].sum() > 0 else -q


def test_grey_is_replaced_as_by_the_papers_rotation():
    luma = torch.tensor(operators.LUMA, dtype=torch.float64)
    assert_close(luma.norm(), torch.tensor(0.668510, dtype=torch.float64), atol=1e-6, rtol=0)
    q = orthogonal(luma / luma.norm())
    assert_close(q.T @ q, torch.eye(3, dtype=torch.float64))
    image, estimate = torch.randn(2, 1, 3, 5, 5, dtype=torch.float64)
    turned = torch.einsum("bchw,cd->bdhw", estimate, q)
    turned[:, 0] = torch.einsum("bchw,cd->bdhw", image, q)[:, 0]
    assert_close(operators.project_grey(image)(estimate), torch.einsum("bdhw,cd->bchw", turned, q))


@pytest.mark.parametrize("factor", [2, 4])
def test_patch_means_are_replaced_as_by_the_papers_rotation(factor):
    q = orthogonal(torch.full((factor**2,), 1 / factor, dtype=torch.float64))
    small, estimate = torch.randn(1, 1, 2, 2, dtype=torch.float64), torch.randn(1, 1, 2 * factor, 2 * factor).double()
    patches = torch.nn.functional.unfold(estimate, factor, stride=factor)  # [1, factor^2, 4]
    turned = torch.einsum("bpn,pd->bdn", patches, q)
    turned[:, 0] = factor * small.flatten(1)
    back = torch.einsum("bdn,pd->bpn", turned, q)
    expected = torch.nn.functional.fold(back, (2 * factor, 2 * factor), factor, stride=factor)
    assert_close(operators.project_means(small, factor)(estimate), expected)


def luma(x):
    return (x * torch.tensor(operators.LUMA, dtype=x.dtype)[:, None, None]).sum(1)


EDITS = {
    "inpaint": (lambda x: operators.project_pixels(x, MASK), lambda x: x * MASK),
    "colorize": (operators.project_grey, luma),
    "superresolve": (lambda x: operators.project_means(means(x), 2), lambda x: means(x)),
}
MASK = operators.named_mask("left", 4)[0]


def means(x):
    return torch.nn.functional.avg_pool2d(x, 2)


@pytest.mark.parametrize("task", EDITS)
@pytest.mark.parametrize("sampler", ["multistep", "heun"])
def test_known_part_is_kept_after_every_step(make_denoiser, task, sampler):
    make, part = EDITS[task]
    images = torch.rand(3, 3, 4, 4) * 2 - 1
    denoiser, estimates = make_denoiser(in_channels=3, boundary=0.002 if sampler == "multistep" else 0.0), []
    replace = make(images)

    def watched(x):
        assert x.abs().max() <= 1  # cut, as in the paper's code, before the known part comes back
        estimates.append(replace(x))
        return estimates[-1]

    view, noise = with_replacement(denoiser, watched), 80 * torch.randn(3, 3, 4, 4, dtype=torch.float64)
    if sampler == "multistep":
        result = sample_multistep(view, noise, torch.tensor([80.0, 5.0, 0.8]))
        assert len(estimates) == 3
    else:
        result = sample_heun(view, noise, torch.tensor([80.0, 5.0, 0.8, 0.0]))
        assert len(estimates) == 5
    for estimate in (*estimates, result.float()):
        assert_close(part(estimate), part(images), atol=1e-6, rtol=0)
    assert (result.float() - images).abs().max() > 0.1  # the rest is the model's


def test_masks_hide_what_their_name_says():
    size = 4
    top, left = operators.named_mask("top", size)[0, 0], operators.named_mask("left", size)[0, 0]
    assert not top[:2].any()
    assert top[2:].all()
    assert torch.equal(left, top.T)
    assert torch.equal(operators.named_mask("bottom", size), ~operators.named_mask("top", size))
    assert torch.equal(operators.named_mask("right", size), ~operators.named_mask("left", size))
    assert (~operators.named_mask("box", 8)).sum() == 16
    box = operators.named_mask("box", size, box=[0, 1, 2, 3])[0, 0]
    assert (~box).nonzero().min(0).values.tolist() == [0, 1]
    assert int((~box).sum()) == 6
    # Odd sizes: both halves together are the image.
    assert (operators.named_mask("top", 5) ^ operators.named_mask("bottom", 5)).all()


def test_random_masks_differ_between_images_and_follow_the_seed():
    masks = operators.named_mask("random", 16, fraction=0.25, seed=3, num_images=2)
    assert torch.equal(masks, operators.named_mask("random", 16, fraction=0.25, seed=3, num_images=2))
    assert not torch.equal(masks[0], masks[1])
    assert float(masks.float().mean()) == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("middle", {}, "mask is middle"),
        ("box", {"box": [0, 0, 9, 1]}, "not inside 8 x 8"),
        ("random", {"fraction": 2}, "2"),
    ],
)
def test_wrong_masks_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        operators.named_mask(name, 8, **options)


def test_slerp_keeps_the_length_of_noise():
    start, end = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    places = torch.linspace(0, 1, 5)
    path = operators.slerp(start, end, places)
    assert_close(path[0], start)
    assert_close(path[-1], end)
    assert float(path[2].std()) == pytest.approx(1, abs=0.05)
    assert float(((start + end) / 2).std()) == pytest.approx(math.sqrt(0.5), abs=0.05)  # the straight line shrinks
    assert_close(operators.slerp(start, start, places)[2], start)
