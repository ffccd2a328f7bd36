"""Compiled and eager runs continue each other's checkpoints; on the backends that need no compiler."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from composing import composed
from consistency.checkpoints.native import load_model
from consistency.commands import checks
from consistency.commands.start import start
from consistency.commands.train import train
from consistency.models.averages import frozen_copy
from consistency.models.execution import configure_execution
from consistency.ops import same_randomness
from consistency.training.required import StopAtStep


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(folder, name, *overrides):
    settings = ["experiment=smoke_ct", "trainer.max_steps=6", "callbacks.checkpoint.every_n_steps=3", "logger=none"]
    settings += ["network.channel_mult=[1]", "network.num_blocks=1", "callbacks.sample_grid=null"]
    settings += [f"run_name={name}", f"paths.output_dir={folder / name}", *overrides]
    cfg = composed("train", *settings)
    checks.check("train", cfg)
    start(cfg, lambda: train(cfg))
    return torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)


def crash(folder, name, *overrides):
    """Train until a checkpoint is written, and a little further."""

    def fail(callback, trainer, pl_module, *_):
        if pl_module.progress.step == 4:
            raise RuntimeError("crash")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopAtStep, "on_train_batch_end", fail)
        with pytest.raises(RuntimeError, match="crash"):
            run(folder, name, *overrides)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(tmp_path_factory.mktemp("straight"), "straight")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("aot_eager", "false"), ("false", "eager")])
def test_runs_continue_each_other(straight, tmp_path, first, then):
    crash(tmp_path, "run", f"compile={first}")
    end = run(tmp_path, "run", f"compile={then}")
    assert counters["stats"]["unique_graphs"] > 0
    assert end["state_dict"].keys() == straight["state_dict"].keys()
    assert any(key.startswith("target.") for key in end["state_dict"])
    assert end["state_dict"]["progress._extra_state"] == straight["state_dict"]["progress._extra_state"]
    averages = (x["callbacks"]["WeightEMA"]["averages"]["ema0.999"] for x in (end, straight))
    for one, other in ((end["state_dict"], straight["state_dict"]), tuple(averages)):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-5)
    exported, _ = load_model(tmp_path / "run")
    assert exported.network._compiled_call_impl is None


@pytest.mark.slow
def test_both_passes_share_one_dropout_mask(make_denoiser):
    online = make_denoiser(dropout=0.5).train()
    method = torch.nn.Module()
    method.denoiser, method.target = online, frozen_copy(online)
    for network in (method.denoiser, method.target):
        configure_execution(network, compile="aot_eager")
    assert online.network._compiled_call_impl is not None
    x, sigma = torch.randn(8, 1, 4, 4), torch.full((8,), 3.0)
    with same_randomness(x.device) as rewind:
        prediction = online(x, sigma)
        rewind()
        with torch.no_grad():
            reference = method.target(x, sigma)
    torch.testing.assert_close(prediction, reference)
    assert not torch.allclose(prediction, online(x, sigma), atol=1e-2)  # another mask


def test_in_place_and_copies_are_eager(make_denoiser):
    denoiser = make_denoiser()
    before = list(denoiser.state_dict())
    configure_execution(denoiser)
    assert denoiser.network._compiled_call_impl is None
    configure_execution(denoiser, compile="eager")
    assert list(denoiser.state_dict()) == before
    for copied in (copy.deepcopy(denoiser), frozen_copy(denoiser)):
        assert copied.network._compiled_call_impl is None


def test_refuses_an_unknown_backend(make_denoiser):
    with pytest.raises(ValueError, match=r"compile is fast; allowed: true, false, reduce-overhead, .*inductor"):
        configure_execution(make_denoiser(), compile="fast")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("true", "false"), ("false", "true")])
def test_moments_follow_the_memory_order_of_their_weights(tmp_path, first, then):
    """Fused optimizers go through memory as it lies: moments in another order would fall on the wrong weights."""
    common = ["optimizer=adamw", "+optimizer.fused=true", "optimizer.lr=0.01", "network.channels=16"]
    straight = run(tmp_path, "straight", *common, f"channels_last={first}")
    crash(tmp_path, "run", *common, f"channels_last={first}")
    end = run(tmp_path, "run", *common, f"channels_last={then}")
    for key, value in straight["state_dict"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(end["state_dict"][key], value, rtol=1e-3, atol=1e-4)
