"""The same images and the same extractor in torch-fidelity and torchmetrics."""

import pytest
import torch

from consistency.data.datasets import digits
from consistency.evaluation.extractors import ClassifierExtractor, Inception, extract
from consistency.evaluation.features import train_classifier
from consistency.evaluation.measure import measure
from consistency.evaluation.references import compute_reference
from consistency.evaluation.scores import frechet_distance, kernel_distance, precision_recall
from consistency.evaluation.statistics import FeatureMoments

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
REL = 1e-6
KEYS = {
    "fd": "frechet_inception_distance",
    "kd": "kernel_inception_distance_mean",
    "kd_std": "kernel_inception_distance_std",
    "is": "inception_score_mean",
    "is_std": "inception_score_std",
    "precision": "precision",
    "recall": "recall",
}


class Images(torch.utils.data.Dataset):
    """torch-fidelity takes datasets of bare tensors."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def theirs(generated, real, **options):
    import torch_fidelity

    plain = {"cuda": False, "verbose": False, "cache": False, "save_cpu_ram": True, "fid": True, "isc": True}
    return torch_fidelity.calculate_metrics(
        input1=Images(generated), input2=Images(real), kid=True, prc=True, **(plain | options)
    )


def ours(generated, real, extractor, tmp_path, **options):
    """Scores under the names of `METRICS`."""
    reference = compute_reference(
        real.split(64),
        id="real",
        count=len(real),
        extractor=extractor,
        keep_features=True,
        cache_dir=tmp_path,
        content_digest="real",
    )
    indices = torch.arange(len(generated)).split(64)
    batches = [(generated[i], i) for i in indices]
    scores = measure(
        batches,
        total=len(generated),
        extractor=extractor,
        reference=reference,
        metrics=("fd", "kd", "is", "precision", "recall"),
        allow_few=True,
        **options,
    )
    return dict(zip(KEYS, scores.values(), strict=True))


def assert_equal(scores, expected):
    """To 1e-6 relative; the spread of KID to 1e-6 of its mean, whose rounding in float32 it inherits."""
    for name, value in scores.items():
        absolute = REL * expected[KEYS["kd"]] if name == "kd_std" else 0
        assert value == pytest.approx(expected[KEYS[name]], rel=REL, abs=absolute), name


@pytest.fixture(scope="module")
def classifier():
    """Trained a little: dead units and a structure as in real life."""
    data = digits()
    return ClassifierExtractor(*train_classifier(data.images, data.labels, epochs=2))


@pytest.fixture(scope="module")
def samples():
    """Digits with much noise and clean ones: float32 sums, which others use, agree to 1e-6 for large distances only."""
    images = digits().images
    noise = 90 * torch.randn(900, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return (images[:900] + noise).round().clamp(0, 255).to(torch.uint8), images[900:]


def register(extractor):
    """The classifier as an extractor of torch-fidelity."""
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.inner = extractor

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            both = dict(zip(("features", "logits"), self.inner(images), strict=True))
            return tuple(both[name] for name in self.features_list)

    FEATURE_EXTRACTORS_REGISTRY.pop("small-classifier", None)
    register_feature_extractor("small-classifier", Registered)


def test_classifier_against_torch_fidelity(classifier, samples, tmp_path):
    register(classifier)
    expected = theirs(*samples, feature_extractor="small-classifier", kid_subset_size=500)
    scores = ours(*samples, classifier, tmp_path, kid_subset_size=500)
    assert_equal(scores, expected)
    assert 0 < scores["precision"] < 1  # neither is a trivial case
    assert 0 < scores["recall"] < 1


def test_equal_precision_agrees_to_more_digits(classifier, samples):
    # torch-fidelity takes means and sums kernels in float32; given float64 features it does not.
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    generated, real = (extract(classifier, images)[0].double() for images in samples)
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (generated, real)), verbose=False)
    distance = frechet_distance(*(FeatureMoments(64).add(features) for features in (generated, real)))
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-9)
    expected = kid_features_to_metric(generated, real, kid_subsets=10, kid_subset_size=300, verbose=False)
    mean, std = kernel_distance(generated, real, subsets=10, subset_size=300)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-11)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)
    assert precision_recall(generated, real) == pytest.approx(calculate_precision_recall_part(generated, real))


def test_classifier_against_torchmetrics(classifier, samples, tmp_path):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = 64

        def forward(self, images):
            return extract(classifier, images)[0]

    metric = FrechetInceptionDistance(feature=Features(), input_img_size=(1, 8, 8))
    for images, real in zip(samples, (False, True), strict=True):
        for batch in images.split(64):
            metric.update(batch, real=real)
    scores = ours(*samples, classifier, tmp_path, kid_subset_size=500)
    # torchmetrics returns float32.
    assert scores["fd"] == pytest.approx(metric.compute().item(), rel=REL)


def test_inception_against_torch_fidelity(inception_file, tmp_path):
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(256, (14, 3, 8, 8), generator=generator).to(torch.uint8)
    generated = torch.randint(30, (12, 3, 8, 8), generator=generator).to(torch.uint8)
    options = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(inception_file)}
    expected = theirs(generated, real, kid_subset_size=10, **options)
    scores = ours(generated, real, Inception(inception_file), tmp_path, kid_subset_size=10)
    assert_equal(scores, expected)
