import json
import os
import pickle
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from consistency.checkpoints.native import (
    CHECKPOINT,
    MODEL_FOLDER,
    load_denoiser,
    load_model,
    read_checkpoint,
    save_denoiser,
)
from consistency.methods.metrics import l2
from consistency.methods.training import ConsistencyTraining
from consistency.noise.curricula import FixedLevels
from consistency.noise.levels import GridPairs, uniform_index
from consistency.noise.weightings import uniform

INFO = {"method": "ConsistencyTraining", "weights": "ema0.9", "images_seen": 64}


@pytest.fixture
def denoiser(make_denoiser):
    """Conditional, with a Fourier embedding (a random buffer) and settings that are not the defaults."""
    return make_denoiser(num_classes=3, fourier_scale=0.5, dropout=0.3, boundary=0.01)


@pytest.fixture
def average(denoiser):
    return {key: value.detach() * 0.5 for key, value in denoiser.named_parameters()}


@pytest.fixture
def outputs():
    x, sigma = torch.randn(3, 1, 4, 4), torch.tensor([0.02, 1.0, 40.0])

    @torch.no_grad()
    def of(denoiser):
        return denoiser.eval()(x, sigma, torch.tensor([0, 1, 2]))

    return of


@pytest.fixture
def averaged(make_denoiser, denoiser, average, outputs):
    """Outputs with the average in place of the weights."""
    other = make_denoiser(num_classes=3, fourier_scale=0.5, dropout=0.3, boundary=0.01)
    other.load_state_dict(denoiser.state_dict() | average)
    return outputs(other)


@pytest.fixture
def write_ckpt(denoiser, average):
    """A checkpoint as a run writes it, with two averages, or without."""

    def write(path, averages=True):
        method = ConsistencyTraining(
            denoiser,
            levels=GridPairs(FixedLevels(4), uniform_index, sigma_min=0.01),
            metric=l2,
            weighting=uniform,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            target_decay=lambda step: 0.5,
        )
        method.progress.step, method.progress.images_seen = 16, 64
        more = {key: value * 0 for key, value in average.items()}
        checkpoint = {
            "state_dict": method.state_dict(),
            "callbacks": {"WeightEMA": {"averages": {"ema0.9": average, "ema0.5": more}}} if averages else {},
            "consistency": {"config": "seed: 0", "method": "ConsistencyTraining"},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)
        return path

    return write


def test_model_folder(denoiser, outputs, tmp_path):
    folder = save_denoiser(denoiser, tmp_path / "new" / "model", INFO)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded, info = load_model(folder)
    assert info == INFO
    assert loaded.config == denoiser.config
    assert not loaded.training
    assert torch.equal(outputs(loaded), outputs(denoiser))
    assert torch.equal(outputs(load_denoiser(str(folder))), outputs(denoiser))


def test_fourier_buffer_survives(denoiser, make_denoiser, write_ckpt, tmp_path):
    buffers = dict(denoiser.named_buffers())
    name = "network.embed_noise.freqs"
    fresh = dict(make_denoiser(num_classes=3, fourier_scale=0.5).named_buffers())
    assert not torch.equal(fresh[name], buffers[name])  # drawn anew for each network
    for source in (save_denoiser(denoiser, tmp_path / "model", INFO), write_ckpt(tmp_path / "last.ckpt")):
        assert torch.equal(dict(load_denoiser(source).named_buffers())[name], buffers[name])


def test_config_is_plain_json(denoiser, tmp_path):
    stored = json.loads((save_denoiser(denoiser, tmp_path, INFO) / "config.json").read_text())
    assert stored["format"] == 3
    assert stored["info"] == INFO
    settings = stored["denoiser"]
    assert settings["kind"] == "consistency"
    assert settings["parametrization"]["name"] == "edm"
    assert settings["parametrization"]["arguments"]["boundary"] == 0.01
    assert settings["network"]["name"] == "unet"
    assert settings["network"]["arguments"]["fourier_scale"] == 0.5


def test_average_replaces_the_weights(denoiser, average, averaged, outputs, tmp_path):
    raw = outputs(denoiser)
    loaded = load_denoiser(save_denoiser(denoiser, tmp_path, INFO, weights=average))
    assert torch.equal(outputs(loaded), averaged)
    assert not torch.equal(averaged, raw)
    assert torch.equal(outputs(denoiser), raw)  # the model itself stays


def test_saving_again_replaces(denoiser, averaged, average, outputs, tmp_path):
    save_denoiser(denoiser, tmp_path, INFO)
    save_denoiser(denoiser, tmp_path, {**INFO, "images_seen": 128}, average)
    loaded, info = load_model(tmp_path)
    assert info["images_seen"] == 128
    assert torch.equal(outputs(loaded), averaged)


