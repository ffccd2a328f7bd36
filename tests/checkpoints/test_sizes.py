import json
import zipfile

import pytest
import torch

from consistency.checkpoints.native import load_model, read_checkpoint, save_denoiser
from consistency.checkpoints.tensors import read_tensors
from consistency.models.denoiser import Denoiser
from consistency.models.unet import UNet


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("channels", 1_000_000),
        ("channels", 10**12),
        ("num_blocks", 10**9),
        ("channel_mult", [1] * 10_000),
        ("image_size", 1 << 40),
        ("resample_filter", [1] * 1000),
        ("augment_channels", 10**12),
    ],
)
def test_settings_of_an_enormous_network_are_refused(tmp_path, option, value):
    network = UNet(image_size=8, in_channels=1, channels=8, channel_mult=(1,), num_blocks=1)
    save_denoiser(Denoiser(network), tmp_path, {})
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["denoiser"]["network"]["arguments"][option] = value
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        load_model(tmp_path)


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="its tensors have 4,000,000,000,000 bytes"):
        read_tensors(tmp_path / "a.pt")


def test_a_packed_archive_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(ValueError, match="compressed"):
        read_tensors(tmp_path / "b.pt")


def test_bytearray_is_not_called(tmp_path):
    torch.save({"a": torch.zeros(1), "b": bytearray(100)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="bytearray"):
        read_tensors(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="bytearray"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_is_a_table(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt is not a readable checkpoint of this project: it holds a list"):
        read_checkpoint(tmp_path / "a.ckpt")
