import dataclasses
import logging

import pytest
import torch

from consistency.evaluation.measure import batches_of_rank, describe, measure, metric_names, needs_features
from consistency.evaluation.references import compute_reference
from consistency.ops import from_uint8, to_uint8

ALL = ("fd", "kd", "is", "precision", "recall")


@pytest.fixture
def reference_of(tmp_path, extractor):
    def make(images, keep_features=True):
        return compute_reference(
            images.split(50),
            id=f"toy_{len(images)}",
            count=len(images),
            extractor=extractor,
            keep_features=keep_features,
            cache_dir=tmp_path,
            content_digest=f"{images.long().sum()}",
        )

    return make


def batched(images, order=None, batch_size=32):
    order = torch.arange(len(images)) if order is None else order
    return [(images[indices], indices) for indices in order.split(batch_size)]


@pytest.mark.parametrize(
    ("prefix", "total", "names"),
    [
        ("fid", 50_000, ("fid50k", "kid50k", "kid50k_std", "is50k", "is50k_std", "precision50k", "recall50k")),
        (
            "fid",
            5000,
            (
                "fid5k_proxy",
                "kid5k_proxy",
                "kid5k_proxy_std",
                "is5k_proxy",
                "is5k_proxy_std",
                "precision5k_proxy",
                "recall5k_proxy",
            ),
        ),
        (
            "fd_classifier",
            50_000,
            (
                "fd_classifier",
                "kd_classifier",
                "kd_classifier_std",
                "is_classifier",
                "is_classifier_std",
                "precision_classifier",
                "recall_classifier",
            ),
        ),
    ],
)
def test_names(prefix, total, names):
    assert metric_names(prefix, total, ALL) == names
    assert metric_names(prefix, total, ALL[::-1]) == names


@pytest.mark.parametrize(
    ("total", "name"),
    [
        (50_000, "fid50k"),
        (5000, "fid5k_proxy"),
        (2048, "fid2.048k_proxy"),
        (49_999, "fid49.999k_proxy"),
        (50_001, "fid50.001k_proxy"),
        (100_000, "fid100k_proxy"),
        (100, "fid0.1k_proxy"),
        (1_281_167, "fid1281.167k_proxy"),
    ],
)
def test_names_say_how_many(total, name):
    assert metric_names("fid", total) == (name,)


def test_unknown_metric():
    with pytest.raises(
        ValueError, match=r"unknown metric fid; evaluation\.metrics knows fd, kd, is, precision, recall"
    ):
        metric_names("fid", 50_000, ["fid"])


def test_other_weights_are_a_proxy_at_any_count():
    assert metric_names("fid", 50_000, published=False) == ("fid50k_proxy",)


def test_order_and_batches_do_not_matter(extractor, reference_of, random_images):
    reference, samples = reference_of(random_images(200)), random_images(120, seed=1, brightness=200)
    options = {"total": 120, "extractor": extractor, "reference": reference, "metrics": ALL, "allow_few": True}
    one = measure(batched(samples), kid_subset_size=50, **options)
    other = measure(batched(samples, torch.randperm(120), 17), kid_subset_size=50, **options)
    assert tuple(one) == metric_names("fd_classifier", 120, ALL)
    assert other == pytest.approx(one, rel=1e-6)
    assert one["fd_classifier"] > 0


def test_only_what_is_asked_for(extractor, reference_of, random_images):
    samples, reference = random_images(60, seed=1), reference_of(random_images(60), keep_features=False)
    options = {"total": 60, "extractor": extractor, "allow_few": True}
    assert set(measure(batched(samples), reference=reference, **options)) == {"fd_classifier"}
    scores = measure(batched(samples), reference=None, metrics=["is"], **options)
    assert set(scores) == {"is_classifier", "is_classifier_std"}


def test_set_with_itself(extractor, reference_of, random_images, caplog):
    images = random_images(300)
    saved_again = to_uint8(from_uint8(images))  # through the range of networks and back
    options = {"total": 300, "extractor": extractor, "reference": reference_of(images), "allow_few": True}
    with caplog.at_level(logging.WARNING):
        assert measure(batched(saved_again), expect_equal=True, **options)["fd_classifier"] < 1e-3
    assert "suspiciously small" not in caplog.text
    measure(batched(saved_again), **options)
    assert "suspiciously small" in caplog.text


def test_collapsed_samples(make_extractor, reference_of, random_images, extractor):
    images = random_images(300)
    options = {"total": 300, "extractor": extractor, "reference": reference_of(images), "allow_few": True}
    options["metrics"] = ["fd", "is", "recall"]
    fresh = measure(batched(random_images(300, seed=1)), **options)
    collapsed = measure(batched(images[:1].expand(300, -1, -1, -1)), **options)
    assert collapsed["is_classifier"] == pytest.approx(1)
    assert collapsed["is_classifier"] < fresh["is_classifier"]
    assert collapsed["fd_classifier"] > 5 * fresh["fd_classifier"]
    assert collapsed["recall_classifier"] < 0.1 < fresh["recall_classifier"]


def test_few_samples(extractor, reference_of, random_images, caplog):
    reference = reference_of(random_images(60))
    with pytest.raises(ValueError, match=r"2047 samples are too few .* 2048 .* evaluation\.allow_few=true"):
        measure([], total=2047, extractor=extractor, reference=reference)
    with pytest.raises(ValueError, match="2048 samples were announced, 0 came"):
        measure([], total=2048, extractor=extractor, reference=reference)
    measure(batched(random_images(50)), total=50, extractor=extractor, reference=reference, allow_few=True)
    assert "scores of 50 samples" in caplog.text


@pytest.mark.parametrize("count", [49, 51])
def test_exactly_total_samples(extractor, reference_of, random_images, count):
    with pytest.raises(ValueError, match="50"):
        measure(
            batched(random_images(count)),
            total=50,
            extractor=extractor,
            reference=reference_of(random_images(60)),
            allow_few=True,
        )


def test_references_that_do_not_fit(extractor, make_extractor, reference_of, random_images):
    options = {"total": 5000, "extractor": extractor}
    reference = reference_of(random_images(60), keep_features=False)
    with pytest.raises(ValueError, match="needs a reference"):
        measure([], reference=None, **options)
    with pytest.raises(ValueError, match="needs the features of the reference toy_60"):
        measure([], reference=reference, metrics=["recall"], **options)
    with pytest.raises(ValueError, match=r"was made by classifier .* compute the reference anew"):
        measure([], reference=reference, total=5000, extractor=make_extractor(seed=1))
    with pytest.raises(ValueError, match="was made by inception"):
        measure([], reference=dataclasses.replace(reference, extractor="inception"), **options)
    with pytest.raises(ValueError, match="kd takes subsets of 1000, there are"):
        measure([], reference=reference_of(random_images(60)), metrics=["kd"], **options)


def test_description(extractor, reference_of, random_images):
    about = describe(extractor, reference_of(random_images(60)), 5000)
    assert (about["num_samples"], about["reference"], about["reference_count"]) == (5000, "toy_60", 60)
    assert about["extractor_digest"] == extractor.digest


def test_needs_features():
    assert not needs_features(["fd", "is"])
    assert needs_features(["fd", "recall"])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_batches(world_size):
    shares = [list(batches_of_rank(103, 10, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert torch.equal(torch.cat([batch for share in shares for batch in share]).sort().values, torch.arange(103))
    whole = [batch.tolist() for batch in batches_of_rank(103, 10)]
    assert all(batch.tolist() in whole for share in shares for batch in share)
