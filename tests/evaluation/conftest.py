"""Cheap extractors, and an Inception with random weights in a file."""

import pytest
import torch

from consistency.evaluation.extractors import ClassifierExtractor
from consistency.evaluation.features import SmallClassifier


@pytest.fixture
def make_extractor():
    """A classifier with random weights, for 1x8x8 images and 5 classes unless told."""

    def make(channels=1, size=8, num_classes=5, seed=0):
        torch.manual_seed(seed)
        return ClassifierExtractor(SmallClassifier(channels, size, num_classes), accuracy=0.2)

    return make


@pytest.fixture
def extractor(make_extractor):
    return make_extractor()


@pytest.fixture
def random_images():
    """uint8 [count, 1, 8, 8], brighter for larger `brightness`."""

    def make(count, seed=0, brightness=256, shape=(1, 8, 8)):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(brightness, (count, *shape), generator=generator, dtype=torch.int64).to(torch.uint8)

    return make


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """torch-fidelity's Inception with random weights that keep activations alive, in a file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Fresh(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Fresh("fresh", ["2048"], path)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.nn.init.normal_(network.fc.weight, std=0.05)  # logits that differ between images
    torch.save(network.state_dict(), path)
    return path
