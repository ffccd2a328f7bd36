import os

import pytest
import torch

from consistency.checkpoints.edm import read_edm
from consistency.checkpoints.layouts import openai_modules
from consistency.checkpoints.openai import read_openai
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM
from consistency.models.unet import UNet
from consistency.ops import append_dims

# What the files do not say.
OPTIONS = {
    "openai_unet_class_cond": {"head_channels": 16},
    "openai_unet_lsun_like": {"head_channels": 32, "image_size": 16},
    "openai_unet_plain_resample": {"num_heads": 2},
}


@pytest.fixture
def imported(published, tmp_path):
    def load(name, change=lambda state: state, **options):
        state, tensors, _ = published(name)
        torch.save(change(state), tmp_path / "file.pt")
        return read_openai(tmp_path / "file.pt", **{**OPTIONS[name], **options}).eval(), tensors

    return load


@torch.no_grad()
def error(network, tensors, noise_scale=None, boundary=0.002):
    """Largest difference from the numbers of the original code: of the raw network, or preconditioned."""
    labels = tensors.get("class_labels")
    if noise_scale is None:
        return float((network(tensors["x"], tensors["c_noise"], labels) - tensors["network_output"]).abs().max())
    denoiser = Denoiser(network, EDM(boundary=boundary, noise_scale=noise_scale))
    noisy = tensors["x"] * append_dims(tensors["sigma"], 4)
    expected = tensors["denoised_boundary" if boundary else "denoised_edm"]
    return float((denoiser(noisy, tensors["sigma"], labels) - expected).abs().max())


@pytest.mark.parametrize("name", OPTIONS)
def test_output_is_that_of_the_original_code(imported, name):
    network, tensors = imported(name)
    assert error(network, tensors) < 2e-5
    for boundary in (0.0, 0.002):
        assert error(network, tensors, noise_scale=250.0, boundary=boundary) < 2e-5


def test_wrong_noise_scale_is_far_off(imported):
    network, tensors = imported("openai_unet_class_cond")
    assert error(network, tensors, noise_scale=0.25) > 0.1


def test_wrong_order_of_attention_rows_is_far_off(imported):
    # (head, three, dim) is the order of guided-diffusion's class of the same name.
    def shuffle(state):
        rows = {key: value for key, value in state.items() if ".qkv." in key}
        heads = {key: value.shape[0] // 3 // 16 for key, value in rows.items()}
        return state | {
            key: value.reshape(heads[key], 3, 16, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
            for key, value in rows.items()
        }

    network, tensors = imported("openai_unet_class_cond", shuffle)
    assert error(network, tensors) > 0.1


def test_wrong_number_of_heads_is_far_off(imported):
    network, tensors = imported("openai_unet_class_cond", head_channels=64)
    assert error(network, tensors) > 0.01


def test_reads_half_precision(imported):
    network, tensors = imported("openai_unet_class_cond", lambda state: {k: v.half() for k, v in state.items()})
    assert network.stem.weight.dtype == torch.float32
    assert error(network, tensors) < 0.02


def state_of(network):
    """The state dict that OpenAI's code would have for one of our networks."""
    modules = openai_modules(network)
    state = {f"{modules[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in network.state_dict().items()}
    return state | ({"label_emb.weight": state["label_emb.weight"].T} if network.num_classes else {})


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 128},  # a label table that is square
        {"channel_mult": [2, 2]},
        {"channels": 64, "channel_mult": [1, 1.5]},
        {"emb_channel_mult": 2},
        {"channel_mult": [1], "attention_resolutions": []},
        {"channels": 128, "num_blocks": 1, "norm_groups": None},
    ],
)
def test_settings_are_read_off_names_and_shapes(tmp_path, options):
    small = {"image_size": 16, "in_channels": 3, "channels": 32, "channel_mult": [1, 2], "num_blocks": 2}
    fixed = {"attention_resolutions": [8], "head_channels": 16, "skip_scale": 1.0, "norm_eps": 1e-5, "adm": True}
    network = UNet(**{**small, **fixed, "norm_groups": 32, **options})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    torch.save(state_of(network), tmp_path / "file.pt")
    again = read_openai(tmp_path / "file.pt", image_size=16, head_channels=16)
    assert again.config == network.config
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())


def test_image_size_defaults_to_that_of_the_published_networks(imported):
    assert imported("openai_unet_class_cond")[0].image_size == 16
    network = imported("openai_unet_lsun_like", image_size=None)[0]
    assert network.image_size == 32
    assert network.config["attention_resolutions"] == [16, 8]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda state: {"weight": torch.zeros(1)},
            "not a network of OpenAI's layout: it lacks input_blocks.0.0.weight",
        ),
        (lambda state: state | {"extra.weight": torch.zeros(1)}, "nothing takes extra.weight"),
        (
            lambda state: {k: v for k, v in state.items() if k != "middle_block.2.in_layers.0.bias"},
            "it lacks middle_bl",
        ),
        (lambda state: state | {"out.2.weight": torch.zeros(6, 32, 3, 3)}, "predicts 6 channels from 3"),
        (lambda state: state | {"time_embed.2.bias": torch.zeros(7)}, r"time_embed.2.bias is \[7\], .* needs \[128\]"),
        (lambda state: {"model": state}, "not a state dict"),
        (lambda state: state | {"out.2.bias": torch.full((3,), torch.inf)}, r"out\.2\.bias holds NaN or infinity"),
        # guided-diffusion's attention is one-dimensional, and its rows are in another order.
        (
            lambda state: state | {k: v.squeeze(-1) for k, v in state.items() if k.endswith("qkv.weight")},
            "of three dimensions, as guided-diffusion",
        ),
        (
            lambda state: state | {"time_embed.0.weight": torch.zeros(())},
            "not a network of OpenAI's layout: IndexError",
        ),
    ],
)
def test_refuses_other_files(imported, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        imported("openai_unet_class_cond", change)
    assert "\n" not in str(caught.value)


def test_cut_short(tmp_path):
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "file.pt")
    os.truncate(tmp_path / "file.pt", 2000)
    for read in (read_openai, read_edm):
        with pytest.raises(ValueError, match=r"file\.pt is not a readable .*: it is cut short or damaged$"):
            read(tmp_path / "file.pt")


def test_file_that_runs_something_is_refused_and_does_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"a": Evil()}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"asks for exec") as caught:
        read_openai(tmp_path / "file.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
