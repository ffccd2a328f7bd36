import json
import logging
import urllib.error

import pytest
import torch

from consistency.evaluation import extractors
from consistency.evaluation.extractors import (
    INCEPTION_FILE,
    INCEPTION_URL,
    Inception,
    classifier_extractor,
    extract,
    find_inception,
)
from consistency.evaluation.measure import names_of


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty torch cache; what `find_inception` looks for is at the path returned."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / INCEPTION_FILE
    path.parent.mkdir(parents=True)
    return path


def colours(count, size=32):
    """Images of three classes by their colour, and labels."""
    labels = torch.arange(count) % 3
    images = torch.randint(100, (count, 3, size, size), dtype=torch.int64)
    images[torch.arange(count), labels] += 120
    return images.to(torch.uint8), labels


def test_missing_inception_is_one_line_with_the_way_out(torch_home, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError) as caught:
        Inception()
    message = str(caught.value)
    assert "\n" not in message
    for part in ("no Inception weights", INCEPTION_URL, str(torch_home), "evaluation.weights=FILE", "not known"):
        assert part in message


def test_download_is_checked_and_kept(torch_home, monkeypatch):
    calls = []

    def download(url, path, hash_prefix, progress):
        calls.append((url, hash_prefix))
        torch_home.write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(extractors, "digest_of_file", lambda path: "6726825d" + 56 * "0")
    assert find_inception() == find_inception() == torch_home
    assert calls == [(INCEPTION_URL, "6726825d")]


def test_damaged_file_in_the_cache(torch_home):
    torch_home.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"is damaged: its sha256 begins with .*, not 6726825d; delete it"):
        find_inception()


def test_own_file(tmp_path, inception_file, caplog):
    assert find_inception(inception_file) == inception_file
    assert "is not the published Inception" in caplog.text
    with pytest.raises(ValueError, match=r"evaluation\.weights=.*none\.pth is no file; .*https://"):
        find_inception(tmp_path / "none.pth")


@pytest.mark.parametrize("content", [{"weight": torch.zeros(3)}, "a string"])
def test_file_of_something_else(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"does not hold torch-fidelity's Inception"):
        Inception(path)


def test_weights_run_nothing(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    path = tmp_path / "harm.pth"
    torch.save({"fc.weight": Harm()}, path)
    (tmp_path / "harm").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="does not hold"):
        Inception(path)
    assert not (tmp_path / "harm").exists()


def test_inception(inception_file, random_images):
    before = torch.get_rng_state()
    inception = Inception(inception_file)
    assert torch.equal(torch.get_rng_state(), before)
    inception.train()
    assert not any(module.training for module in inception.modules())
    assert not any(parameter.requires_grad for parameter in inception.parameters())
    assert (inception.name, inception.prefix, inception.dim) == ("inception", "fid", 2048)
    assert len(inception.digest) == 16
    grey = random_images(1)
    features, logits = extract(inception, grey)
    assert (features.shape, logits.shape) == ((1, 2048), (1, 1008))
    assert features.dtype == logits.dtype == torch.float32
    colour = extract(inception, grey.expand(-1, 3, -1, -1).contiguous())
    assert torch.equal(features, colour[0])


def test_precision_of_the_caller_does_not_matter(extractor, random_images):
    images, seen = random_images(4), []
    extractor.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    plain, _ = extract(extractor, images)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features, _ = extract(extractor, images)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(features, plain)
    assert seen == ["highest", "highest"]


def test_classifier_takes_any_size_and_colour(make_extractor, random_images):
    grey, colour = make_extractor(1, 8), make_extractor(3, 8)
    images = random_images(4)
    replicated = images.expand(-1, 3, -1, -1)
    assert torch.equal(grey(replicated)[0], grey(images)[0])
    assert torch.equal(colour(images)[0], colour(replicated)[0])
    large = images.repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2)
    torch.testing.assert_close(grey(large)[0], grey(images)[0], rtol=0.3, atol=0.05)
    assert grey(images)[1].shape == (4, 5)


def test_classifier_is_trained_once(tmp_path, monkeypatch):
    images, labels = colours(96, size=8)
    first = classifier_extractor(images, labels, tmp_path, epochs=2)
    monkeypatch.setattr(extractors, "train_classifier", None)  # to call it would fail
    before = torch.get_rng_state()
    again = classifier_extractor(images, labels, tmp_path, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.digest == first.digest
    assert again.accuracy == first.accuracy
    assert torch.equal(again(images)[0], first(images)[0])
    assert not again.training
    (meta,) = (tmp_path / "evaluation").glob("classifier-*.json")
    assert json.loads(meta.read_text())["accuracy"] == first.accuracy


def test_other_data_or_settings_are_another_classifier(tmp_path):
    images, labels = colours(32, size=8)
    other = images.clone()
    other[0, 0, 0, 0] += 1
    for args, options in [
        ((images, labels), {}),
        ((other, labels), {}),
        ((images, labels.flip(0)), {}),
        ((images, labels), {"seed": 1}),
    ]:
        classifier_extractor(*args, tmp_path, epochs=1, **options)
    assert len(list((tmp_path / "evaluation").glob("*.safetensors"))) == 4


def damage_end(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [damage_end, lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_bytes(b"")]
)
def test_damaged_classifier_is_trained_anew(tmp_path, caplog, damage):
    images, labels = colours(32, size=8)
    first = classifier_extractor(images, labels, tmp_path, epochs=1)
    (path,) = (tmp_path / "evaluation").glob("*.safetensors")
    damage(path)
    with caplog.at_level(logging.WARNING):
        again = classifier_extractor(images, labels, tmp_path, epochs=1)
    assert "is damaged" in caplog.text
    assert again.digest == first.digest
    caplog.clear()
    classifier_extractor(images, labels, tmp_path, epochs=1)
    assert not caplog.text


def test_colour_classifier_learns(tmp_path):
    images, labels = colours(300)
    extractor = classifier_extractor(images, labels, tmp_path, epochs=6)
    assert extractor.accuracy > 0.9
    features, logits = extract(extractor, images[:5])
    assert (features.shape, logits.shape) == ((5, 64), (5, 3))


def test_no_classes():
    with pytest.raises(ValueError, match="at least two classes; use evaluation=proxy"):
        classifier_extractor(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "unused")


def test_other_weights_are_not_called_the_published_ones(inception_file):
    extractor = Inception(inception_file)
    assert not extractor.published
    assert names_of(extractor, 50_000, ["fd"]) == ("fid50k_proxy",)
