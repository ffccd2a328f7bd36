import pytest
import torch

from consistency.data.datasets import digits
from consistency.evaluation.features import SmallClassifier, classifier_moments, train_classifier
from consistency.evaluation.scores import frechet_distance


@pytest.fixture(scope="module")
def data():
    return digits(limit=300)


@pytest.fixture(scope="module")
def trained(data):
    return train_classifier(data.images, data.labels, epochs=2)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_learns(trained):
    model, accuracy = trained
    assert 0.2 < accuracy <= 1  # chance is 0.1
    assert not model.training


def test_function_of_the_seed_alone(data, trained):
    torch.manual_seed(99)
    again, accuracy = train_classifier(data.images, data.labels, epochs=2)
    assert torch.equal(weights(again), weights(trained[0]))
    assert accuracy == trained[1]
    other, _ = train_classifier(data.images[:64], data.labels[:64], epochs=1, seed=1)
    same, _ = train_classifier(data.images[:64], data.labels[:64], epochs=1, seed=0)
    assert not torch.equal(weights(other), weights(same))


def test_random_state_stays(data):
    before = torch.get_rng_state()
    train_classifier(data.images[:64], data.labels[:64], epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 12)])
def test_shapes(channels, size):
    model = SmallClassifier(channels, size, num_classes=5)
    images = torch.randint(256, (4, channels, size, size), dtype=torch.uint8)
    assert model.features(images).shape == (4, 64)
    assert model(images).shape == (4, 5)
    assert torch.equal(model(images), model.head(model.features(images)))


def test_moments_do_not_depend_on_the_batch(data, trained):
    model, _ = trained
    whole, parts = (classifier_moments(model, data.images[:100], batch_size) for batch_size in (512, 33))
    assert whole.count == parts.count == 100
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-4, atol=1e-5)
    assert not whole.mean.requires_grad


def test_noise_is_further_away_than_digits(data, trained):
    model, _ = trained
    one, other = (classifier_moments(model, images) for images in data.images.split(150))
    noise = classifier_moments(model, torch.randint(256, (150, 1, 8, 8), dtype=torch.uint8))
    assert frechet_distance(one, other) < 0.2 * frechet_distance(one, noise)
