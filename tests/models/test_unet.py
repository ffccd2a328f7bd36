import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from consistency.models.layers import BlockStyle, FourierEmbedding, PositionalEmbedding, Resample, SelfAttention
from consistency.models.unet import UNet


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_positional_embedding_values():
    # DDPM++ of EDM at sigma = 0.5: [sin | cos], frequencies from 1 to exactly 1/10000.
    c_noise = 0.25 * math.log(0.5)
    embedding = PositionalEmbedding(128)(torch.tensor([c_noise, 0.0]))
    assert embedding.shape == (2, 128)
    assert float(embedding[0, 0]) == pytest.approx(-0.172421, abs=1e-6)
    assert float(embedding[0, 64]) == pytest.approx(0.985023, abs=1e-6)
    assert float(embedding[0, 63]) == pytest.approx(math.sin(c_noise / 10_000), rel=1e-5)
    assert embedding[1].tolist() == [0.0] * 64 + [1.0] * 64


def test_fourier_embedding_values():
    embed = FourierEmbedding(4, scale=16.0)
    embed.freqs.copy_(torch.tensor([1.0, 0.5]))
    angles = [2 * math.pi * 0.1, math.pi * 0.1]
    expected = [*map(math.sin, angles), *map(math.cos, angles)]  # EDM swaps the halves of its embedding
    assert_close(embed(torch.tensor([0.1])), torch.tensor([expected]))


@pytest.mark.parametrize("scale", [16.0, 0.02])
def test_fourier_frequencies_are_a_saved_buffer_of_the_given_scale(scale):
    embed = FourierEmbedding(20_000, scale)
    assert float(embed.freqs.std()) == pytest.approx(scale, rel=0.03)
    assert "freqs" in embed.state_dict()
    assert list(embed.parameters()) == []


DDPMPP = {"image_size": 32, "in_channels": 3}
NCSNPP = {
    **DDPMPP,
    "input_pyramid": True,
    "fourier_scale": 16.0,
    "noise_channel_mult": 2,
    "resample_filter": (1, 3, 3, 1),
}
ADM = {
    "image_size": 64,
    "in_channels": 3,
    "num_classes": 1000,
    "channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "num_blocks": 3,
    "attention_resolutions": (32, 16, 8),
    "head_channels": 64,
    "scale_shift": True,
    "skip_scale": 1.0,
    "norm_eps": 1e-5,
    "adm": True,
}
LSUN = {"image_size": 256, "num_classes": 0, "channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "num_blocks": 2}
FACES = {"image_size": 64, "channel_mult": (1, 2, 2, 2), "augment_channels": 9}


# Counted in the original code: NVlabs/edm, openai/consistency_models.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DDPMPP, 55_732_739),
        ({**DDPMPP, "augment_channels": 9}, 55_733_891),
        ({**DDPMPP, "num_classes": 10}, 55_734_147),
        ({**DDPMPP, "num_classes": 10, "augment_channels": 9}, 55_735_299),
        ({**DDPMPP, "num_blocks": 8}, 96_947_715),
        ({**DDPMPP, **FACES}, 61_805_571),
        (NCSNPP, 56_395_523),
        ({**NCSNPP, "augment_channels": 9}, 56_397_827),
        ({**NCSNPP, "num_classes": 10}, 56_398_339),
        ({**NCSNPP, "num_classes": 10, "augment_channels": 9}, 56_400_643),
        ({**NCSNPP, "num_blocks": 8}, 97_610_499),
        ({**NCSNPP, **FACES}, 62_761_091),
        (ADM, 295_899_267),
        ({**ADM, "scale_shift": False}, 282_168_003),
        ({**ADM, "num_blocks": 6}, 495_357_699),
        ({**ADM, "num_blocks": 6, "scale_shift": False}, 472_767_555),
        ({**ADM, **LSUN, "scale_shift": False}, 526_304_771),
    ],
)
def test_parameters_of_the_published_networks(options, expected):
    with torch.device("meta"):
        assert count(UNet(**options)) == expected


