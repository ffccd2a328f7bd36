"""Looking at the model while it trains: grids of samples from fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from consistency.data.image_files import image_grid, save_grid
from consistency.methods.base import Method
from consistency.methods.progress import Progress
from consistency.sampling.images import sample_images
from consistency.training.averaging import weights_to_sample
from consistency.training.triggers import EveryNImages


class SampleGrid(Callback):
    """Every n images (and at the end) a PNG of samples for each sampler, from the same seeds each time.

    Samples come from the first average of `WeightEMA`, or from the raw weights where there is none. Pictures go to
    `dirpath` and to every logger that takes images. The random state of training is not touched.

    Args:
        dirpath: Folder of the pictures.
        samplers: Name -> sampler.
        every_n_images: Images seen between two grids; 0 for the end only.
        num_samples: Images a grid.
        seed: Of the samples.
    """

    def __init__(
        self,
        dirpath: str,
        samplers: dict[str, Callable[..., Tensor]],
        *,
        every_n_images: int = 0,
        num_samples: int = 100,
        seed: int = 0,
    ) -> None:
        self.dirpath, self.samplers = Path(dirpath), samplers
        self.num_samples, self.seed = num_samples, seed
        self._trigger = EveryNImages(every_n_images)

    def on_train_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Grids up to here are drawn: the checkpoint of a step is written after its grid."""
        self._trigger.mark(pl_module.progress)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample when it is due."""
        if self._trigger.is_due(pl_module.progress):
            self._trigger.mark(pl_module.progress)
            if trainer.is_global_zero:
                self.draw(trainer, pl_module)

    @torch.no_grad()
    def draw(self, trainer: L.Trainer, method: Method) -> None:
        """Sample and write one grid a sampler."""
        denoiser, progress = method.denoiser, method.progress
        labels = torch.arange(self.num_samples) % denoiser.num_classes if denoiser.num_classes else None
        with weights_to_sample(trainer, method):
            for name, sampler in self.samplers.items():
                images = sample_images(denoiser, sampler, range(self.num_samples), seed=self.seed, labels=labels).cpu()
                save_grid(images, self.dirpath / f"{name}_{progress.images_seen:09d}.png")
                for logger in trainer.loggers:
                    _log_image(logger, f"samples/{name}", image_grid(images), progress)


def _log_image(logger: Any, name: str, image: Tensor, progress: Progress) -> None:
    """Send a uint8 picture [3, H, W] to a logger that takes images; others already have the file."""
    if hasattr(logger, "log_image"):  # WandbLogger
        logger.log_metrics({"images_seen": progress.images_seen}, step=progress.step)  # where the picture belongs
        logger.log_image(key=name, images=[image.permute(1, 2, 0).numpy()], step=progress.step)
    elif hasattr(logger.experiment, "add_image"):  # TensorBoardLogger
        logger.experiment.add_image(name, image, global_step=progress.step)