@pytest.mark.parametrize("where", ["file", "run directory"])
def test_checkpoint_of_a_run(denoiser, averaged, outputs, write_ckpt, tmp_path, where):
    path = write_ckpt(tmp_path / CHECKPOINT)
    source = path if where == "file" else tmp_path
    first, info = load_model(source)
    assert info == {"method": "ConsistencyTraining", "weights": "ema0.9", "step": 16, "images_seen": 64}
    assert not first.training
    assert first.config == denoiser.config
    assert torch.equal(outputs(first), averaged)
    raw, info = load_model(source, "raw")
    assert info["weights"] == "raw"
    assert torch.equal(outputs(raw), outputs(denoiser))
    other, info = load_model(source, "ema0.5")
    assert info["weights"] == "ema0.5"
    assert not any(parameter.any() for parameter in other.parameters())


def test_checkpoint_without_averages_holds_raw_weights(denoiser, outputs, write_ckpt, tmp_path):
    loaded, info = load_model(write_ckpt(tmp_path / "last.ckpt", averages=False))
    assert info["weights"] == "raw"
    assert torch.equal(outputs(loaded), outputs(denoiser))


def test_run_directory_prefers_what_was_exported(denoiser, outputs, write_ckpt, tmp_path):
    write_ckpt(tmp_path / CHECKPOINT)
    save_denoiser(denoiser, tmp_path / MODEL_FOLDER, {**INFO, "weights": "exported"})
    loaded, info = load_model(tmp_path)
    assert info["weights"] == "exported"
    assert torch.equal(outputs(loaded), outputs(denoiser))
    # Weights with a name are in the checkpoint.
    assert load_model(tmp_path, "ema0.9")[1]["weights"] == "ema0.9"


def test_missing_things_are_named(denoiser, write_ckpt, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("nothing")
    folder = save_denoiser(denoiser, tmp_path / "model", INFO)
    checkpoint = write_ckpt(tmp_path / "last.ckpt")
    bare = write_ckpt(tmp_path / "bare.ckpt", averages=False)
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    for source, weights, words in (
        (tmp_path / "nowhere", None, r"nowhere: it does not exist; expected a run directory"),
        (tmp_path / "empty", None, r"empty: it has no model/, config\.json or checkpoints/last\.ckpt"),
        (tmp_path / "notes.txt", None, r"no model at .*notes\.txt"),
        (folder, "raw", r"holds the weights ema0\.9, not raw"),
        (checkpoint, "ema0.7", r"holds the weights \['raw', 'ema0\.9', 'ema0\.5'\], not ema0\.7"),
        (bare, "ema0.9", r"holds the weights \['raw'\], not ema0\.9"),
        (tmp_path / "other.ckpt", None, r"other\.ckpt is a checkpoint, but not of a method of this project"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            load_model(source, weights)
        assert "\n" not in str(caught.value)
    assert load_model(folder, "ema0.9")[1] == INFO


@pytest.mark.parametrize("number", [4, None])
def test_unknown_format(denoiser, tmp_path, number):
    file = save_denoiser(denoiser, tmp_path, INFO) / "config.json"
    stored = json.loads(file.read_text())
    stored["format"] = number
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=rf"config\.json has format {number}, this version reads 3"):
        load_model(tmp_path)


def network_of(stored):
    return stored["denoiser"]["network"]["arguments"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda stored: network_of(stored).update(colour=1),
            "unexpected keyword argument 'colour'",
        ),
        (lambda stored: stored.pop("denoiser"), "'denoiser'"),
        (lambda stored: network_of(stored).update(channels=12), "size mismatch|Unexpected|Missing"),
        (
            lambda stored: network_of(stored).update(num_blocks=0),
            "network.num_blocks is 0; allowed: an integer, at least 1",
        ),
        (
            lambda stored: stored["denoiser"]["network"].update(name="mine"),
            "network 'mine' is not registered here.*imports",
        ),
        (
            lambda stored: stored["denoiser"].update(kind="other"),
            "kind is other; allowed: diffusion, consistency, flow_map",
        ),
        (
            lambda stored: stored["denoiser"]["parametrization"]["arguments"].update(boundary=-1),
            "boundary must be 0 or more, got -1",
        ),
    ],
)
def test_changed_settings_are_one_line(denoiser, tmp_path, change, words):
    file = save_denoiser(denoiser, tmp_path, INFO) / "config.json"
    stored = json.loads(file.read_text())
    change(stored)
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=rf"the model folder .* cannot be loaded: .*({words})") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_unsafe_pickle_is_refused_unexecuted(tmp_path, write):
    marker, path = tmp_path / "marker", tmp_path / "last.ckpt"
    write({"state_dict": {}, "more": Trap(marker)}, path)
    for load in (load_model, read_checkpoint):
        with pytest.raises(ValueError, match=r"last\.ckpt is not a readable checkpoint") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    # The trap is one.
    with suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_torn_checkpoint_is_named(write_ckpt, tmp_path, keep):
    path = write_ckpt(tmp_path / "last.ckpt")
    size = path.stat().st_size
    os.truncate(path, keep if keep in (0, 100) else int(keep * size))
    with pytest.raises(ValueError, match=r"last\.ckpt is not a readable checkpoint"):
        load_model(path)
