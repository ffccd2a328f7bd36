"""Counted operations are those of the layers, and nothing needs memory or a device."""

import pytest

from consistency.models.flops import flops_of_image


def test_one_convolution_by_hand(make_denoiser):
    config = make_denoiser().config
    network = config["network"]
    wider = {**config, "network": {**network, "arguments": {**network["arguments"], "num_blocks": 3}}}
    # Blocks of 8 channels at 4x4: two 3x3 convolutions and an embedding layer each; skips of the decoder are 1x1.
    block = 2 * (2 * 9 * 8 * 8 * 16) + 2 * 32 * 8
    decoder = block + 2 * 9 * 8 * 8 * 16 + 2 * 16 * 8 * 16  # its first convolution takes 16 channels
    forward = flops_of_image(wider, 1) - flops_of_image(wider) - (flops_of_image(config, 1) - flops_of_image(config))
    assert forward == 2 * block + 2 * decoder


def test_passes_add_up_and_labels_are_given(make_denoiser):
    config = make_denoiser(num_classes=10, attention_resolutions=[4]).config
    none, one, three = (flops_of_image(config, passes) for passes in (0, 1, 3))
    assert three - none == 3 * (one - none)
    assert 2.5 < none / (one - none) < 3.1  # backward costs twice the forward pass, but for the first layer


@pytest.mark.slow
def test_published_network_needs_no_memory():
    import torch

    from consistency.models.denoiser import Denoiser
    from consistency.models.unet import UNet

    with torch.device("meta"):
        config = Denoiser(UNet(image_size=32, in_channels=3)).config  # DDPM++ of EDM
    assert 41e9 < flops_of_image(config, 1) - flops_of_image(config) < 44e9
