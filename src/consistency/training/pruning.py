"""Runs of a search that stop early: their scores go to the search, whose pruner judges them."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from consistency.training.quality import QualityCallback

log = logging.getLogger(__name__)


class PruneTrial(Callback):
    """Report each measurement of `QualityCallback` to one trial of a search, and stop the run when its pruner says so.

    All it needs is the search's file, so runs may be on any machine that sees it. Pruners compare trials at equal
    steps; a step here is the number of images after which the measurement was due (a multiple of `every_n_images`), so
    that trials of different batches meet. `hydra/sweeper=search` adds this callback to its runs, after all others.

    Args:
        storage: The search's file, an Optuna journal.
        study: Name of the study in it.
        trial: Number of the trial in the study.
        pruner: An Optuna pruner; its steps are images.
        objective: Score that counts; None for the first.
    """

    def __init__(self, storage: str, study: str, trial: int, pruner: Any, objective: str | None = None) -> None:
        self.path, self.study_name, self.number = Path(storage), study, trial
        self.pruner, self.objective = pruner, objective
        self.pruned = False
        self._quality: Any = None
        self._seen: dict[str, float] = {}
        self._study: Any = None  # on the first rank only, as the two below
        self._storage: Any = None
        self._trial_id = -1

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Find the scores.

        Raises:
            ValueError: if nothing is measured while the model trains, or not the objective.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._quality = next((callback for callback in callbacks if isinstance(callback, QualityCallback)), None)
        if self._quality is None or not self._quality.every_n_images:
            raise ValueError(
                "callbacks.prune needs scores while the model trains: callbacks=quality and "
                "callbacks.quality.every_n_images=N, or hydra.sweeper.pruner=null"
            )
        self.objective = self.objective or self._quality.names[0]
        if self.objective not in self._quality.names:
            raise ValueError(
                f"callbacks.prune cannot judge by objective={self.objective}; "
                f"allowed: {', '.join(self._quality.names)}, or hydra.sweeper.pruner=null"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """What a checkpoint knows of earlier scores is no news."""
        self._seen = self._quality.last

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Open the search."""
        if trainer.is_global_zero:
            self._open()

    def _open(self) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if not self.path.exists():  # Optuna would make an empty one
            raise ValueError(f"callbacks.prune.storage is {self.path}, which is not there; start the search again")
        # The whole path: Optuna's lock is a link to it, and cannot be freed after a crash if it leads nowhere.
        self._storage = optuna.storages.JournalStorage(JournalFileBackend(str(self.path.absolute())))
        try:
            self._study = optuna.load_study(study_name=self.study_name, storage=self._storage, pruner=self.pruner)
            study_id = self._storage.get_study_id_from_name(self.study_name)
            self._trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, self.number)
        except KeyError:
            raise ValueError(
                f"callbacks.prune: {self.path} has no trial {self.number} of {self.study_name}; start the search again"
            ) from None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a measurement, ask whether to go on; all ranks come here at the same count, the first one asks."""
        if self._quality.last is self._seen:
            return
        self._seen = self._quality.last
        is_bad = trainer.is_global_zero and self._report(pl_module.progress.images_seen)
        stop = is_bad and not pl_module.progress.is_over
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            self.pruned = True
            trainer.should_stop = True

    def _report(self, images_seen: int) -> bool:
        """Write the score down; True if the trial is not worth going on with. A lost disk does not end the run."""
        from optuna.exceptions import UpdateFinishedTrialError

        every = self._quality.every_n_images
        step = images_seen // every * every
        try:
            trial = self._storage.get_trial(self._trial_id)
            if trial.state.is_finished():  # trained again by hand
                return False
            if step not in trial.intermediate_values:  # it is, if the run was killed after the report
                self._storage.set_trial_intermediate_value(self._trial_id, step, self._seen[str(self.objective)])
            return bool(self.pruner.prune(self._study, self._storage.get_trial(self._trial_id)))
        except (OSError, UpdateFinishedTrialError) as error:
            log.warning("the search was not told of the score after %s images: %s", f"{images_seen:,}", error)
            return False

    def tell(self, value: float | None) -> None:
        """Say how the run ended, for the pruners of the runs beside it; the sweeper says it where this could not.

        Args:
            value: The objective; not used if the run was pruned.
        """
        if self._study is None or not (self.pruned or (value is not None and math.isfinite(value))):
            return
        from optuna.trial import TrialState

        try:
            if self.pruned:
                self._study.tell(self.number, state=TrialState.PRUNED, skip_if_finished=True)
            else:
                self._study.tell(self.number, value, skip_if_finished=True)
        except OSError as error:
            log.warning("the search was not told of the end: %s", error)
