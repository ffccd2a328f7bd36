"""Every reader of files: how a small valid file is made, how it is read, and whether its text is JSON."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from consistency.checkpoints.diffusers import read_diffusers
from consistency.checkpoints.edm import read_edm
from consistency.checkpoints.layouts import diffusers_modules, openai_modules
from consistency.checkpoints.native import load_model, save_denoiser
from consistency.checkpoints.openai import read_openai
from consistency.checkpoints.pickles import read_pickle
from consistency.commands.folder import status_of
from consistency.commands.rundata import _own_parts
from consistency.data import cache
from consistency.data.image_files import read_images
from consistency.data.sources import Files, Zip
from consistency.io import tensors
from consistency.io.safe_load import read_npz, read_yaml
from consistency.models.denoiser import Denoiser
from consistency.models.parametrization import EDM
from consistency.models.unet import UNet
from consistency.report.group import make_groups
from consistency.report.load import read_study
from consistency.sweeps.study import note_runs
from snapshots import snapshot

DATA = Path(__file__).parents[1] / "data"
MARKER = "executed"  # made in the current directory by every payload


@dataclass(frozen=True)
class Reader:
    """`make` fills a folder with a valid input and names the file to damage; `read` reads the folder.

    Args:
        make: Folder -> file.
        read: Folder -> anything; on damage a ValueError or OSError.
        is_json: Whether values are replaced too, beside bytes.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    is_json: bool = False


class _Payload:
    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


def payloads():
    """Files that make `MARKER` when something unpickles them."""
    objects = np.empty(1, dtype=object)
    objects[0] = _Payload()
    npz, npy, zipped = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(npz, arr_0=objects, mu=objects, sigma=objects)
    np.save(npy, objects)
    torch.save({"state_dict": _Payload()}, zipped)
    return [pickle.dumps({"ema": _Payload()}), npz.getvalue(), npy.getvalue(), zipped.getvalue()]


def _network(**options):
    settings = {"image_size": 8, "in_channels": 1, "channels": 8, "channel_mult": [1], "num_blocks": 1, **options}
    return UNet(attention_resolutions=[], **settings)


def _model(name):
    def make(folder):
        return (
            save_denoiser(Denoiser(_network(), EDM(boundary=0.002)), folder, {"method": "CT", "weights": "raw"}) / name
        )

    return make


def _checkpoint(folder):
    denoiser = Denoiser(_network(), EDM(boundary=0.002))
    state = {f"denoiser.{key}": value for key, value in denoiser.state_dict().items()}
    torch.save({"state_dict": state, "callbacks": {}, "consistency": {"method": "CT"}}, folder / "last.ckpt")
    return folder / "last.ckpt"


def _openai(new_format):
    def make(folder):
        network = _network(channels=32, adm=True, norm_groups=32, scale_shift=True, skip_scale=1.0)
        names = openai_modules(network)
        state = {
            f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": v for key, v in network.state_dict().items()
        }
        torch.save(state, folder / "file.pt", _use_new_zipfile_serialization=new_format)
        return folder / "file.pt"

    return make


def _edm(folder):
    return snapshot("edm_ncsnpp", folder).rename(folder / "file.pkl")


def _diffusers(name):
    def make(folder):
        from safetensors.torch import save_file

        network = _network(channels=32, adm=True, norm_groups=32, skip_scale=1.0, norm_eps=1e-5)
        names = diffusers_modules(network)
        state = {
            f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": v for key, v in network.state_dict().items()
        }
        (folder / "unet").mkdir()
        (folder / "scheduler").mkdir()
        save_file(
            {key: value.contiguous() for key, value in state.items()},
            folder / "unet/diffusion_pytorch_model.safetensors",
        )
        scheduler = {"_class_name": "CMStochasticIterativeScheduler", "sigma_data": 0.5, "sigma_min": 0.002}
        blocks = {"down_block_types": ["ResnetDownsampleBlock2D"], "up_block_types": ["ResnetUpsampleBlock2D"]}
        sizes = {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": [32],
        }
        unet = {"_class_name": "UNet2DModel", "downsample_type": "resnet", "upsample_type": "resnet", **sizes, **blocks}
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
        (folder / "unet/config.json").write_text(json.dumps(unet))
        return folder / name

    return make


def _picture(ending):
    def make(folder):
        pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"a{ending}")
        return folder / f"a{ending}"

    return make


def _zip(folder):
    png = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(png, format="PNG")
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("00/a.png", png.getvalue())
        file.writestr("00/b.png", png.getvalue())
        file.writestr("dataset.json", json.dumps({"labels": [["00/a.png", 0], ["00/b.png", 1]]}))
    return folder / "set.zip"


def _read_zip(folder):
    source = Zip(folder / "set.zip")
    return [source.open(index) and source.describe(index) for index in range(len(source))]


def _npz(folder):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez_compressed(folder / "a.npz", arr_0=images, mu=np.zeros(5), sigma=np.eye(5))
    return folder / "a.npz"


