"""`consistency.load` and `Model` on small models: what is kept, what a seed means, what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from consistency import load, save_denoiser
from consistency.api import Model, shrink
from consistency.sampling.images import labels_of_seed, sample_images
from consistency.sampling.samplers import ConsistencySampler, OdeSampler, sample_heun


@pytest.fixture
def make_model(make_denoiser):
    def make(kind="consistency", batch_size=256, **options):
        boundary = 0.002 if kind == "consistency" else 0.0
        return Model(make_denoiser(boundary=boundary, **options), device="cpu", batch_size=batch_size)

    return make


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)


def close(some, others):
    """Equal up to a grey level here and there: other batches round otherwise."""
    assert_close(some.float(), others.float(), atol=1, rtol=0)


def test_load_takes_what_was_saved(make_denoiser, tmp_path):
    save_denoiser(make_denoiser(), tmp_path / "m", {"method": "mine"})
    model = load(tmp_path / "m", device="cpu")
    assert (model.image_shape, model.num_classes, model.is_consistency) == ((1, 4, 4), 0, True)
    assert model.info == {"method": "mine"}
    with pytest.raises(ValueError, match="no model at"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["diffusion", "consistency"])
def test_kind_decides_what_a_model_is(make_denoiser, kind):
    """Neither its boundary, which is ECT's 0 in both cases, nor the name of a method."""
    denoiser = make_denoiser(boundary=0.0)
    denoiser.kind = kind
    for method in ("EDM", "ConsistencyTraining", None):
        assert Model(denoiser, {"method": method}, device="cpu").is_consistency == (kind == "consistency")


@pytest.mark.parametrize(("kind", "steps"), [("consistency", 1), ("consistency", 2), ("diffusion", 4)])
def test_samples_are_those_of_the_command(make_model, kind, steps):
    model = make_model(kind, num_classes=3)
    sampler = ConsistencySampler([0.821][: steps - 1]) if kind == "consistency" else OdeSampler(sample_heun, steps)
    labels = labels_of_seed(7, range(6), 3)
    expected = sample_images(model.denoiser, sampler, range(6), seed=7, labels=labels)
    assert torch.equal(model.sample(6, steps=steps, seed=7), expected)
    assert model.last_evaluations == (steps if kind == "consistency" else 2 * steps - 1)
    model.batch_size = 4
    close(model.sample(6, steps=steps, seed=7), expected)


@pytest.mark.parametrize("kind", ["consistency", "diffusion"])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_inpainting_keeps_what_is_known(make_model, images, kind, num_classes):
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    model = make_model(kind, batch_size=2, num_classes=num_classes)
    filled = model.inpaint(images, mask, steps=3)
    assert torch.equal(filled[..., :2, :], images[..., :2, :])
    assert not torch.equal(filled[..., 2:, :], images[..., 2:, :])
    # What is hidden says nothing, not even of the label; a mask for each image is its own.
    other = images.clone()
    other[..., 2:, :] = 0
    assert torch.equal(model.inpaint(other, mask, steps=3), filled)
    masks = torch.ones(5, 1, 4, 4)
    masks[3, 0] = mask.float()
    some = model.inpaint(images, masks, steps=3)
    assert torch.equal(some[[0, 1, 2, 4]], images[[0, 1, 2, 4]])
    assert torch.equal(some[3], filled[3])


def test_colours_keep_their_luma_and_patches_their_mean(make_model):
    # In every pixel and patch of the finished images, though random networks leave [-1, 1] everywhere.
    model = make_model(in_channels=3)
    colour = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    weights = torch.tensor([0.2989, 0.5870, 0.1140])[:, None, None]
    edited = model.colorize(colour, steps=2)
    assert ((edited.float() - colour.float()) * weights).sum(1).abs().max() < 2  # rounding of three channels
    assert (edited.float() - colour.float()).abs().mean() > 5
    small = shrink(colour, 2)
    large = model.superresolve(small, 2, steps=2)
    assert (torch.nn.functional.avg_pool2d(large.float(), 2) - small.float()).abs().max() < 2
    assert (large.float() - colour.float()).abs().mean() > 5


def test_grey_models_do_not_colorize(make_model, images):
    with pytest.raises(ValueError, match="colour images"):
        make_model().colorize(images)


