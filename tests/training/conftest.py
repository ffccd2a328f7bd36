"""A whole small run for callbacks: endless data, the callbacks that every run has, loggers that remember."""

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers.logger import Logger

from consistency.data.datasets import ImageArray
from consistency.data.module import ImageDataModule
from consistency.methods.metrics import l2
from consistency.methods.training import ConsistencyTraining
from consistency.noise.curricula import FixedLevels
from consistency.noise.levels import GridPairs, uniform_index
from consistency.noise.weightings import uniform
from consistency.training.required import StepSeeds, StopAtStep


@pytest.fixture
def make_method(make_denoiser):
    """A consistency training of the smallest UNet; options of the method."""

    def make(denoiser=None, *, num_levels=4, **options):
        parts = {"levels": GridPairs(FixedLevels(num_levels), uniform_index), "metric": l2, "weighting": uniform}
        parts["optimizer"] = partial(torch.optim.SGD, lr=0.1)
        return ConsistencyTraining(make_denoiser() if denoiser is None else denoiser, **{**parts, **options})

    return make


@pytest.fixture
def train(tmp_path):
    """Train on 32 random images until `StopAtStep` stops; `prepare` sees the trainer before it starts."""

    def run(method, *, steps=4, callbacks=(), accumulate=1, batch_size=4, loggers=(), prepare=None, ckpt=None, **more):
        images = torch.randint(256, (32, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        dataset = ImageArray(images, torch.arange(32) % 3)
        data = ImageDataModule(dataset, batch_size=batch_size, seed=0, image_size=4, channels=1)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=-1,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            callbacks=[StepSeeds(0), StopAtStep(steps), *callbacks],
            logger=list(loggers) or False,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **more,
        )
        if prepare is not None:
            prepare(trainer)
        trainer.fit(method, datamodule=data, ckpt_path=ckpt, weights_only=True)
        return trainer

    return run


class Rows(Logger):
    """Keeps (step, metrics)."""

    name, version, experiment = "rows", "", None

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.fixture
def rows():
    return Rows


class At(Callback):
    """Calls `action(pl_module)` when micro-batch number `index` starts or has ended."""

    def __init__(self, index, action, *, end=False):
        self.index, self.action, self.end, self.seen = index, action, end, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.end and self.seen == self.index:
            self.action(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.end and self.seen == self.index:
            self.action(pl_module)
        self.seen += 1


@pytest.fixture
def at():
    return At


class Outputs(Callback):
    """What every micro-batch returned, with the step after it."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(SimpleNamespace(step=pl_module.progress.step, **outputs))


@pytest.fixture
def outputs():
    return Outputs
