"""How a network runs leaves what it computes, up to rounding, and its names."""

import copy

import pytest
import torch

from consistency.checkpoints.native import load_denoiser, save_denoiser
from consistency.models.execution import begin_step, configure_execution, matmul_in_tf32


def scene(denoiser):
    x = 3 * torch.randn(4, *denoiser.image_shape)
    return x, torch.tensor([0.01, 0.5, 3.0, 80.0])


def test_defaults_change_no_bit(make_denoiser):
    denoiser = make_denoiser(channels=16, channel_mult=[1, 1], attention_resolutions=[2])
    x, sigma = scene(denoiser)
    before = denoiser(x, sigma)
    configure_execution(denoiser)
    assert torch.equal(denoiser(x, sigma), before)


def test_channels_last_computes_the_same_under_the_same_names(make_denoiser, tmp_path):
    denoiser = make_denoiser(channels=16, channel_mult=[1, 1], attention_resolutions=[2])
    fast = copy.deepcopy(denoiser)
    configure_execution(fast, channels_last=True)
    x, sigma = scene(denoiser)
    torch.testing.assert_close(fast(x, sigma), denoiser(x, sigma), rtol=1e-4, atol=1e-4)
    weight = fast.network.encoder[0].conv0.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    # Either takes the other's weights, keeps its own layout, and exports.
    assert list(fast.state_dict()) == list(denoiser.state_dict())
    save_denoiser(fast, tmp_path / "model", {})
    assert torch.equal(load_denoiser(tmp_path / "model")(x, sigma), denoiser(x, sigma))
    fast.load_state_dict(denoiser.state_dict())
    assert not fast.network.encoder[0].conv0.weight.is_contiguous()


def test_activations_stay_channels_last_from_the_stem_to_the_end(make_denoiser):
    denoiser = make_denoiser(channels=16, channel_mult=[1, 1], attention_resolutions=[2])
    configure_execution(denoiser, channels_last=True)
    layouts = []
    for block in [*denoiser.network.encoder, *denoiser.network.middle, *denoiser.network.decoder]:
        block.register_forward_hook(
            lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    denoiser(*scene(denoiser))
    assert all(layouts)


def test_autocast_is_around_the_network_alone(make_denoiser):
    denoiser = make_denoiser(channels=16, channel_mult=[1, 1], attention_resolutions=[2])
    x, sigma = scene(denoiser)
    full = denoiser(x, sigma)
    configure_execution(denoiser, precision="bf16")
    dtypes = []
    denoiser.network.register_forward_hook(lambda _, inputs, out: dtypes.append((inputs[0].dtype, out.dtype)))
    half = denoiser(x, sigma)
    assert dtypes == [(torch.float32, torch.bfloat16)]
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()
    # c_skip x is not rounded to bfloat16: at the boundary the model is the identity, to the last bit.
    at_boundary = torch.full((4,), denoiser.boundary)
    assert torch.equal(denoiser(x, at_boundary), x)


def test_refuses_what_does_not_exist(make_denoiser):
    with pytest.raises(ValueError, match="dtype is int8; allowed: fp32, bf16, fp16"):
        configure_execution(make_denoiser(), precision="int8")
    with pytest.raises(ValueError, match="dtype is fp16 on a CPU"):
        configure_execution(make_denoiser(), precision="fp16")


@pytest.mark.slow
def test_graphs_are_told_of_each_step(make_denoiser, monkeypatch):
    told = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append(1))
    denoiser = make_denoiser()
    begin_step(denoiser)
    assert not told
    configure_execution(denoiser, compile="reduce-overhead")
    begin_step(denoiser)
    assert told == [1]


def test_tf32_is_put_back():
    assert torch.get_float32_matmul_precision() == "highest"
    with matmul_in_tf32():
        assert torch.get_float32_matmul_precision() == "high"
    with matmul_in_tf32(False):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "highest"
