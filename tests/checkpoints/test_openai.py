import pytest
import torch

from consistency.checkpoints.openai import read_openai
from consistency.models.denoiser import Denoiser
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
    denoiser = Denoiser(network, boundary=boundary, noise_scale=noise_scale)
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


def test_reads_half_precision_and_flat_attention_weights(imported):
    def change(state):
        flat = {k: v.squeeze(-1) for k, v in state.items() if "qkv.weight" in k or "proj_out.weight" in k}
        return {key: value.half() for key, value in (state | flat).items()}

    network, tensors = imported("openai_unet_class_cond", change)
    assert network.stem.weight.dtype == torch.float32
    assert error(network, tensors) < 0.02


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
    ],
)
def test_refuses_other_files(imported, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        imported("openai_unet_class_cond", change)
    assert "\n" not in str(caught.value)


def test_file_that_runs_something_is_refused_and_does_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"a": Evil()}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"more than tensors.*exec") as caught:
        read_openai(tmp_path / "file.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
