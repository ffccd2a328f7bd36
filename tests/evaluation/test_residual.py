import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hydra.utils import instantiate

from composing import composed
from consistency import config
from consistency.evaluation import residual
from consistency.evaluation.extractors import classifier_extractor, extract
from consistency.evaluation.features import train_classifier
from consistency.evaluation.residual import ResidualClassifier, ResidualRecipe
from consistency.io.tensors import digest_of

TINY = ResidualRecipe(width=4, epochs=6, batch_size=16, lr=0.1, pad=1)


@pytest.fixture(scope="module")
def data():
    """Three classes by where the bright stripe lies, under noise; a stripe is the same mirrored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 3
    images = torch.randint(120, (240, 3, 8, 8), generator=generator)
    for index, label in enumerate(labels.tolist()):
        images[index, :, 3 * label] += 120
    return images.to(torch.uint8), labels


@pytest.fixture(scope="module")
def trained(data):
    return TINY.train(*data)


def test_learns(trained):
    model, accuracy = trained
    assert accuracy > 0.8  # chance is 0.33
    assert not model.training


def test_function_of_the_seed_alone(data, trained):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again, accuracy = TINY.train(*data)
    assert torch.equal(torch.get_rng_state(), before)
    assert accuracy == trained[1]
    assert digest_of(*again.state_dict().values()) == digest_of(*trained[0].state_dict().values())
    other, _ = replace(TINY, seed=1).train(*data)
    assert not torch.equal(other.head.weight, again.head.weight)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 17), (3, 32)])
def test_shapes(channels, size):
    model = ResidualClassifier(channels, size, num_classes=5, width=4).eval()
    images = torch.randint(256, (2, channels, size, size), dtype=torch.uint8)
    assert model.features(images).shape == (2, model.feature_dim) == (2, 16)
    assert model.features(images).dtype == torch.float32
    assert torch.equal(model(images), model.head(model.features(images)))


def test_logits_do_not_know_the_scale_of_the_features(monkeypatch):
    model = ResidualClassifier(3, 8, num_classes=5, width=4).eval()
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    features, logits = model.features(images), model(images)
    monkeypatch.setattr(residual, "_SCALE", 1.0)
    assert torch.equal(model.features(images), features / 16)
    assert torch.equal(model(images), logits)


def test_size_on_a_gpu_is_what_the_docs_say():
    with torch.device("meta"):
        model = ResidualRecipe().build(3, 32, 10)
    assert (round(sum(p.numel() for p in model.parameters()) / 1e5), model.feature_dim) == (36, 256)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ResidualClassifier(3, 7, 10, width=4), "8 pixels or more, got 7; use evaluation=classifier"),
        (lambda: ResidualRecipe(width=0), "evaluation.extractor.network.width must be an integer, at least 1, got 0"),
        (lambda: ResidualRecipe(epochs=1.5), "network.epochs must be an integer"),
        (lambda: ResidualRecipe(holdout=1), "network.holdout must be above 0 and below 1, got 1"),
    ],
)
def test_impossible_settings_are_one_line(make, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_mirrored_places():
    places = torch.arange(-2, 6)
    assert residual._mirrored(places, 4).tolist() == [2, 1, 0, 1, 2, 3, 2, 1]


def test_augmentation_moves_and_mirrors_only():
    images = torch.arange(2 * 3 * 5 * 5).view(2, 3, 5, 5).to(torch.uint8)
    index = torch.arange(64) % 2
    plain = ResidualRecipe(pad=0, flip=False)._augment(images, index)
    assert torch.equal(plain, images[index])
    flipped = ResidualRecipe(pad=0)._augment(images, index)
    mirrored = [bool(torch.equal(a, b.flip(-1))) for a, b in zip(flipped, images[index], strict=True)]
    same = [bool(torch.equal(a, b)) for a, b in zip(flipped, images[index], strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 10 < sum(mirrored) < 54
    padded = torch.nn.functional.pad(images[index].float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    moved = ResidualRecipe(pad=2, flip=False)._augment(images, index)
    windows = padded.unfold(2, 5, 1).unfold(3, 5, 1).permute(0, 2, 3, 1, 4, 5)  # [64, 5, 5, C, H, W]
    found = (windows == moved[:, None, None]).flatten(3).all(dim=3)
    assert bool((found.flatten(1).sum(dim=1) == 1).all())
    assert len(found.nonzero()[:, 1:].unique(dim=0)) > 15  # of 25 places


def test_rate_rises_and_falls():
    rates = [residual._rise_and_fall(step, 100) for step in range(100)]
    assert rates.index(max(rates)) in (19, 20)
    assert max(rates) == 1
    assert 0 < rates[-1] < 0.02
    assert all(b > a for a, b in pairwise(rates[:20]))
    assert all(b < a for a, b in pairwise(rates[20:]))


def test_kept_beside_the_small_one(data, tmp_path, monkeypatch):
    small = classifier_extractor(*data, tmp_path, epochs=1)
    first = classifier_extractor(*data, tmp_path, recipe=TINY)
    monkeypatch.setattr(ResidualRecipe, "train", None)  # to call it would fail
    again = classifier_extractor(*data, tmp_path, recipe=TINY)
    assert (again.digest, again.accuracy, again.dim) == (first.digest, first.accuracy, 16)
    assert (again.name, again.prefix) == ("classifier", "fd_classifier")
    assert small.digest != again.digest
    assert torch.equal(extract(again, data[0][:9])[0], extract(first, data[0][:9])[0])
    assert not any(module.training for module in again.modules())
    metas = [json.loads(path.read_text()) for path in (tmp_path / "evaluation").glob("classifier-*.json")]
    assert sorted(meta.get("width", 0) for meta in metas) == [0, 4]


def test_small_classifier_is_where_it_always_was(tmp_path):
    # References and scores that people keep name it: its key may not change, nor what it gives.
    images = torch.arange(24 * 64).remainder(251).reshape(24, 1, 8, 8).to(torch.uint8)
    labels = torch.arange(24) % 3
    extractor = classifier_extractor(images, labels, tmp_path, epochs=1)
    (file,) = (tmp_path / "evaluation").glob("*.safetensors")
    assert file.name == "classifier-3abbc65c9364.safetensors"
    model, accuracy = train_classifier(images, labels, epochs=1)
    assert extractor.digest == digest_of(*model.state_dict().values())[:16]
    assert extractor.accuracy == accuracy


@pytest.mark.parametrize(("choice", "network"), [("photographs", ResidualRecipe), ("classifier", type(None))])
def test_choice_of_the_configuration(choice, network, data, tmp_path, monkeypatch):
    config.register()
    cfg = composed("evaluate", "ckpt=none", f"evaluation={choice}", f"evaluation.cache_dir={tmp_path}")
    evaluation = instantiate(cfg.evaluation, _convert_="object")
    asked = []
    monkeypatch.setattr(
        "consistency.evaluation.protocol.classifier_extractor",
        lambda *args, recipe, device: asked.append((type(recipe), device)),
    )
    module = type("Data", (), {"in_memory": lambda self: data})()
    evaluation.make_extractor(module, "cuda")
    assert asked == [(network, "cuda" if network is ResidualRecipe else "cpu")]
