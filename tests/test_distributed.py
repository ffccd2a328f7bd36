"""Two processes on the CPU, started by Lightning as on a machine with two devices."""

import os
import subprocess
import sys
from pathlib import Path

import torch

SPY = '''
"""A callback that writes down what its rank saw."""

import torch
from lightning.pytorch.callbacks import Callback


class Spy(Callback):
    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.images = batch[0].clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # The random state after the step tells whether noise and dropout were the same.
        self.seen.append((self.images, outputs["sigma"].clone(), torch.rand(4)))

    def on_train_end(self, trainer, pl_module):
        ema = next(c for c in trainer.callbacks if type(c).__name__ == "WeightEMA").averages
        state = {
            "seen": self.seen,
            "online": dict(pl_module.denoiser.named_parameters()),
            "target": dict(pl_module.target.named_parameters()),
            "ema": ema["ema0.999"],
            "progress": pl_module.progress.get_extra_state(),
        }
        torch.save(state, f"{self.folder}/rank{trainer.global_rank}.pt")
'''


def test_ranks_see_other_noise_and_agree_on_the_weights(tmp_path):
    (tmp_path / "spy.py").write_text(SPY)
    command = [
        Path(sys.executable).parent / "consistency-train",
        "experiment=smoke_ct",
        "run_name=two",
        "overwrite=true",
        "strategy=ddp",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        "trainer.max_steps=6",
        "network.dropout=0.1",
        "+callbacks.spy._target_=spy.Spy",
        f"+callbacks.spy.folder={tmp_path}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))

    assert a["progress"] == b["progress"] == {"step": 6, "images_seen": 6 * 16}
    assert len(a["seen"]) == 6
    for step, (mine, other) in enumerate(zip(a["seen"], b["seen"], strict=True)):
        assert len(mine[0]) == 8  # half of the global batch each
        images, sigma, noise = (not torch.equal(x, y) for x, y in zip(mine, other, strict=True))
        assert images
        assert noise
        assert sigma or step == 0  # CT starts with N = 2: one pair for all
    # Six batches of 16 are less than one pass: no image came twice.
    images = torch.cat([seen[0] for rank in (a, b) for seen in rank["seen"]]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    for part in ("online", "target", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part]), part

    # The children must not touch the directory of the run that started them.
    run = tmp_path / "outputs" / "two"
    assert not (run / "previous").exists()
    assert {"config.yaml", "status.json", "metrics.csv", "model"} <= {path.name for path in run.iterdir()}