def test_strokes_have_the_papers_levels(make_model, images):
    model = make_model()
    for size, expected in ((256, [5.38, 2.24]), (4, [5.38 * 4 / 256, 2.24 * 4 / 256])):
        model.denoiser.network.image_size = size
        assert_close(torch.tensor(model._stroke_levels(None)["levels"]), torch.tensor(expected))
    model.stroke(images, 2.0, steps=2)  # two are those of the paper, asked for or not
    assert model.last_levels == pytest.approx([2.0, 2.0 * 2.24 / 5.38])
    model.stroke(images, 2.0, steps=3)
    assert (model.last_levels[0], len(model.last_levels)) == (2.0, 3)
    model.stroke(images, 0.003)  # the second would be below sigma_min
    assert model.last_levels == [0.003]


def test_edits_follow_the_papers_grid(make_model, images):
    model = make_model()
    model.inpaint(images, torch.ones(4, 4))
    # N = 40, from the largest level down, without sigma_min.
    assert len(model.last_levels) == model.last_evaluations == 39
    assert model.last_levels[0] == 80
    assert model.last_levels[16] == pytest.approx(5.38000, rel=1e-5)
    assert model.last_levels[20] == pytest.approx(2.2404398, rel=1e-6)


def test_denoising_is_one_evaluation_at_that_level(make_model, images, record):
    model = make_model()
    calls = record(model.denoiser)
    result = model.denoise(images, 0.7, seed=3)
    assert len(calls) == 1
    assert (calls[0].sigma == 0.7).all()
    noisy = model.noisy(images, 0.7, seed=3)
    assert torch.equal(calls[0].x, noisy)
    assert float((noisy - (images.float() / 127.5 - 1)).std()) == pytest.approx(0.7, abs=0.15)
    close(model.denoise(noisy, 0.7), result)  # floats are noisy already


def test_denoising_obeys_labels_and_guidance(make_model, images):
    model = make_model(num_classes=3, label_dropout=0.1)
    results = [model.denoise(images, 1.0, labels=label) for label in (0, 1, -1)]
    results += [model.denoise(images, 1.0), model.denoise(images, 1.0, labels=0, guidance=3.0)]
    assert model.last_evaluations == 2
    assert torch.equal(results[2], results[3])
    for a, b in ((0, 1), (0, 2), (0, 4)):
        assert not torch.equal(results[a], results[b])
    with pytest.raises(ValueError, match="need labels"):
        make_model(num_classes=3).denoise(torch.randn(2, 1, 4, 4), 1.0)


def test_interpolation_ends_at_the_two_seeds(make_model):
    model = make_model(num_classes=3)
    strip = model.interpolate(4, 9, 5, labels=1)
    close(strip[:1], model.sample(1, seed=4, labels=1))
    close(strip[-1:], model.sample(1, seed=9, labels=1))
    close(model.interpolate(4, 9, places=[0.25], labels=1), strip[1:2])


def test_diffusion_models_encode_images_exactly(make_model, images):
    model = make_model("diffusion")
    strip = model.morph(images[:2], 3, steps=60)
    assert model.last_evaluations == 2 * 59 + 2 * 60 - 1  # up and down
    model.sample(1, steps=2)
    assert model.last_evaluations == 3
    # The way up and down again, by Heun's method.
    assert (strip[[0, 2]].float() - images[:2].float()).abs().mean() < 6
    both = make_model("diffusion", num_classes=3).morph(images[:2], 3, steps=60, labels=[0, 2])
    assert (both[[0, 2]].float() - images[:2].float()).abs().mean() < 6  # with the label of each end, there and back
    blended = make_model().morph(images[:2], 3, sigma=0.003)
    close(blended[[0, 2]], images[:2])


def test_strips_share_their_noise(make_model, images):
    # Otherwise neighbours would differ by more than their place.
    model = make_model()
    same = images[:1].expand(2, -1, -1, -1)
    for strip in (model.morph(same, 3, sigma=1.0), model.interpolate(4, 4, 3, steps=2)):
        close(strip, strip[:1].expand(3, -1, -1, -1))


def test_guidance_of_an_edit_has_a_label_to_follow(make_model, images, record):
    model = make_model("diffusion", num_classes=3, label_dropout=0.1)
    calls = record(model.denoiser)
    model.inpaint(images, torch.zeros(4, 4), steps=2, guidance=4.0)
    assert (calls[-1].labels >= 0).all()
    assert model.last_evaluations == 9 + 6  # the guess of the label, and the edit
    assert len(model.last_labels) == 5
    with pytest.raises(ValueError, match="needs labels"):
        model.sample(2, labels=-1, guidance=4.0, steps=2)


