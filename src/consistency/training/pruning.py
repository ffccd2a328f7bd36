"""Runs of a search that stop early, because the runs beside them are better."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from consistency.io.safe_load import first_line, read_json
from consistency.training.quality import QualityCallback
from consistency.training.scores_file import SCORES_FILE, read_scores

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner

log = logging.getLogger(__name__)


class PruneTrial(Callback):
    """After each measurement of `QualityCallback`, stop the run if a pruner says so.

    The pruner sees what the runs of the search have measured, in their `quality.jsonl`, and how they ended, in their
    `status.json`. So all that a run needs is the folder of the search, on any machine that sees it. Pruners compare
    trials at equal steps; a step here is the number of images after which a measurement was due (a multiple of
    `every_n_images`), so that trials with different batch sizes are compared at the same steps. `hydra/sweeper=search`
    adds this callback to its runs, after all others.

    Args:
        study: Name of the search.
        pruner: An Optuna pruner; its steps are images.
        direction: `minimize` or `maximize`.
        objective: Score that counts; None for the first.
    """

    def __init__(
        self, study: str, pruner: BasePruner, direction: str = "minimize", objective: str | None = None
    ) -> None:
        self.study, self.pruner, self.direction, self.objective = study, pruner, direction, objective
        self.pruned = False
        self._quality: QualityCallback | None = None
        self._seen: dict[str, float] = {}

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
        """Take scores of a checkpoint for old ones."""
        assert self._quality is not None
        self._seen = self._quality.last

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a measurement, ask whether to go on; all ranks come here at the same count, the first one asks."""
        assert self._quality is not None
        if self._quality.last is self._seen:
            return
        self._seen = self._quality.last
        stop = trainer.is_global_zero and self._is_bad() and not pl_module.progress.is_over
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            self.pruned = True
            trainer.should_stop = True

    def _is_bad(self) -> bool:
        """Replay the search up to now, this run last; a lost disk does not end the run."""
        import optuna

        assert self._quality is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        direction = optuna.study.StudyDirection[self.direction.upper()]
        study = optuna.create_study(study_name=self.study, direction=direction, pruner=self.pruner)
        own = self._quality.dirpath
        try:
            runs = {_number(file.parent): file.parent for file in sorted(own.parent.glob(f"trial*/{SCORES_FILE}"))}
            trials = [study.ask() for _ in range(max(runs) + 1)]
            for number, run in runs.items():
                if run != own:
                    self._report(run, trials[number])
                    _tell_end(study, run, trials[number])
            return self._report(own, trials[_number(own)])
        except OSError as error:
            log.warning("the scores of the search cannot be read, the run goes on: %s", first_line(error))
            return False

    def _report(self, run_dir: Path, trial: Trial) -> bool:
        """Report the scores of a run, with the pruner's questions in between: some pruners keep what they answered."""
        assert self._quality is not None
        is_bad = False
        for step, value in read_scores(run_dir, str(self.objective), self._quality.every_n_images).items():
            trial.report(value, step)
            is_bad = trial.should_prune()
        return is_bad


def _number(run_dir: Path) -> int:
    """Of the trial: `trial007-5f2a90` -> 7; pruners may go by it."""
    return int(re.sub(r"trial(\d+).*", r"\1", run_dir.name))


def _tell_end(study: Study, run_dir: Path, trial: Trial) -> None:
    """Tell the end of a run, if it has ended."""
    from optuna.trial import TrialState

    try:
        status = read_json(run_dir / "status.json")
        state, value = status.get("state"), status.get("objective")
    except (FileNotFoundError, ValueError, AttributeError):
        return
    if state == "pruned":
        study.tell(trial, state=TrialState.PRUNED)
    elif state == "finished" and isinstance(value, int | float) and math.isfinite(value):
        study.tell(trial, value)
