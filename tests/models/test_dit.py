import math

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from composing import composed
from consistency.models.dit import DiT, DiTBlock
from consistency.ops import same_randomness


@pytest.fixture
def make_dit():
    """A small DiT, 8x8 images of 2 channels, with random weights everywhere (a fresh one is zero)."""

    def make(*, random_weights=True, **options):
        small = {"image_size": 8, "in_channels": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}
        network = DiT(**{**small, **options})
        if random_weights:
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.normal_(std=0.3)
        return network

    return make


SIZES = {
    "s": {},
    "b": {"hidden_size": 768, "num_heads": 12},
    "l": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "xl": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
# Of the paper's networks, to two digits of a million its Table 4 and 5; counted by hand from their shapes.
PUBLISHED = {
    ("s", 2): 32_963_360,
    ("s", 4): 32_945_024,
    ("s", 8): 33_148_160,
    ("b", 2): 130_512_416,
    ("l", 2): 458_102_816,
    ("xl", 2): 675_129_632,
    ("xl", 4): 675_074_432,
    ("xl", 8): 675_683_072,
}


@pytest.mark.parametrize(("size", "patch"), PUBLISHED)
def test_parameters_of_the_published_networks(size, patch):
    with torch.device("meta"):
        network = DiT(image_size=32, in_channels=4, num_classes=1000, patch_size=patch, **SIZES[size])
    width = network.config["hidden_size"]
    variances = patch**2 * 4 * (width + 1)  # theirs predicts them too
    positions = (32 // patch) ** 2 * width  # a parameter there, without gradient
    ours = sum(parameter.numel() for parameter in network.parameters())
    assert ours + variances + positions == PUBLISHED[size, patch]


def options_of(network, **images):
    """Of its file in conf/network; the images and classes are those of the data set."""
    options = OmegaConf.to_container(composed(f"network/{network}").network)
    return {key: value for key, value in options.items() if not key.startswith("_")} | images


@pytest.mark.parametrize("size", SIZES)
def test_configurations_have_the_sizes_of_the_paper(size):
    images = {"image_size": 32, "in_channels": 3}
    with torch.device("meta"):
        defaults = DiT(**images).config
    for patch in (2, 4, 8):
        options = options_of(f"dit_{size}_{patch}", **images)
        assert defaults | options == defaults | SIZES[size] | {"patch_size": patch}


def test_parameters_of_the_tiny_network():
    with torch.device("meta"):
        network = DiT(**options_of("dit_tiny", image_size=8, in_channels=1))
    assert sum(parameter.numel() for parameter in network.parameters()) == 506_324


def reference(network, x, c_noise, labels):
    """The paper's formulas, written for one image at a time with sums and loops."""
    state, options = network.state_dict(), network.config
    size, patch, width, heads = (options[key] for key in ("image_size", "patch_size", "hidden_size", "num_heads"))
    grid, dim = size // patch, width // heads

    def linear(name, value):
        return torch.einsum("oi,...i->...o", state[f"{name}.weight"], value) + state[f"{name}.bias"]

    def silu(value):
        return value / (1 + torch.exp(-value))

    def norm(value):
        centred = value - value.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)

    def waves(place, count):
        angles = [place * 10_000 ** (-k / count) for k in range(count)]
        return [math.sin(a) for a in angles], [math.cos(a) for a in angles]

    images = []
    for image, level, label in zip(x, c_noise.tolist(), labels.tolist(), strict=True):
        sin, cos = waves(level, 128)
        emb = linear("linear1", silu(linear("linear0", torch.tensor(cos + sin, dtype=x.dtype))))
        emb = silu(emb + state["embed_label.weight"][label if label >= 0 else options["num_classes"]])
        tokens = []
        for row in range(grid):
            for column in range(grid):
                pixels = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                token = torch.einsum("ochw,chw->o", state["patchify.weight"], pixels) + state["patchify.bias"]
                place = [number for part in (column, row) for half in waves(part, width // 4) for number in half]
                tokens.append(token + torch.tensor(place, dtype=x.dtype))
        hidden = torch.stack(tokens)
        for index in range(options["depth"]):
            at = f"blocks.{index}"
            shift0, scale0, gate0, shift1, scale1, gate1 = linear(f"{at}.modulation", emb).reshape(6, width)
            qkv = linear(f"{at}.qkv", norm(hidden) * (1 + scale0) + shift0).reshape(-1, 3, heads, dim)
            scores = torch.einsum("qhd,khd->hqk", qkv[:, 0], qkv[:, 1]) / math.sqrt(dim)
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), qkv[:, 2]).reshape(-1, width)
            hidden = hidden + gate0 * linear(f"{at}.proj", mixed)
            inner = linear(f"{at}.linear0", norm(hidden) * (1 + scale1) + shift1)
            inner = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
            hidden = hidden + gate1 * linear(f"{at}.linear1", inner)
        shift, scale = linear("out_modulation", emb).reshape(2, width)
        patches = linear("out_linear", norm(hidden) * (1 + scale) + shift)
        out = torch.zeros_like(image)
        for token, values in enumerate(patches):
            top, left = token // grid * patch, token % grid * patch
            for number, value in enumerate(values):
                pixel, channel = divmod(number, len(image))
                out[channel, top + pixel // patch, left + pixel % patch] = value
        images.append(out)
    return torch.stack(images)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_computes_what_the_paper_says(make_dit, patch):
    network = make_dit(num_classes=3, patch_size=patch, mlp_ratio=2.5).double()
    assert network.blocks[0].linear0.out_features == 40
    x, c_noise = torch.randn(3, 2, 8, 8).double(), torch.tensor([-1.6, 0.0, 1.1]).double()
    labels = torch.tensor([0, -1, 2])
    assert_close(network(x, c_noise, labels), reference(network, x, c_noise, labels), rtol=1e-5, atol=1e-5)


def test_labels(make_dit):
    network = make_dit(num_classes=3)
    x, c_noise = torch.randn(1, 2, 8, 8).expand(4, -1, -1, -1), torch.zeros(4)
    out = network(x, c_noise, torch.tensor([-1, 0, 1, 2])).detach()
    differences = (out[:, None] - out[None]).abs().amax((2, 3, 4))
    assert float((differences + torch.eye(4)).min()) > 1e-2
    with pytest.raises(ValueError, match="3 classes"):
        network(x, c_noise)


def test_an_unconditional_network_ignores_labels(make_dit):
    network = make_dit()
    x, c_noise = torch.randn(2, 2, 8, 8), torch.zeros(2)
    assert torch.equal(network(x, c_noise, torch.tensor([5, -1])), network(x, c_noise))


def test_tells_neighbouring_levels_apart(make_dit):
    # The finest grid of iCT has 1281 levels: 0.25 ln(sigma) moves by 0.001 and more.
    network = make_dit()
    emb = network.embed_noise(torch.arange(-1.6, 1.1, 0.001))
    steps = (emb[1:] - emb[:-1]).norm(dim=1)
    assert float(steps.min()) > 1e-3
    assert float(steps.max()) < 4e-3  # and none is torn from the next
    x = torch.randn(1, 2, 8, 8)
    assert not torch.equal(network(x, torch.tensor([0.5])), network(x, torch.tensor([0.501])))


def test_rows_of_a_batch_are_independent(make_dit):
    network = make_dit()
    x, c_noise = torch.randn(3, 2, 8, 8), torch.tensor([-1.5, 0.0, 1.0])
    assert_close(network(x[1:2], c_noise[1:2]), network(x, c_noise)[1:2], rtol=1e-4, atol=1e-4)


def test_starts_at_zero_with_blocks_that_are_identities(make_dit):
    network = make_dit(random_weights=False, num_classes=3, augment_channels=9)
    emb, hidden = torch.randn(2, 16), torch.randn(2, 16, 16)
    assert all(torch.equal(block(hidden, emb), hidden) for block in network.blocks)
    out = network(torch.randn(2, 2, 8, 8), torch.zeros(2), torch.tensor([0, -1]), torch.randn(2, 9))
    assert out.tolist() == torch.zeros(2, 2, 8, 8).tolist()


def test_initial_weights():
    network = DiT(image_size=8, in_channels=4, num_classes=1000, hidden_size=64, depth=1, num_heads=2)
    for weight in (network.linear0.weight, network.linear1.weight, network.embed_label.weight):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    block = network.blocks[0]
    for weight in (network.patchify.weight.flatten(1), block.qkv.weight, block.linear0.weight, block.proj.weight):
        assert float(weight.std()) == pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.08)
    assert all(not module.bias.any() for module in network.modules() if getattr(module, "bias", None) is not None)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_inverts_patchify(make_dit, patch):
    network = make_dit(patch_size=patch, hidden_size=64, random_weights=False)
    x = torch.arange(2 * 2 * 64.0).reshape(2, 2, 8, 8)
    rows = [[float(k == (pixel * 2 + channel)) for channel in range(2) for pixel in range(patch**2)] for k in range(64)]
    with torch.no_grad():  # patch -> token with the order that the last layer has
        network.patchify.weight.copy_(torch.tensor(rows).reshape(64, 2, patch, patch))
        tokens = network.patchify(x).flatten(2).transpose(1, 2)[..., : patch**2 * 2]
    assert torch.equal(network._unpatchify(tokens), x)


def test_rows_and_columns_have_positions_of_their_own(make_dit):
    network = make_dit(patch_size=1)
    x, c_noise = torch.randn(1, 2, 8, 8), torch.zeros(1)
    out = network(x, c_noise)
    changes = {
        "rows": network(x.roll(1, 2), c_noise).roll(-1, 2),
        "columns": network(x.roll(1, 3), c_noise).roll(-1, 3),
        "both": network(x.transpose(2, 3), c_noise).transpose(2, 3),
    }
    for changed in changes.values():
        assert float((changed - out).abs().max()) > 1e-2
    assert len(network.positions.unique(dim=0)) == 64
    assert "positions" not in network.state_dict()


@pytest.mark.parametrize("along", ["image", "level"])
def test_forward_mode_derivative(make_dit, along):
    network = make_dit(num_classes=3, augment_channels=9).double()
    x, c_noise, labels = torch.randn(2, 2, 8, 8).double(), torch.tensor([-1.0, 0.5]).double(), torch.tensor([1, -1])
    d_x, d_noise = torch.zeros_like(x), torch.zeros_like(c_noise)
    (d_x if along == "image" else d_noise).normal_()

    def f(x, c_noise):
        return network(x, c_noise, labels, torch.ones(2, 9).double())

    with sdpa_kernel(SDPBackend.MATH):
        out, tangent = torch.func.jvp(f, (x, c_noise), (d_x, d_noise))
    assert_close(out, f(x, c_noise))
    # Central differences of fourth order; the embedding is taken in float32, so that steps of the level are longer.
    h = 1e-4 if along == "image" else 2e-2
    at = {step: f(x + step * h * d_x, c_noise + step * h * d_noise) for step in (-2, -1, 1, 2)}
    expected = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    assert float(expected.abs().max()) > 0.1
    tolerance = 1e-7 if along == "image" else 1e-3
    assert_close(tangent, expected, rtol=tolerance, atol=tolerance)


def test_dropout_masks_are_shared(make_dit):
    network = make_dit(dropout=0.5)
    x, c_noise = torch.randn(2, 2, 8, 8), torch.zeros(2)
    with same_randomness(x.device) as rewind:
        first = network(x, c_noise)
        other = network(x, c_noise)
        rewind()
        assert torch.equal(network(x, c_noise), first)
    assert not torch.allclose(other, first)
    network.eval()
    assert torch.equal(network(x, c_noise), network(x, c_noise))


def test_dropout_acts_in_each_branch():
    torch.manual_seed(0)
    block, x, emb = DiTBlock(8, 2, 4.0, 0.5), torch.randn(1, 4, 8), torch.ones(1, 8)
    for gate in (2, 5):  # one branch open, the other shut
        with torch.no_grad():
            block.modulation.weight.zero_()
            block.modulation.bias.zero_()
            block.modulation.bias[gate * 8 : (gate + 1) * 8] = 1.0
        change = (block(x, emb) - x).detach()
        assert 0 < int((change == 0).sum()) < change.numel()


def test_augmentation_labels(make_dit):
    network = make_dit(augment_channels=9)
    x, c_noise = torch.randn(2, 2, 8, 8), torch.zeros(2)
    out = network(x, c_noise)
    assert torch.equal(network(x, c_noise, None, torch.zeros(2, 9)), out)
    assert not torch.allclose(network(x, c_noise, None, torch.ones(2, 9)), out, atol=1e-2)
    with pytest.raises(ValueError, match=r"network\.augment_channels=9"):
        make_dit()(x, c_noise, None, torch.zeros(2, 9))


@pytest.mark.parametrize(("size", "patch"), [(4, 1), (4, 4), (6, 2), (256, 8)])
def test_image_sizes(make_dit, size, patch):
    network = make_dit(image_size=size, patch_size=patch)
    assert network(torch.randn(1, 2, size, size), torch.zeros(1)).shape == (1, 2, size, size)


def test_under_autocast_every_weight_learns(make_dit):
    network = make_dit(num_classes=3, augment_channels=9)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(2, 2, 8, 8), torch.zeros(2), torch.tensor([0, -1]), torch.ones(2, 9))
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    for name, parameter in network.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.slow
def test_compiles_in_one_graph(make_dit):
    network = make_dit(num_classes=3)
    x, c_noise, labels = torch.randn(2, 2, 8, 8), torch.zeros(2), torch.tensor([0, -1])
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert_close(compiled(x, c_noise, labels), network(x, c_noise, labels))