def test_parameters_of_the_tiny_network(make_unet):
    options = {"image_size": 8, "channels": 32, "channel_mult": [1, 1], "attention_resolutions": [4]}
    assert count(make_unet(**options)) == 309_345


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fourier_scale": 0.02, "noise_channel_mult": 2, "resample_filter": [1, 3, 3, 1], "input_pyramid": True},
        {"scale_shift": True, "skip_scale": 1.0, "head_channels": 8, "norm_eps": 1e-5, "adm": True},
    ],
    ids=["ddpmpp", "ncsnpp", "adm"],
)
def test_rows_of_a_batch_are_independent(make_unet, options):
    network = make_unet(
        image_size=8, in_channels=3, channels=16, channel_mult=[1, 2], attention_resolutions=[4], **options
    )
    x, c_noise = torch.randn(3, 3, 8, 8), torch.tensor([-1.5, 0.0, 1.0])
    out = network(x, c_noise)
    assert out.shape == x.shape
    assert_close(network(x[1:2], c_noise[1:2]), out[1:2], rtol=1e-4, atol=1e-4)
    # Both inputs matter.
    assert not torch.allclose(network(x, c_noise + 0.5), out, atol=1e-3)
    assert not torch.allclose(network(x + 0.5, c_noise), out, atol=1e-3)


def test_starts_near_zero(make_unet):
    network = make_unet(random_weights=False)
    assert float(network(torch.randn(2, 1, 4, 4), torch.zeros(2)).detach().abs().max()) < 1e-3


def test_classes(make_unet):
    network = make_unet(num_classes=3)
    x, c_noise = torch.randn(1, 1, 4, 4).expand(3, -1, -1, -1), torch.zeros(3)
    out = network(x, c_noise, torch.tensor([0, 1, 1]))
    assert_close(out[1], out[2])
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    with pytest.raises(ValueError, match="3 classes"):
        network(x, c_noise)


def test_label_embedding_has_unit_variance_inputs(make_unet):
    network = make_unet(num_classes=4)
    seen = []
    network.embed_label.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network(torch.zeros(2, 1, 4, 4), torch.zeros(2), torch.tensor([1, 3]))
    assert seen[0].tolist() == [[0, 2, 0, 0], [0, 0, 0, 2]]


@pytest.mark.parametrize(("limit", "active"), [(None, {16, 8, 4}), (16, {16, 8, 4}), (8, {8, 4}), (4, {4}), (2, set())])
def test_dropout_only_at_small_feature_maps(make_unet, monkeypatch, limit, active):
    seen, original = {}, F.dropout

    def dropout(x, p, training):
        assert training
        seen.setdefault(x.shape[-1], set()).add(p)
        return original(x, p, training)

    monkeypatch.setattr(F, "dropout", dropout)
    network = make_unet(image_size=16, channel_mult=[1, 1, 1], dropout=0.25, dropout_max_resolution=limit)
    network(torch.zeros(1, 1, 16, 16), torch.zeros(1))
    assert seen == {size: {0.25 if size in active else 0.0} for size in (16, 8, 4)}


def test_dropout_only_in_train_mode(make_unet):
    network, x, c_noise = make_unet(dropout=0.5), torch.randn(2, 1, 4, 4), torch.zeros(2)
    assert not torch.equal(network(x, c_noise), network(x, c_noise))
    network.eval()
    assert torch.equal(network(x, c_noise), network(x, c_noise))


def test_attention_follows_the_named_sizes(make_unet):
    network = make_unet(image_size=8, channel_mult=[1, 1], num_blocks=2, attention_resolutions=[8])
    assert [block.attention is not None for block in network.encoder] == [True, True, False, False, False]
    # DDPM++: in the decoder only the last block of a size attends.
    assert [block.attention is not None for block in network.decoder] == [
        False,
        False,
        False,
        False,
        False,
        False,
        True,
    ]
    assert [block.attention is not None for block in network.middle] == [True, False]


def test_attention_is_its_formula():
    attention = SelfAttention(8, BlockStyle(4, skip_scale=0.5, norm_eps=1e-6), num_heads=2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    x = torch.randn(2, 8, 2, 3)
    query, key, value = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)  # each [B, 8, 6]
    heads = []
    for rows in (slice(0, 4), slice(4, 8)):
        weights = torch.einsum("bci,bcj->bij", query[:, rows], key[:, rows]).div(4**0.5).softmax(dim=-1)
        heads.append(torch.einsum("bij,bcj->bci", weights, value[:, rows]))
    out = attention.proj(torch.cat(heads, dim=1).unflatten(2, (2, 3)))
    assert_close(attention(x), (x + out) * 0.5, rtol=1e-4, atol=1e-4)


def test_box_resampling_averages_and_repeats():
    x = torch.randn(2, 3, 4, 4)
    assert_close(Resample((1, 1), up=False)(x), F.avg_pool2d(x, 2))
    assert_close(Resample((1, 1), up=True)(x), F.interpolate(x, scale_factor=2, mode="nearest"))