def _cache(name):
    def make(folder):
        np.save(folder / "images.npy", np.zeros((3, 1, 4, 4), np.uint8))
        np.save(folder / "labels.npy", np.zeros(3, np.int64))
        meta = {"classes": ["a"], "source": "x", "mean": [0.1], "std": [0.2], "sha256": {"images": "0"}}
        meta["bytes"] = {file: (folder / file).stat().st_size for file in ("images.npy", "labels.npy")}
        (folder / "meta.json").write_text(json.dumps(meta))
        return folder / name

    return make


def _read_cache(folder):
    found = cache._open(folder)
    return found and found[0][0].sum() + found[len(found) - 1][0].sum()  # damage further in is not looked for


def _tensors(folder):
    tensors.write_tensors(folder / "a.safetensors", {"mean": torch.zeros(4)}, {"id": "x", "accuracy": 0.5})
    return folder / "a.safetensors"


STATUS = {"state": "finished", "step": 3, "images_seen": 30, "seconds": 1.0, "scores": {"fd": 1.0}, "objective": 1.0}
SETTINGS = {
    "seed": 0,
    "data": {"_target_": "consistency.data.module.ImageDataModule", "batch_size": 3},
    "samplers": {"onestep": {"mid_sigmas": []}},
    "callbacks": {"quality": {"samplers": {"onestep": {}}}},
}


def _run(name):
    def make(folder):
        run = folder / "a"
        run.mkdir()
        listed = {
            "study": "s",
            "command": "c",
            "runs": {"a": {"overrides": ["seed=0"]}, "invalid-b": {"overrides": []}},
        }
        (folder / "study.json").write_text(json.dumps(listed))
        (run / "status.json").write_text(json.dumps(STATUS))
        (run / "config.yaml").write_text(json.dumps(SETTINGS) + "\n")
        (run / "metrics.csv").write_text("step,images_seen,loss,num_levels\n1,10,0.5,10\n2,20,0.4,11\n")
        row = {"images_seen": 10, "step": 1, "fd": 1.5, "sampler": "x", "nfe": 1, "seed": 0}
        (run / "quality.jsonl").write_text(json.dumps(row) + "\n")
        return folder / name

    return make


def _read_run(folder):
    return make_groups(read_study(folder)).runs


READERS = {
    "model folder, config": Reader(_model("config.json"), load_model, is_json=True),
    "model folder, tensors": Reader(_model("model.safetensors"), load_model),
    "checkpoint": Reader(_checkpoint, lambda folder: load_model(folder / "last.ckpt")),
    "openai .pt": Reader(_openai(True), lambda folder: read_openai(folder / "file.pt", head_channels=32)),
    "openai .pt, old format": Reader(_openai(False), lambda folder: read_openai(folder / "file.pt", head_channels=32)),
    "edm .pkl": Reader(_edm, lambda folder: read_edm(folder / "file.pkl")),
    "pickle": Reader(_edm, lambda folder: read_pickle(folder / "file.pkl")),
    "diffusers, unet": Reader(_diffusers("unet/config.json"), read_diffusers, is_json=True),
    "diffusers, scheduler": Reader(_diffusers("scheduler/scheduler_config.json"), read_diffusers, is_json=True),
    **{
        f"image {ending}": Reader(_picture(ending), lambda folder: Files(folder).open(0) and read_images(folder))
        for ending in (".png", ".jpg", ".gif", ".webp", ".tiff", ".bmp")
    },
    "zip of images": Reader(_zip, _read_zip),
    "samples .npz": Reader(_npz, lambda folder: read_images(folder / "a.npz")),
    "reference .npz": Reader(_npz, lambda folder: read_npz(folder / "a.npz", ("mu", "sigma", "arr_0"))),
    "cache, meta": Reader(_cache("meta.json"), _read_cache, is_json=True),
    "cache, images": Reader(_cache("images.npy"), _read_cache),
    "statistics, meta": Reader(_tensors, lambda folder: tensors.read_meta(folder / "a.safetensors")),
    "statistics, tensors": Reader(_tensors, lambda folder: tensors.read_tensors(folder / "a.safetensors")),
    "run, status": Reader(
        _run("a/status.json"), lambda folder: (status_of(folder / "a"), _read_run(folder)), is_json=True
    ),
    "run, config": Reader(_run("a/config.yaml"), _read_run, is_json=True),
    "run, data of config": Reader(
        _run("a/config.yaml"),
        lambda folder: _own_parts(read_yaml(folder / "a/config.yaml").get("data"), folder / "a/config.yaml"),
        is_json=True,
    ),
    "run, metrics": Reader(_run("a/metrics.csv"), _read_run),
    "run, quality": Reader(_run("a/quality.jsonl"), _read_run, is_json=True),
    "study, report": Reader(_run("study.json"), _read_run, is_json=True),
    "study, list": Reader(_run("study.json"), lambda folder: note_runs(folder, "s", {"a": ["seed=0"]}), is_json=True),
}
# What readers of images say is turned into one line by `DecodedImages` and `read_images`, whatever it is.
ANY_ERROR = tuple(name for name in READERS if name.startswith(("image", "zip")))