def test_labels_of_edits(make_model, images, record):
    free = make_model(num_classes=3, label_dropout=0.1)
    calls = record(free.denoiser)
    free.stroke(images)
    assert all((call.labels == -1).all() for call in calls)
    free.translate(images, [0, 2], sigma=1.0)
    assert calls[-1].labels.tolist() == [0, 2, 0, 2, 0]
    bound = make_model(num_classes=3)
    calls = record(bound.denoiser)
    bound.stroke(images)
    assert len(calls) == 9 + 2  # three levels of three labels, to guess them
    assert (calls[-1].labels >= 0).all()
    with pytest.raises(ValueError, match="labels must be"):
        bound.stroke(images, labels=-1)
    free.stroke(images, labels=[-1, 2])
    with pytest.raises(ValueError, match="7 labels"):
        free.stroke(images, labels=[1] * 7)


def test_guidance_and_composition(make_model):
    model = make_model("diffusion", num_classes=3, label_dropout=0.1)
    assert not torch.equal(model.sample(4, steps=3, guidance=4.0), model.sample(4, steps=3))
    assert model.last_evaluations == 5
    model.sample(4, steps=3, guidance=4.0)
    assert model.last_evaluations == 10
    upright = model.anagram(0, 1, 2, steps=3)
    assert upright.shape == (2, 1, 4, 4)
    assert model.last_evaluations == 10
    assert not torch.equal(upright, model.anagram(0, 2, 2, steps=3))
    assert not torch.equal(model.hybrid(0, 1, 2, steps=3), model.hybrid(1, 0, 2, steps=3))
    with pytest.raises(ValueError, match="turn is spin"):
        model.anagram(0, 1, turn="spin")


def test_pictures_of_pil_are_taken(make_model):
    picture = Image.fromarray(np.full((4, 4, 3), 200, dtype=np.uint8))
    assert make_model().images(picture).tolist() == [[[[200] * 4] * 4]]
    assert make_model(in_channels=3).images(picture).shape == (1, 3, 4, 4)


WRONG = {
    "floats": (lambda m, x: m.stroke(x.float()), "uint8"),
    "size": (lambda m, x: m.stroke(x[..., :3, :3]), "4 x 4"),
    "channels": (lambda m, x: m.stroke(x.expand(-1, 3, -1, -1)), r"\[N, 1, 4, 4\]"),
    "mask": (lambda m, x: m.inpaint(x, torch.ones(2, 2)), "the mask is"),
    "masks": (lambda m, x: m.inpaint(x, torch.ones(3, 1, 4, 4)), "the mask is"),
    "none": (lambda m, x: m.sample(0), "at least 1"),
    "seed": (lambda m, x: m.sample(1, seed=-1), "seed"),
    "step": (lambda m, x: m.sample(1, steps=1, levels=[80.0]), "not both"),
    "named": (lambda m, x: m.inpaint(x, "left"), "named_mask"),
    "pictures": (lambda m, x: m.interpolate(x, x), "two seeds"),
    "infinite": (lambda m, x: m.sample(1, guidance=float("nan")), "finite"),
    "both": (lambda m, x: m.stroke(x, 1.0, levels=[3.0]), "not both"),
    "factor": (lambda m, x: m.superresolve(x, 3), r"\[2, 4\]"),
    "sigma": (lambda m, x: m.stroke(x, 81.0), "at most 80"),
    "levels": (lambda m, x: m.stroke(x, levels=[1.0, 2.0]), "decrease"),
    "steps": (lambda m, x: m.inpaint(x, torch.ones(4, 4), steps=0), "steps"),
    "labels": (lambda m, x: m.sample(2, labels=1), "unconditional"),
    "guidance": (lambda m, x: m.sample(2, guidance=2.0), "guidance"),
    "anagram": (lambda m, x: m.anagram(0, 1), "unconditional"),
    "two": (lambda m, x: m.morph(x, 3), "two images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_in_one_line(make_model, images, case):
    call, words = WRONG[case]
    with pytest.raises(ValueError, match=words) as error:
        call(make_model(), images)
    assert "\n" not in str(error.value)
