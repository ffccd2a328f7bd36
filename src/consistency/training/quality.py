"""Scores of the samples while a model trains, on all processes together."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from consistency.evaluation.protocol import Evaluation
from consistency.io.atomic import write_text
from consistency.methods.base import Method
from consistency.training.averaging import weights_to_sample
from consistency.training.checkpointing import RunCheckpoint
from consistency.training.csv_logger import announce_columns
from consistency.training.required import check_ranks_agree
from consistency.training.triggers import EvaluationInterruptedError, EveryNImages, callbacks_of, find_callback
from consistency.training.wandb_logger import WandbLogger

log = logging.getLogger(__name__)


class QualityCallback(Callback):
    """Every n images (and at the end) measure samples of each sampler: `fd_classifier_onestep`, `fid50k_twostep`, ...

    Samples come from the first average of `WeightEMA`, or from the raw weights where there is none. Ranks draw disjoint
    parts of the same images that one process would draw. Scores go to every logger, to `trainer.callback_metrics` (so
    that `ModelCheckpoint(monitor=...)` finds them), and with all that makes them comparable to `quality.jsonl`.
    Training's random state is not touched.

    The run is saved before it is measured. One that is asked to stop gives the measurement up (on one process; several
    finish it) and makes up for it when it continues.

    Args:
        evaluation: What is measured.
        samplers: Name -> sampler.
        dirpath: Folder of `quality.jsonl`.
        every_n_images: Images seen between two measurements; 0 for the end only.
        seed: Of the samples; not the one that is reported at the end, so that a best checkpoint is not chosen on it.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        samplers: dict[str, Callable[..., Tensor]],
        *,
        dirpath: str,
        every_n_images: int = 0,
        seed: int = 1_000_000,
    ) -> None:
        if every_n_images < 0:
            raise ValueError(
                f"every_n_images must be 0 (at the end only) or more, got {every_n_images}; "
                "change callbacks.quality.every_n_images"
            )
        self.evaluation, self.samplers, self.dirpath = evaluation, samplers, Path(dirpath)
        self.every_n_images, self.seed = every_n_images, seed
        self.best: dict[str, dict[str, float]] = {}
        self.last: dict[str, float] = {}
        self._trigger = EveryNImages(every_n_images)
        self._seconds = 0.0
        self._prepared: Any = None
        self._was_given_up = self._has_begun = False

    def prepare(self, data: Any) -> None:
        """Get the extractor and the reference; whatever is missing is an error here, before training starts."""
        if self._prepared is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._prepared = self.evaluation.prepare(data, device)

    @property
    def _scores(self) -> tuple[str, ...]:
        return self.evaluation.names(self._prepared[0])

    @property
    def names(self) -> list[str]:
        """Names of all scores, once prepared."""
        return [f"{score}_{name}" for name in self.samplers for score in self._scores]

    def setup(self, trainer: L.Trainer, pl_module: Method, stage: str) -> None:
        """Refuse a monitor that nothing will ever log."""
        self.prepare(trainer.datamodule)  # type: ignore[attr-defined]
        for callback in callbacks_of(trainer):
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in (*self.names, "loss"):
                allowed = ", ".join((*self.names, "loss"))
                name = type(callback).__name__
                raise ValueError(f"{name} monitors {monitor}, which nothing logs; allowed: {allowed}")

    def on_train_start(self, trainer: L.Trainer, pl_module: Method) -> None:
        """Start the clock; forget rows of steps that will be made again; measure what was given up."""
        self._started, self._seconds = time.perf_counter(), 0.0
        announce_columns(trainer, [*self.names, "quality_time_share"])
        if trainer.is_global_zero:
            self._drop_rows_after(self._trigger.done)
            best = {name: "max" if _higher_is_better(name) else "min" for name in self.names}
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.define_scores(best)
        if self._trigger.is_due(pl_module.progress):
            if saver := find_callback(trainer, RunCheckpoint):
                saver.install_signal_handlers()
            self.measure(trainer, pl_module)
        self._has_begun = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Method, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure when it is due; all ranks come here at the same count."""
        if self._trigger.is_due(pl_module.progress):
            if saver := find_callback(trainer, RunCheckpoint):
                saver.save(trainer)
            self.measure(trainer, pl_module)

    @property
    def has_deferred_evaluation(self) -> bool:
        """Whether the last measurement was given up."""
        return self._was_given_up

    def measure(self, trainer: L.Trainer, method: Method) -> None:
        """Measure every sampler with the averaged weights, and log it."""
        started = time.perf_counter()
        try:
            rows = self._rows(trainer, method)
        except EvaluationInterruptedError:
            self._was_given_up = True
            log.info("asked to stop: the scores after %s images come later", f"{method.progress.images_seen:,}")
            return
        self._was_given_up = False
        self._trigger.mark(method.progress)
        now = time.perf_counter()
        self._seconds += now - started
        self._log(trainer, method, rows, self._seconds / max(now - self._started, 1e-9))

    def _rows(self, trainer: L.Trainer, method: Method) -> dict[str, dict[str, Any]]:
        """Name of the sampler -> its row; the extractor is on the device for this long only."""
        extractor, reference = self._prepared
        # Several ranks could not give up at the same place.
        saver = find_callback(trainer, RunCheckpoint) if trainer.world_size == 1 else None

        def check_interrupted(count: int) -> None:
            if saver is not None and saver.interrupted_by is not None:
                raise EvaluationInterruptedError

        def row(sampler: Callable[..., Tensor]) -> dict[str, Any]:
            return self.evaluation.measure_sampler(
                method.denoiser,
                sampler,
                extractor,
                reference,
                seed=self.seed,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                progress=check_interrupted,
            )

        try:
            extractor.to(method.device)
            with weights_to_sample(trainer, method) as weights:
                return {name: {**row(sampler), "weights": weights} for name, sampler in self.samplers.items()}
        finally:
            extractor.cpu()

    def _log(self, trainer: L.Trainer, method: Method, rows: dict[str, dict[str, Any]], share: float) -> None:
        """To loggers, monitors, the file, and the list of the best."""
        at = {"images_seen": method.progress.images_seen, "step": method.progress.step}
        scores = {f"{score}_{name}": row[score] for name, row in rows.items() for score in self._scores}
        check_ranks_agree(trainer, scores, tolerance=1e-3)  # each computed from the same sums
        self.last = scores
        for name, value in scores.items():
            if self._has_begun:  # Lightning refuses it before: monitors miss what is made up for
                method.log(name, value, on_step=True, on_epoch=False, logger=False, batch_size=1)
            best = self.best.get(name)
            if best is None or (value > best["value"] if _higher_is_better(name) else value < best["value"]):
                self.best[name] = {"value": value, **at}
        for logger in trainer.loggers:
            row = {**scores, "images_seen": at["images_seen"], "quality_time_share": share}
            logger.log_metrics(row, step=at["step"])
        if trainer.is_global_zero:
            self.dirpath.mkdir(parents=True, exist_ok=True)
            with (self.dirpath / "quality.jsonl").open("a") as file:
                file.writelines(json.dumps({**at, "name": name, **row}) + "\n" for name, row in rows.items())
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        log.info("after %s images: %s", f"{at['images_seen']:,}", shown)

    def state_dict(self) -> dict[str, Any]:
        """The best scores so far, and the last."""
        return {"best": self.best, "last": self.last, "done": self._trigger.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.best, self.last, self._trigger.done = state_dict["best"], state_dict["last"], state_dict["done"]

    def _drop_rows_after(self, images_seen: int) -> None:
        file = self.dirpath / "quality.jsonl"
        if not file.exists():
            return
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _images_of(line) <= images_seen]
        if kept != lines:
            write_text(file, "".join(kept))


def _images_of(line: str) -> float:
    try:
        return json.loads(line)["images_seen"]
    except (ValueError, LookupError, TypeError):
        return 0  # not ours: leave it


def _higher_is_better(name: str) -> bool:
    return name.startswith(("is", "precision", "recall")) and "_std" not in name
