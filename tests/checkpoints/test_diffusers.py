import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from consistency.checkpoints.diffusers import read_diffusers, save_pipeline
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM, Flow, TrigFlow
from consistency.models.unet import UNet
from consistency.noise.grids import karras_grid
from consistency.ops import image_seeds, randn_of_seeds
from consistency.sampling.samplers import ConsistencySampler

ADM = {
    "image_size": 16,
    "in_channels": 3,
    "channels": 32,
    "channel_mult": [1, 2, 2],
    "num_blocks": 1,
    "attention_resolutions": [8, 4],
    "head_channels": 16,
    "skip_scale": 1.0,
    "norm_eps": 1e-5,
    "norm_groups": 32,
    "adm": True,
}


@pytest.fixture
def make():
    """A consistency model with random weights everywhere (a fresh ADM is exactly zero)."""

    def build(parametrization=EDM(boundary=0.002, noise_scale=250.0), **options):  # noqa: B008 (frozen)
        network = UNet(**{**ADM, **options})
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.1)
        return Denoiser(network, parametrization).eval()

    return build


@pytest.mark.parametrize("mid_sigmas", [(), "one"], ids=["one step", "two steps"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 5, "scale_shift": True},
        {"conv_resample": True, "in_channels": 1},
        {"head_channels": None, "num_heads": 2, "channel_mult": [1, 2], "attention_resolutions": [8]},
        {"norm_groups": None, "channels": 128, "channel_mult": [1], "image_size": 4, "attention_resolutions": []},
        {"emb_channel_mult": 2},
    ],
    ids=["plain", "labels and AdaGN", "strided convolutions", "fixed heads", "groups of EDM", "short embedding"],
)
def test_pipeline_draws_our_images(make, tmp_path, options, mid_sigmas):
    diffusers = pytest.importorskip("diffusers")
    denoiser = make(**options)
    save_pipeline(denoiser, tmp_path / "pipe")
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "pipe")
    pipeline.set_progress_bar_config(disable=True)
    seeds = image_seeds(0, range(3))
    labels = torch.tensor([0, 4, 2]) if denoiser.num_classes else None
    steps, levels = {"num_inference_steps": 1}, ()
    if mid_sigmas:
        # Its timesteps count a grid of 40 levels down from sigma_max.
        steps, levels = {"num_inference_steps": None, "timesteps": [22, 0]}, (float(karras_grid(40).flip(0)[22]),)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    theirs = pipeline(batch_size=3, class_labels=labels, generator=generators, output_type="np", **steps).images
    randn_like = randn_of_seeds(seeds, denoiser.image_shape)
    ours = ConsistencySampler(levels)(denoiser, randn_like(torch.empty(0)), labels, randn_like)
    ours = (ours.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1)
    assert float((ours - torch.from_numpy(theirs)).abs().max()) < 1e-3
    assert float(ours.std()) > 0.01


@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 5, "scale_shift": True}, {"conv_resample": True}, {"num_classes": 128}]
)
def test_comes_back_as_it_went(make, tmp_path, options):
    pytest.importorskip("diffusers")
    denoiser = make(**options)
    network, noise = read_diffusers(save_pipeline(denoiser, tmp_path / "pipe"))
    assert network.config == denoiser.network.config
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in denoiser.network.state_dict().items())
    assert noise == {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adm": False}, r"DDPM\+\+ or NCSN\+\+"),
        ({"parametrization": EDM(boundary=0.002)}, r"250 ln\(sigma\), this model has noise_scale 0.25"),
        ({"parametrization": Flow(0.002, 250.0)}, "EDM's parametrization, this model has Flow"),
        ({"parametrization": TrigFlow()}, "EDM's parametrization, this model has TrigFlow"),
        ({"parametrization": EDM(noise_scale=250.0)}, "a diffusion model, or ECT"),
        ({"norm_groups": None}, r"one number of groups, these have \[8, 16, 24, 32\] .*network\.norm_groups=32"),
        (
            {"head_channels": None, "num_heads": 2, "attention_resolutions": [16, 8]},
            r"one width, these have \[16, 32\]",
        ),
        ({"channel_mult": [2, 2]}, "channel_mult starts with 1"),
        ({"fourier_scale": 16.0}, "Fourier"),
        ({"augment_channels": 9}, "augmentation"),
        ({"skip_scale": 0.5}, "skip_scale"),
        ({"input_pyramid": True}, "pyramid"),
        ({"resample_filter": [1, 3, 3, 1]}, "filter"),
        ({"noise_channel_mult": 2}, "noise embedding"),
    ],
)
def test_model_that_diffusers_cannot_hold_is_refused_with_the_reason(make, tmp_path, options, words):
    with pytest.raises(ValueError, match=f"diffusers cannot hold this model: .*{words}"):
        save_pipeline(make(**options), tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


def test_network_of_ones_own_is_refused(tiny_network, tmp_path):
    with pytest.raises(ValueError, match="diffusers cannot hold this model: its network is a TinyNetwork, not a UNet"):
        save_pipeline(Denoiser(tiny_network(), EDM(boundary=0.002, noise_scale=250.0)), tmp_path / "pipe")


class TestReading:
    @pytest.fixture
    def folder(self, make, tmp_path):
        pytest.importorskip("diffusers")
        return save_pipeline(make(), tmp_path / "pipe")

    def change(self, folder, **settings):
        file = folder / "unet" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"freq_shift": 1}, "freq_shift=1"),
            ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier"),
            ({"down_block_types": ["SkipDownBlock2D"] * 3}, "SkipDownBlock2D"),
            ({"downsample_type": "conv"}, "resamples in two ways"),
            ({"out_channels": 6}, "as many channels"),
            ({"attn_norm_num_groups": 16}, "attn_norm_num_groups is 16"),
            ({"layers_per_block": [1, 2]}, "not a network of a diffusers pipeline: TypeError"),
            ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ],
    )
    def test_refuses_other_networks(self, folder, settings, words):
        self.change(folder, **settings)
        with pytest.raises(ValueError, match=words):
            read_diffusers(folder)

    def test_refuses_missing_parts(self, folder):
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"no weights; expected diffusion_pytorch_model\.safetensors"):
            read_diffusers(folder)
        (folder / "scheduler" / "scheduler_config.json").unlink()
        with pytest.raises(ValueError, match=r"scheduler_config\.json is missing"):
            read_diffusers(folder)

    def test_refuses_missing_weights(self, folder):
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        state.pop("mid_block.attentions.0.to_q.bias")
        save_file(state, file)
        with pytest.raises(ValueError, match="to_"):
            read_diffusers(folder)
