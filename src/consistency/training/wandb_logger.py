"""Weights & Biases beside `metrics.csv`: Lightning's logger, for a run that may stop and continue."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers
from lightning.pytorch.utilities import rank_zero_only

from consistency.io.atomic import write_text

log = logging.getLogger(__name__)

_REFUSED = re.compile(r"error 40[0134]|permission denied|unauthorized|forbidden", re.IGNORECASE)


class WandbLogger(loggers.WandbLogger):
    """One W&B run a run directory, plotted against `images_seen`; a resumed run appends to it.

    After a crash the steps since the checkpoint are trained again, so `wandb/last_sent.json` notes how far rows were
    sent, and those up to there are not sent again. What W&B's own process had not written when it was killed, at most
    15 seconds, is only in `metrics.csv`. A later error of W&B is one warning, and training continues.

    Args:
        save_dir: The run directory; W&B writes into its `wandb/`.
        offline: Write to disk only; so does `WANDB_MODE=offline` in the environment (`disabled` is respected too).
        log_model: Upload the checkpoints of a `ModelCheckpoint`.
        init_timeout: Seconds to wait for the server at the start; without one the run is an offline one.
        finish_timeout: Seconds to wait at the end until everything is sent.
        options: Of `wandb.init`: project, name, id, entity, group, job_type, tags, notes, ...

    Raises:
        ValueError: if there is no account, or the server refuses it.
    """

    def __init__(
        self,
        save_dir: str,
        *,
        offline: bool = False,
        log_model: bool = False,
        init_timeout: float = 60.0,
        finish_timeout: float = 120.0,
        **options: Any,
    ) -> None:
        run = None
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            limits = {"init_timeout": init_timeout, "finish_timeout": finish_timeout, "finish_timeout_raises": True}
            run = _start_run({**options, "dir": save_dir, "settings": limits}, offline=offline)
            run.define_metric("images_seen", hidden=True)
            run.define_metric("*", step_metric="images_seen")
        super().__init__(save_dir=save_dir, offline=offline, log_model=log_model, experiment=run, **options)
        self._note = Path(save_dir) / "wandb" / "last_sent.json"
        note = json.loads(self._note.read_text()) if self._note.exists() else {}
        self._sent_step, self._sent_names = note.get("step", -1), set(note.get("names", ()))  # by earlier sessions
        self._step, self._names = self._sent_step, set(self._sent_names)  # what was sent last
        self._images_seen = note.get("images_seen", 0)
        self._next_row = max(note.get("next_row", 0), run.starting_step if run else 0)  # W&B ignores earlier ones
        self._has_warned = False

    @rank_zero_only
    def define_scores(self, best: Mapping[str, str]) -> None:
        """What W&B's tables show of each score: its "min" or "max" over the run, instead of the last value."""
        for name, summary in best.items():
            self.experiment.define_metric(name, step_metric="images_seen", summary=summary)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send one row; one without `images_seen` belongs to the last one that had it."""
        step = self._step if step is None else step
        self._images_seen = int(metrics.get("images_seen", self._images_seen))
        sent = self._sent_names if step == self._sent_step else set()
        row = {name: value for name, value in metrics.items() if name != "images_seen" and name not in sent}
        if self.experiment.disabled or step < self._sent_step or not row:
            return
        try:
            number = max(self._next_row, step)  # the optimizer step, or the next row that is free
            self.experiment.log({**row, "step": step, "images_seen": self._images_seen}, step=number, commit=True)
            self._names = self._names | row.keys() if step == self._step else set(row)
            self._step, self._next_row = step, number + 1
            note = {"step": step, "images_seen": self._images_seen, "names": sorted(self._names)}
            write_text(self._note, json.dumps({**note, "next_row": self._next_row}))
        except Exception as error:  # of any kind: W&B's process may be gone, the disk full; none should end training
            if not self._has_warned:
                log.warning("W&B failed (%r); training continues, and metrics.csv has everything", error)
            self._has_warned = True

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """End the run; `exit_code` is 0 for one that did all it should."""
        try:
            self.experiment.finish(exit_code=exit_code)
        except Exception as error:  # as above; training is over, and what was not sent is on disk
            log.warning("W&B has not received everything (%r); send the rest with `wandb sync`", error)


def _start_run(options: dict[str, Any], *, offline: bool) -> Any:
    import wandb

    Path(options["dir"]).mkdir(parents=True, exist_ok=True)
    # A run that something in this process left open would get the rows of this one.
    options = {"resume": "allow", "reinit": "finish_previous", **options}
    if offline and os.environ.get("WANDB_MODE") != "disabled":
        options["mode"] = "offline"
    try:
        return wandb.init(**options)
    except (wandb.Error, TimeoutError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        is_network = isinstance(error, wandb.errors.CommError | TimeoutError)
        if not is_network or isinstance(error, wandb.errors.AuthenticationError) or _REFUSED.search(reason):
            raise ValueError(
                f"W&B could not start ({reason}); log in with `wandb login`, check logger.wandb.entity and "
                "logger.wandb.project, or use logger.wandb.offline=true or WANDB_MODE=offline"
            ) from None
    with suppress(Exception):
        wandb.teardown()  # its process holds the id until then
    log.warning("W&B cannot be reached (%s); the run is an offline one: send it later with `wandb sync`", reason)
    return wandb.init(**{**options, "mode": "offline"})
