"""Random numbers of training as a function of the seed and of the place in the run."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from consistency.ops import derive_seed, seed_everywhere


class StepSeeds(Callback):
    """Seed each micro-batch anew from (seed, rank, images seen so far).

    Noise, levels and dropout then differ between ranks (`seed_everything` gives all ranks the same), do not depend on
    what else drew random numbers before (sampling, evaluation), and a resumed run draws what the straight run would
    have drawn. Added to every run by `runs.train`.

    With `per_image` the levels, the noise, flips and augmentation of each image depend on (seed, its place in the run)
    instead: one process and two with an equal global batch then train alike, up to rounding. Dropout masks still
    belong to the rank. Each image costs a seed, so this is for comparisons.

    Args:
        seed: Of the run.
        per_image: Whether random numbers belong to images and not to ranks.
        stratified: Whether the noise levels of a micro-batch are spread evenly over their distribution, on all ranks
            together; see `Random`.
    """

    def __init__(self, seed: int, *, per_image: bool = False, stratified: bool = False) -> None:
        self.seed, self.per_image, self.stratified = seed, per_image, stratified

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Tell the method."""
        pl_module.progress.image_seed = self.seed if self.per_image else None
        pl_module.stratified = self.stratified

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed the CPU and the device."""
        position = pl_module.progress.images_seen + pl_module.progress.pending
        seed_everywhere(derive_seed("step", self.seed, trainer.global_rank, position), pl_module.device)
