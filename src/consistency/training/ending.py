"""Where a run ends: at a number of optimizer steps that really happened."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class StopAtStep(Callback):
    """Stop when `progress.schedule_step` reaches `total_steps`.

    Lightning's own `max_steps` counts optimizer *calls*: after one step that the fp16 scaler skipped, a run would end
    one step short of its curriculum. Added to every run by `runs.train`; callbacks see the end in `progress.is_over`.

    Args:
        total_steps: Optimizer steps of the run.
    """

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Tell the method how long it trains."""
        pl_module.progress.total_steps = self.total_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Make no step more where a resumed run stands at its end."""
        trainer.should_stop = pl_module.progress.is_over

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop after the last step."""
        if pl_module.progress.is_over:
            trainer.should_stop = True
