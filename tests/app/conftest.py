"""A studio around a tiny model of 8x8 images with random weights: it draws nonsense, but a function of its inputs."""

import pytest
import torch

from consistency.api import Model
from consistency.app.studio import Studio
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM
from consistency.models.unet import UNet


def make_studio(channels=1, label_dropout=0.0, **options):
    torch.manual_seed(0)
    small = {"channels": 8, "channel_mult": [1], "num_blocks": 1, "attention_resolutions": []}
    network = UNet(image_size=8, in_channels=channels, **{**small, "num_classes": 10, **options})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    denoiser = Denoiser(network, EDM(boundary=0.002), label_dropout=label_dropout)
    return Studio(Model(denoiser, {"method": "ConsistencyTraining"}, device="cpu"))


@pytest.fixture(scope="module")
def studio():
    return make_studio()


@pytest.fixture
def new_studio():
    return make_studio


@pytest.fixture
def colour_studio():
    return make_studio(3, num_classes=0)