@pytest.mark.parametrize("up", [True, False])
def test_smooth_resampling_keeps_constants_inside(up):
    out = Resample((1, 3, 3, 1), up=up)(torch.ones(1, 2, 8, 8))
    assert out.shape[-1] == (16 if up else 4)
    assert_close(out[..., 1:-1, 1:-1], torch.ones_like(out[..., 1:-1, 1:-1]))


def test_config_rebuilds_the_network(make_unet):
    network = make_unet(channel_mult=(1, 2), fourier_scale=0.02, dropout=0.1)
    again = UNet(**network.config)
    assert again.config == network.config
    again.load_state_dict(network.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_size": 6, "channel_mult": [1, 1, 1]},
            r"network\.channel_mult is \[1, 1, 1\].*data\.image_size=6 can be halved 2 times",
        ),
        ({"dropout": 1.0}, r"network\.dropout is 1\.0; allowed: a number from 0 to below 1"),
        ({"channels": 8, "head_channels": 16}, "heads of 16"),
        ({"channels": 8, "num_heads": 3}, "3 heads"),
        ({"channels": 2}, "noise embedding"),
        ({"channels": 10**12}, r"network\.channels is 1000000000000; allowed: an integer, at least 1"),
        ({"channels": True}, r"network\.channels is True; allowed: an integer, at least 1"),
        ({"num_blocks": 0}, r"network\.num_blocks is 0; allowed: an integer, at least 1"),
        ({"head_channels": 0}, r"network\.head_channels is 0; allowed: an integer, at least 1 or null"),
        ({"num_heads": 0}, r"network\.num_heads is 0; allowed: an integer, at least 1"),
        ({"attention_resolutions": 4}, r"network\.attention_resolutions is 4; allowed: a list"),
        ({"fourier_scale": -1.0}, r"network\.fourier_scale is -1\.0; allowed: a positive number or null"),
        ({"resample_filter": []}, r"network\.resample_filter is \[\]; allowed: a list of an even number of taps"),
        ({"resample_filter": [1, 2, 1]}, r"network\.resample_filter is \[1, 2, 1\].* even number of taps"),
        ({"channel_mult": []}, r"network\.channel_mult is \[\]; allowed: a list"),
        ({"num_classes": -1}, r"network\.num_classes is -1; allowed: an integer, at least 0"),
        ({"scale_shift": 1}, r"network\.scale_shift is 1; allowed: true or false"),
        ({"norm_eps": float("nan")}, r"network\.norm_eps is nan; allowed: a positive number"),
    ],
)
def test_refuses(make_unet, options, message):
    with pytest.raises(ValueError, match=message):
        make_unet(**options)


@pytest.mark.parametrize("adm", [False, True])
def test_augmentation_labels(make_unet, adm):
    network = make_unet(augment_channels=9, adm=adm)
    x, c_noise, augment = torch.randn(2, 1, 4, 4), torch.zeros(2), torch.randn(2, 9)
    none = network(x, c_noise)
    assert torch.equal(network(x, c_noise, None, torch.zeros(2, 9)), none)
    assert not torch.allclose(network(x, c_noise, None, augment), none, atol=1e-3)
    # Without them the layer still takes part: DDP waits for the gradient of every parameter.
    none.sum().backward()
    assert network.embed_augment.weight.grad is not None
    with pytest.raises(ValueError, match="augment_channels=9"):
        make_unet()(x, c_noise, None, augment)


def test_adm_starts_at_exactly_zero(make_unet):
    network = make_unet(random_weights=False, adm=True, image_size=8, channel_mult=[1, 1], attention_resolutions=[4])
    assert float(network(torch.randn(2, 1, 8, 8), torch.zeros(2)).detach().abs().max()) == 0
    assert all(float(block.conv1.weight.detach().abs().max()) == 0 for block in network.encoder)
    assert float(network.encoder[0].conv0.weight.detach().std()) > 0.01


def test_fresh_labels_of_adm_are_unit_normal(make_unet):
    weight = make_unet(random_weights=False, adm=True, num_classes=50, channels=32).embed_label.weight
    assert float(weight.detach().std()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("adm", [False, True])
def test_strided_convolutions_between_the_sizes(make_unet, adm):
    network = make_unet(conv_resample=True, adm=adm, image_size=8, channel_mult=[1, 1])
    assert network(torch.randn(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)
