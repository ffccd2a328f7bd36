import io
import logging
import zipfile

import numpy as np
import pytest
import torch

from consistency.evaluation.references import compute_reference, read_reference
from consistency.evaluation.statistics import FeatureMoments


class Untouchable:
    """Batches that nobody may ask for."""

    def __iter__(self):
        raise AssertionError("the cache was not used")


@pytest.fixture
def reference_of(tmp_path, extractor):
    """`compute_reference` of images with plain settings."""

    def make(images, **changes):
        batches = images.split(16) if isinstance(images, torch.Tensor) else images
        settings = {
            "id": "toy_8x8_train_40",
            "count": 40,
            "extractor": extractor,
            "keep_features": False,
            "cache_dir": tmp_path,
            "content_digest": "c0ffee" * 8,
        }
        return compute_reference(batches, **(settings | changes))

    return make


@pytest.fixture
def inception_like(extractor):
    """The toy extractor, taken for Inception."""
    extractor.name, extractor.prefix = "inception", "fid"
    return extractor


def files(folder):
    return sorted((folder / "evaluation").glob("*.safetensors"))


def test_moments_and_features(reference_of, extractor, random_images):
    images = random_images(40)
    reference = reference_of(images, keep_features=True)
    features = extractor(images)[0]
    expected = FeatureMoments(64).add(features)
    torch.testing.assert_close(reference.moments.mean, expected.mean)
    torch.testing.assert_close(reference.moments.covariance, expected.covariance)
    torch.testing.assert_close(reference.features, features)
    assert (reference.id, reference.digest, reference.count) == ("toy_8x8_train_40", "c0ffeec0ffeec0ff", 40)
    assert (reference.extractor, reference.extractor_digest) == ("classifier", extractor.digest)


def test_computed_once(reference_of, random_images):
    first = reference_of(random_images(40), keep_features=True)
    again = reference_of(Untouchable(), keep_features=True)
    assert torch.equal(again.moments.covariance, first.moments.covariance)
    assert torch.equal(again.features, first.features)
    assert reference_of(Untouchable()).features is None


def test_features_are_added_when_they_are_needed(reference_of, random_images):
    assert reference_of(random_images(40)).features is None
    assert reference_of(random_images(40), keep_features=True).features is not None
    assert reference_of(Untouchable(), keep_features=True).features is not None


@pytest.mark.parametrize(
    ("change", "named"), [({"content_digest": "beef" * 16}, "content"), ({"preprocessing": 2}, "preprocessing")]
)
def test_other_content_or_preprocessing_is_computed_and_said(
    reference_of, random_images, tmp_path, caplog, monkeypatch, change, named
):
    reference_of(random_images(40))
    if "preprocessing" in change:
        monkeypatch.setattr("consistency.evaluation.references.PREPROCESSING", 2)
        change = {}
    with caplog.at_level(logging.INFO):
        reference_of(random_images(40, seed=1), **change)
    assert f"has another {named}" in caplog.text
    assert len(files(tmp_path)) == 2


def test_other_weights_are_computed(reference_of, make_extractor, random_images, tmp_path):
    one, other = reference_of(random_images(40)), reference_of(random_images(40), extractor=make_extractor(seed=1))
    assert not torch.equal(one.moments.mean, other.moments.mean)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("position", [0, -1])
def test_damaged_cache_is_computed_anew(reference_of, random_images, tmp_path, caplog, position):
    first = reference_of(random_images(40))
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    again = reference_of(random_images(40))
    assert "is damaged" in caplog.text
    assert torch.equal(again.moments.covariance, first.moments.covariance)
    reference_of(Untouchable())


@pytest.mark.parametrize("count", [39, 41])
def test_wrong_count(reference_of, random_images, tmp_path, count):
    with pytest.raises(ValueError):
        reference_of(random_images(count))
    assert not files(tmp_path)


def test_edm_file(tmp_path, inception_like):
    mean, covariance = np.arange(64.0), np.eye(64)
    np.savez(tmp_path / "cifar10-32x32.npz", mu=mean, sigma=covariance)
    reference = read_reference(tmp_path / "cifar10-32x32.npz", inception_like)
    np.testing.assert_array_equal(reference.moments.mean, mean)
    np.testing.assert_array_equal(reference.moments.covariance, covariance)
    assert reference.moments.mean.dtype == torch.float64
    assert (reference.id, reference.count, reference.extractor_digest) == ("cifar10-32x32", None, None)
    assert len(reference.digest) == 16
    with pytest.raises(ValueError, match=r"has no images .* its features"):
        read_reference(tmp_path / "cifar10-32x32.npz", inception_like, keep_features=True)


def test_adm_file(tmp_path, inception_like, random_images, caplog):
    images = random_images(30, shape=(3, 8, 8))
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy(), "mu": np.zeros(64), "sigma": np.eye(64)}
    np.savez(tmp_path / "adm.npz", **arrays, mu_s=np.zeros(5), sigma_s=np.eye(5))
    with caplog.at_level(logging.INFO):
        reference = read_reference(tmp_path / "adm.npz", inception_like)
    assert "spatial moments mu_s, sigma_s (of sFID) are not used" in caplog.text
    assert reference.moments.covariance.trace() == 64  # as stated, like ADM's evaluator
    with_features = read_reference(tmp_path / "adm.npz", inception_like, keep_features=True, batch_size=7)
    torch.testing.assert_close(with_features.features, inception_like(images)[0])
    assert with_features.moments.covariance.trace() == 64


def test_images_of_a_file_serve_any_extractor(tmp_path, extractor, random_images):
    images = random_images(30)
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), mu=np.zeros(2048), sigma=np.eye(2048))
    reference = read_reference(path, extractor)
    expected = FeatureMoments(64).add(extractor(images)[0])
    torch.testing.assert_close(reference.moments.covariance, expected.covariance)
    assert (reference.count, reference.extractor_digest) == (30, extractor.digest)


def save_pickle(path):
    np.savez(path, mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(2))


def save_truncated(path):
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
    path.write_bytes(path.read_bytes()[:-50])


def save_npy(path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    path.write_bytes(buffer.getvalue())


def save_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "is no file"),
        (lambda path: path.write_text("hello"), "is not an .npz of plain arrays"),
        (save_npy, "is not an .npz of plain arrays"),
        (save_pickle, "is not an .npz of plain arrays"),
        (save_truncated, "is not an .npz of plain arrays"),
        (save_zip, "has no images"),
        (lambda path: np.savez(path, other=np.zeros(3)), "has no images"),
        (lambda path: np.savez(path, mu=np.zeros(64)), "has mu but no sigma"),
        (lambda path: np.savez(path, mu=np.zeros(10), sigma=np.eye(10)), r"has moments \[10\] .* has 64 features"),
        (lambda path: np.savez(path, arr_0=np.zeros((2, 8, 8, 3))), "arr_0 must be uint8 .* got float64"),
        (lambda path: np.savez(path, arr_0=np.zeros((2, 3, 8, 8), np.uint8)), "arr_0 must be uint8"),
    ],
)
def test_bad_files_are_one_line(tmp_path, inception_like, write, message):
    path = tmp_path / "bad.npz"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        read_reference(path, inception_like)
    assert "\n" not in str(caught.value)


def test_moments_are_inceptions(tmp_path, extractor):
    path = tmp_path / "edm.npz"
    np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match=r"no images .* the moments of the classifier"):
        read_reference(path, extractor)
