"""Model folders and interrupted runs of version 0.1 (commit 86dd1ae) are loaded, sampled and continued."""

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from consistency import load
from consistency.checkpoints.native import load_model
from consistency.commands.folder import status_of
from forked import command

OLD = Path(__file__).parent / "data" / "version_0_1"
KINDS = {"edm": "diffusion", "flow": "diffusion", "edm_250": "diffusion"}
RUNS = {
    "edm": ["experiment=smoke_edm"],
    "flow": ["experiment=smoke_edm", "method=flow", "network.label_dropout=0.1"],  # yesterday's names too
    "cd": ["experiment=smoke_cd", "teacher=teacher"],
    "ct": ["experiment=smoke_ct", "network.dropout=0.2"],
    "ict": ["experiment=smoke_ict"],
    "ect": ["experiment=smoke_ect", "init_from=teacher"],
}


@pytest.mark.parametrize("name", sorted(folder.name for folder in (OLD / "models").iterdir()))
def test_a_model_folder_answers_as_before(name):
    expected = load_file(OLD / "models" / name / "expected.safetensors")
    model = load(OLD / "models" / name, device="cpu")
    assert model.denoiser.kind == KINDS.get(name, "consistency")
    with torch.no_grad():
        denoised = model.denoiser(expected["x"], expected["sigma"], expected.get("labels"))
    torch.testing.assert_close(denoised, expected["denoised"], rtol=1e-4, atol=1e-5)
    drawn = model.sample(4, seed=0).int()
    assert (drawn - expected["samples"].int()).abs().max() <= 1
    assert expected["samples"].float().std() > 1  # otherwise the comparison would say nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on(name, tmp_path):
    with tarfile.open(OLD / "runs" / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copytree(OLD / "teacher", tmp_path / "teacher")
    run = tmp_path / "outputs" / name
    before, _ = load_model(run / "checkpoints/last.ckpt", "raw")
    rows = (run / "metrics.csv").read_text().splitlines()
    own = [] if name == "cd" else ["network.channels=4"]
    quiet = ("trainer.accelerator=cpu", "callbacks.sample_grid=null", "callbacks.progress=null", f"run_name={name}")
    command("train", *quiet, *RUNS[name], *own, cwd=tmp_path)
    status = status_of(run)
    assert (status["state"], status["step"], status["images_seen"]) == ("finished", 24, 384)
    assert (run / "metrics.csv").read_text().splitlines()[: len(rows)] == rows
    after, _ = load_model(run / "checkpoints/last.ckpt", "raw")
    assert after.kind == before.kind == KINDS.get(name, "consistency")
    moved = [(a - b).abs().max() for a, b in zip(after.parameters(), before.parameters(), strict=True)]
    assert 0 < max(moved) < 0.1
