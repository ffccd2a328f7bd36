import pytest
import torch

from consistency.checkpoints.edm import read_edm
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM
from consistency.ops import append_dims
from snapshots import snapshot

PICKLED = ["edm_ddpmpp", "edm_ncsnpp", "edm_adm_class_cond"]


@pytest.fixture
def imported(published, tmp_path):
    def load(name, change=lambda state: state, **options):
        state, tensors, _ = published(name)
        torch.save(change(state), tmp_path / "file.pt")
        return read_edm(tmp_path / "file.pt", **options)[0].eval(), tensors

    return load


@torch.no_grad()
def error(network, tensors, noise_scale=0.25):
    labels = tensors.get("class_labels")
    noisy = tensors["x"] * append_dims(tensors["sigma"], 4)
    denoiser = Denoiser(network, EDM(noise_scale=noise_scale))
    raw = network(tensors["x"], tensors["c_noise"], labels) - tensors["network_output"]
    whole = denoiser(noisy, tensors["sigma"], labels) - tensors["denoised_edm"]
    return float(whole.abs().max() if noise_scale != 0.25 else max(raw.abs().max(), whole.abs().max()))


@pytest.mark.parametrize("name", PICKLED)
def test_snapshot_gives_the_output_of_the_original_code(golden, tmp_path, name):
    # The source that these files embed raises when it is run.
    network, said = read_edm(snapshot(name, tmp_path))
    assert error(network.eval(), golden(name)[0]) < 2e-5
    assert said == {"class_name": "EDMPrecond", "sigma_data": 0.5}
    assert network.config["dropout"] == pytest.approx(0.1)


@pytest.mark.parametrize("name", [*PICKLED, "edm_ddpmpp_class_cond"])
def test_state_dict_gives_the_output_of_the_original_code(imported, name):
    network, tensors = imported(name)
    assert error(network, tensors) < 2e-5


def test_wrong_noise_scale_is_far_off(imported):
    network, tensors = imported("edm_adm_class_cond")
    assert error(network, tensors, noise_scale=250.0) > 0.1


def test_wrong_order_of_attention_rows_is_far_off(imported):
    def shuffle(state):
        rows = {key: value for key, value in state.items() if ".qkv." in key}
        return state | {key: v.reshape(-1, 3, *v.shape[1:]).movedim(1, 0).reshape(v.shape) for key, v in rows.items()}

    network, tensors = imported("edm_ncsnpp", shuffle)
    assert error(network, tensors) > 0.05


def test_frequencies_come_along(imported):
    network, tensors = imported("edm_ncsnpp")
    assert torch.equal(network.embed_noise.freqs, tensors["fourier_freqs"])


def test_augmentation_labels_are_kept(imported):
    weight = torch.randn(16, 9)
    network, tensors = imported("edm_ddpmpp", lambda state: state | {"model.map_augment.weight": weight})
    assert torch.equal(network.embed_augment.weight, weight)
    assert network.config["augment_channels"] == 9
    assert error(network, tensors) < 2e-5  # none given: as if it were not there


@pytest.mark.parametrize("taps", [[1, 1], [1, 2, 2, 1], [2, 3, 3, 2], [-1, 5, 5, -1], [1, 0, 0, 1]])
def test_filter_is_read_off_the_file(imported, taps):
    kernel = torch.outer(torch.tensor(taps) / sum(taps), torch.tensor(taps) / sum(taps))[None, None]
    network, _ = imported("edm_ddpmpp", lambda state: state | {"model.enc.8x8_down.conv0.resample_filter": kernel})
    assert torch.allclose(network.decoder[2].resample.kernel, kernel * 4, atol=1e-6)
    assert network.config["resample_filter"] == taps or taps == [2, 3, 3, 2]


def test_square_label_layer_is_not_turned(imported):
    weight = torch.randn(16, 16)  # 16 classes, 16 channels
    change = {"model.map_label.weight": weight, "model.map_label.bias": torch.zeros(16)}
    network, _ = imported("edm_ddpmpp", lambda state: state | change)
    assert torch.equal(network.embed_label.weight, weight)


def test_state_dict_in_the_old_format_of_torch(published, tmp_path):
    state, tensors, _ = published("edm_ddpmpp")
    torch.save(state, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert error(read_edm(tmp_path / "file.pt")[0].eval(), tensors) < 2e-5


def test_heads_that_contradict_the_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"head_channels is 32; .* says 64; leave head_channels=null"):
        read_edm(snapshot("edm_adm_class_cond", tmp_path), head_channels=32)
    with pytest.raises(ValueError, match="head_channels is 32"):
        read_edm(snapshot("edm_ddpmpp", tmp_path), head_channels=32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {"a": torch.zeros(1)}, "not a network of NVlabs' layout"),
        (lambda state: state | {"model.enc.8x8_aux_skip.weight": torch.zeros(1)}, "type 'skip'"),
        (lambda state: state | {"model.other": torch.zeros(1)}, "nothing takes other"),
        (lambda state: state | {"model.dec.8x8_aux_norm.weight": torch.zeros(1)}, "type 'skip'"),
        (lambda state: {k: v for k, v in state.items() if "block0.affine" not in k}, "NVlabs' layout: KeyError"),
    ],
)
def test_refuses_other_networks(imported, change, words):
    with pytest.raises(ValueError, match=words):
        imported("edm_ddpmpp", change)