def test_config_builds_it_again(make_dit):
    network = make_dit(num_classes=3, patch_size=4, dropout=0.1, augment_channels=9)
    again = DiT(**network.config)
    again.load_state_dict(network.state_dict())
    assert again.config == network.config
    assert (again.image_size, again.in_channels, again.num_classes, again.augment_channels) == (8, 2, 3, 9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 7}, ["network.patch_size is 2", "divisor of data.image_size=7"]),
        ({"patch_size": 16}, ["network.patch_size is 16", "divisor of data.image_size=8"]),
        ({"image_size": 0}, ["network.image_size is 0", "at least 1"]),
        ({"patch_size": 0}, ["network.patch_size is 0", "at least 1"]),
        ({"hidden_size": 20, "num_heads": 3}, ["network.num_heads is 3", "divisor of network.hidden_size=20"]),
        ({"hidden_size": 18}, ["network.hidden_size is 18", "multiple of 4"]),
        ({"hidden_size": 8.0}, ["network.hidden_size is 8.0", "integer"]),
        ({"depth": 0}, ["network.depth is 0", "at least 1"]),
        ({"num_heads": 0}, ["network.num_heads is 0", "at least 1"]),
        ({"mlp_ratio": 0.0}, ["network.mlp_ratio is 0.0", "positive"]),
        ({"dropout": 1.0}, ["network.dropout is 1.0", "below 1"]),
        ({"num_classes": -1}, ["network.num_classes is -1", "at least 0"]),
        ({"augment_channels": -1}, ["network.augment_channels is -1", "at least 0"]),
    ],
)
def test_errors(make_dit, options, words):
    with pytest.raises(ValueError) as error:
        make_dit(**options)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)
