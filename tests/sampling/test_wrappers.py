import pytest
import torch
from torch.testing import assert_close

from consistency.sampling import wrappers
from consistency.sampling.labels import guess_labels

X, SIGMA = torch.randn(3, 1, 4, 4), torch.tensor([0.5, 1.0, 2.0])
A, B = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0])


@pytest.fixture
def model(make_denoiser):
    return make_denoiser(boundary=0.0, num_classes=3, label_dropout=0.1).eval()


def test_guidance_goes_from_no_label_past_the_label(model):
    none = model(X, SIGMA, torch.full_like(A, -1))
    labelled = model(X, SIGMA, A)
    assert wrappers.guided(model, 1) is model
    assert_close(wrappers.guided(model, 0)(X, SIGMA, A), none)
    assert_close(wrappers.guided(model, 3)(X, SIGMA, A), 3 * labelled - 2 * none)
    assert (none - labelled).abs().max() > 1e-3
    # No label, guided, is no label.
    assert_close(wrappers.guided(model, 3)(X, SIGMA, torch.full_like(A, -1)), none)
    assert wrappers.guided(model, 3).image_shape == model.image_shape


@pytest.mark.parametrize(("options", "words"), [({}, "no labels"), ({"num_classes": 3}, "never saw")])
def test_models_that_cannot_be_guided_are_refused(make_denoiser, options, words):
    with pytest.raises(ValueError, match=words):
        wrappers.guided(make_denoiser(**options), 2.0)


@pytest.mark.parametrize("turn", [wrappers.flip, wrappers.mirror, wrappers.rotate])
def test_anagram_turned_is_the_anagram_of_the_other_label(model, turn):
    assert_close(turn(turn(X)), X)
    assert not torch.equal(turn(X), X)
    upright, turned = wrappers.anagram(model, B, turn), wrappers.anagram(model, A, turn)
    assert_close(turn(upright(turn(X), SIGMA, A)), turned(X, SIGMA, B))
    assert_close(upright(X, SIGMA, A), (model(X, SIGMA, A) + turn(model(turn(X), SIGMA, B))) / 2)


def test_hybrid_takes_low_frequencies_of_one_and_high_of_the_other(model):
    assert_close(wrappers.hybrid(model, A, 1.0)(X, SIGMA, A), model(X, SIGMA, A))
    mixed = wrappers.hybrid(model, B, 1.0)(X, SIGMA, A)
    far, near = model(X, SIGMA, A), model(X, SIGMA, B)
    assert_close(mixed, wrappers.low_pass(far, 1.0) + near - wrappers.low_pass(near, 1.0))
    assert (mixed - (wrappers.low_pass(near, 1.0) + far - wrappers.low_pass(far, 1.0))).abs().max() > 1e-3


def test_low_pass_keeps_the_mean_level_and_takes_the_finest_pattern_away():
    assert_close(wrappers.low_pass(torch.ones(1, 3, 4, 4), 1.0), torch.ones(1, 3, 4, 4))
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]
    assert wrappers.low_pass(board, 1.0).abs().max() < 0.05
    # The two axes are blurred alike.
    image = torch.randn(1, 1, 8, 8)
    assert_close(wrappers.low_pass(image.mT, 0.7), wrappers.low_pass(image, 0.7).mT)


def test_label_is_guessed_by_what_explains_the_known_part():
    class Model:
        """Draws a constant image, its label."""

        num_classes = 3

        def __call__(self, x, sigma, labels):
            return labels.float().view(-1, 1, 1, 1).expand_as(x)

    images = torch.tensor([2.0, 0.0, 1.0]).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    assert guess_labels(Model(), images, lambda x: images, torch.randn_like).tolist() == [2, 0, 1]
    # Where half is known, that half decides.
    known = torch.tensor([[True, True], [False, False]])
    half = torch.where(known, images, -9.0)
    assert guess_labels(Model(), half, lambda x: torch.where(known, images, x), torch.randn_like).tolist() == [2, 0, 1]
    Model.num_classes = 1000
    with pytest.raises(ValueError, match="labels="):
        guess_labels(Model(), images, lambda x: images, torch.randn_like)
