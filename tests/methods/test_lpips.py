"""LPIPS on a randomly initialised VGG-16: everything but the values of the published weights."""

import copy
import pickle
import urllib.error

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg16

from consistency.methods.lpips import LPIPS

FILE = "vgg16-397923af.pth"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def features():
    """State dict of the convolutions, seeded; biases too are random, torchvision's are 0."""
    # The classifier (494 MB) is not needed: on "meta" it costs neither time nor memory.
    with torch.device("meta"):
        shapes = {f"features.{name}": value.shape for name, value in vgg16().features.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else (2 / shape[1:].numel()) ** 0.5)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def backbone(features, tmp_path_factory):
    file = tmp_path_factory.mktemp("vgg") / "features.pth"
    torch.save(features, file)
    return str(file)


@pytest.fixture
def quick(monkeypatch):
    """Leaves out most of what building takes: random weights for a VGG-16 that are overwritten or dropped."""
    for name in ("normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.fixture(scope="module")
def metric(backbone):
    return LPIPS(backbone, resize=32)


def images(batch=2, channels=3, size=16, seed=0):
    return 1.2 * torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def one_line(excinfo, *parts):
    text = str(excinfo.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text


def test_one_distance_per_pair(metric):
    a, b = images(3, seed=1), images(3, seed=2)
    distance = metric(a, b)
    assert distance.shape == (3,)
    assert (distance > 0).all()
    for i in range(3):
        torch.testing.assert_close(metric(a[i : i + 1], b[i : i + 1]), distance[i : i + 1])


def test_equal_images_have_distance_zero(metric):
    a = images().requires_grad_()
    distance = metric(a, a.detach().clone())
    assert torch.equal(distance, torch.zeros(2))
    distance.sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_is_the_package_on_the_enlarged_images(metric, features, quick):
    import lpips

    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for piece in reference.net.children():
        for position, layer in piece.named_children():
            for name, parameter in layer.named_parameters():
                parameter.data.copy_(features[f"features.{position}.{name}"])
    a, b = images(seed=1), images(seed=2)
    enlarged = [F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False) for x in (a, b)]
    with torch.no_grad():
        torch.testing.assert_close(metric(a, b), reference(*enlarged).reshape(2))


def test_only_smaller_images_are_enlarged_and_keep_their_aspect(metric):
    assert metric._prepare(torch.zeros(1, 3, 16, 24)).shape == (1, 3, 32, 48)
    assert metric._prepare(torch.zeros(1, 1, 32, 40)).shape == (1, 3, 32, 40)


def test_values_outside_the_range_are_not_clamped(metric):
    a = torch.full((1, 3, 16, 16), 1.0)
    assert metric(1.5 * a, a) > 0


def test_grey_is_three_equal_channels(metric):
    a, b = images(channels=1, seed=1), images(channels=1, seed=2)
    torch.testing.assert_close(metric(a, b), metric(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))


def test_gradient_reaches_the_image_and_no_weight(metric):
    a, b = images(seed=1).requires_grad_(), images(seed=2)
    metric(a, b).sum().backward()
    assert torch.isfinite(a.grad).all()
    assert (a.grad.flatten(1).abs().sum(dim=1) > 0).all()
    assert all(not p.requires_grad and p.grad is None for p in metric._net.parameters())
    assert not metric(a.detach(), b).requires_grad
    c = b.clone().requires_grad_()
    metric(c, a).sum().backward()
    torch.testing.assert_close(metric(a, b), metric(b, a))
    assert torch.isfinite(c.grad).all()


def test_gradient_is_finite_where_all_features_vanish(features, tmp_path, quick):
    # The package divides by the norm of the features; ReLU must cut the gradient before it becomes NaN.
    dead = {
        name: value if name.endswith("weight") else torch.full_like(value, -1e3) for name, value in features.items()
    }
    torch.save(dead, tmp_path / "dead.pth")
    a = images().requires_grad_()
    LPIPS(str(tmp_path / "dead.pth"), resize=None)(a, images(seed=2)).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


@pytest.mark.parametrize("owner", [nn.Module, lightning.LightningModule])
def test_is_no_part_of_the_module_that_holds_it(metric, owner):
    module = owner()
    module.metric = metric
    before = metric(images(seed=1), images(seed=2))
    module.train()
    assert not any(part.training for part in metric._net.modules())
    assert torch.equal(metric(images(seed=1), images(seed=2)), before)
    assert not module.state_dict()
    assert not list(module.parameters())


def test_float32_under_autocast(metric):
    a, b = images(seed=1), images(seed=2)
    expected = metric(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(metric(a, b), expected)
    low = metric(a.bfloat16(), b.bfloat16())
    assert low.dtype == metric(a.double(), b.double()).dtype == torch.float32


def test_copies_and_pickles(metric):
    a, b = images(seed=1), images(seed=2)
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert other._net is not metric._net
        assert torch.equal(other(a, b), metric(a, b))


def test_follows_its_input_and_stays_trainable_through(metric):
    other = copy.deepcopy(metric)
    with torch.inference_mode():
        other._follow(torch.device("meta"))
    weights = list(other._net.parameters())
    assert all(weight.device.type == "meta" and not weight.is_inference() for weight in weights)
    assert not any(weight.requires_grad for weight in weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(metric):
    other = copy.deepcopy(metric)
    a, b = images(seed=1), images(seed=2)
    with torch.inference_mode():
        first = other(a.cuda(), b.cuda())
    torch.testing.assert_close(first.cpu(), metric(a, b), rtol=1e-2, atol=1e-3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert other(a.cuda().requires_grad_(), b.cuda()).dtype == torch.float32
    x = a.cuda().requires_grad_()
    other(x, b.cuda()).sum().backward()
    assert x.grad.abs().sum() > 0


def test_building_it_is_silent_and_draws_no_random_numbers(backbone, capfd, recwarn):
    before = torch.get_rng_state()
    LPIPS(backbone)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_small_images_need_resize(metric):
    plain = copy.copy(metric)
    plain.resize = None
    with pytest.raises(ValueError, match="at least 16x16") as excinfo:
        plain(images(size=8), images(size=8))
    one_line(excinfo, "8x8", "metric.resize=224")
    assert plain(images(size=16), images(size=16, seed=1)).shape == (2,)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 2, 16, 16), (3, 16, 16)])
def test_other_shapes_are_refused(metric, shape):
    with pytest.raises(ValueError, match="1 or 3 channels"):
        metric(torch.zeros(shape), torch.zeros(shape))


def test_shapes_must_agree(metric):
    with pytest.raises(ValueError, match="one shape"):
        metric(images(2), images(1))


def test_resize_below_the_smallest_size():
    with pytest.raises(ValueError, match=r"at least 16 or null, got 8; change metric\.resize"):
        LPIPS("unused.pth", resize=8)


def test_offline_without_backbone(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ValueError, match="metric=lpips needs") as excinfo:
        LPIPS()
    destination = tmp_path / "checkpoints" / FILE
    one_line(excinfo, destination, f"https://download.pytorch.org/models/{FILE}", "metric.backbone=FILE", "no route")


def test_whole_network_from_the_cache(monkeypatch, tmp_path, features, metric, quick):
    (tmp_path / "checkpoints").mkdir()
    torch.save(features | {"classifier.0.weight": torch.zeros(4, 4)}, tmp_path / "checkpoints" / FILE)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    a, b = images(seed=1), images(seed=2)
    assert torch.equal(LPIPS(resize=32)(a, b), metric(a, b))


def test_absent_file(tmp_path):
    with pytest.raises(ValueError, match="no file") as excinfo:
        LPIPS(str(tmp_path / "absent.pth"))
    one_line(excinfo, tmp_path / "absent.pth", "metric.backbone")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, "[64, 1, 3, 3], not [64, 3, 3, 3]"),
        (lambda state: state | {"features.30.weight": torch.zeros(1)}, "it also has features.30.weight"),  # VGG-19
        (lambda state: {"lin0.model.1.weight": torch.zeros(1)}, "it has no features.0.weight"),  # the package's heads
        (lambda state: torch.zeros(3), "it holds a Tensor"),
    ],
)
def test_wrong_file(features, tmp_path, change, reason, quick):
    torch.save(change(features), tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="is not torchvision's VGG-16") as excinfo:
        LPIPS(str(tmp_path / "wrong.pth"))
    one_line(excinfo, tmp_path / "wrong.pth", reason, "metric.backbone")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", "truncated", "code"])
def test_broken_file(backbone, tmp_path, content):
    file = tmp_path / "broken.pth"
    if content == "truncated":
        with open(backbone, "rb") as source:
            file.write_bytes(source.read(100_000))
    elif content == "code":
        torch.save(nn.Linear(1, 1), file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged, or not a file of tensors") as excinfo:
        LPIPS(str(file))
    one_line(excinfo, file, "metric.backbone")
