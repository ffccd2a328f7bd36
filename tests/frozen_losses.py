"""Losses and final weights of short runs, bit for bit: what a change of the code must leave as it is.

    python frozen_losses.py [--bin FOLDER] [--compare BEFORE.json] OUT.json

FOLDER holds the `consistency-train` to run, by default this interpreter's. Each recipe trains 24 steps in its own
process, on one thread of the CPU. `Recorder`, a callback added from outside, writes the loss of every micro-batch and a
digest of each network and average, whatever the names and order of parameters. Compare on one machine with one torch.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

# Name -> options of consistency-train; outputs/edm is the first of them.
RECIPES = {
    "edm": "experiment=smoke_edm",
    "flow": "experiment=smoke_edm method=flow network.label_dropout=0.1",
    "cd": "experiment=smoke_cd teacher=outputs/edm",
    "ct": "experiment=smoke_ct",
    "ict": "experiment=smoke_ict",
    "ect": "experiment=smoke_ect init_from=outputs/edm",
    "edm_augment": "experiment=smoke_edm augment=edm",
    "flow_per_image": "experiment=smoke_edm method=flow network.label_dropout=0.1 randomness=per_image",
    "ict_per_image": "experiment=smoke_ict randomness=per_image",
    "ct_micro_batches": "experiment=smoke_ct trainer.accumulate_grad_batches=2 network.dropout=0.2 "
    "callbacks.weight_ema.decays=[0.5,0.999] callbacks.weight_ema.half_lives=[10]",  # rates reached in 24 steps
}
COMMON = "run_name={0} trainer.accelerator=cpu +callbacks.frozen={{_target_:frozen_losses.Recorder,path:{0}.json}}"


class Recorder(Callback):
    """Write losses and digests of weights to a JSON file when training ends."""

    def __init__(self, path: str) -> None:
        self.path, self.losses = path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]).hex())

    def on_train_end(self, trainer, pl_module) -> None:
        found = {name: list(part.parameters()) for name, part in pl_module.named_children()}
        for callback in trainer.callbacks:
            collect(callback.state_dict(), found)
        weights = {name: digest(tensors) for name, tensors in found.items() if tensors}
        Path(self.path).write_text(json.dumps({"losses": self.losses, "weights": weights}))


def collect(tree, found) -> None:
    """Tensors of nested dictionaries, under the name of the innermost one (ema0.999)."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict) and value and all(map(torch.is_tensor, value.values())):
            found[name] = list(value.values())
        collect(value, found)


def digest(tensors) -> str:
    each = [f"{list(x.shape)} {hashlib.sha256(x.detach().contiguous().numpy().tobytes()).hexdigest()}" for x in tensors]
    return hashlib.sha256("\n".join(sorted(each)).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", type=Path, default=Path(sys.executable).parent)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("out", type=Path)
    given, runs = parser.parse_args(), {}
    own = {"PYTHONPATH": str(Path(__file__).parent.absolute()), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in RECIPES.items():
            command = f"{given.bin.absolute()}/consistency-train {options} {COMMON.format(name)}"
            subprocess.run(command.split(), cwd=folder, env={**os.environ, **own}, stdout=sys.stderr, check=True)
            runs[name] = json.loads(Path(folder, f"{name}.json").read_text())
    given.out.write_text(json.dumps(runs, indent=1) + "\n")
    before = json.loads(given.compare.read_text()) if given.compare else {}
    different = [name for name in before if before[name] != runs.get(name)]
    sys.exit(f"different: {', '.join(different)}" if different else None)


if __name__ == "__main__":
    main()
