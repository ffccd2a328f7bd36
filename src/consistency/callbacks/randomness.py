"""Random numbers of training as a function of (seed, rank, images seen)."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from consistency.ops import derive_seed


class StepSeeds(Callback):
    """Seed each micro-batch anew from (seed, rank, images seen so far).

    Noise, levels and dropout then differ between ranks (`seed_everything` gives all ranks the same), do not depend on
    what else drew random numbers before (sampling, evaluation), and a resumed run draws what the straight run would
    have drawn. Added to every run by `runs.train`.

    Args:
        seed: Of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed the CPU and every CUDA device."""
        position = pl_module.progress.images_seen + pl_module.progress.pending
        torch.manual_seed(derive_seed("step", self.seed, trainer.global_rank, position))
