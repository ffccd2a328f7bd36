"""Weights & Biases as a copy of `metrics.csv`: every point once, whatever stopped the run, and never in its way."""

from __future__ import annotations

import csv
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from consistency.training.wandb_segments import AXES, Segment, read_segments
from consistency.training.wandb_session import end_run, run_id, start_run

log = logging.getLogger(__name__)


class WandbLogger(loggers.WandbLogger):
    """One W&B run a run directory, plotted against `images_seen`, that continues when the run does.

    After a SIGKILL W&B has more than the checkpoint (what was trained after it, and is trained again) and less than
    `metrics.csv` (what was in the memory of W&B's own process). So a session first finds out what W&B has: from the
    files of earlier sessions (`wandb_segments`), and from the server where it is online. What it has is not sent again;
    what `metrics.csv` and W&B's folders of pictures have beyond that is sent first.

    W&B's step is the optimizer step, or the next free one where that row is closed: it only grows, over all sessions,
    because W&B drops a step that does not, and `wandb sync` gives it another number.

    Training goes on whatever W&B does: without a network the session is an offline one, a later error is one warning.
    Only a missing or refused account is an error, at the start.

    Args:
        save_dir: The run directory; W&B writes into its `wandb/`.
        offline: Write to disk only; so does `WANDB_MODE=offline` in the environment (`disabled` is respected too).
        log_model: Upload the checkpoints of a `ModelCheckpoint`.
        init_timeout: Seconds to wait for the server at the start.
        finish_timeout: Seconds to wait at the end until everything is sent.
        options: Of Lightning's logger and `wandb.init`: project, name, id, entity, group, job_type, tags, notes, ...
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
        super().__init__(save_dir=save_dir, offline=offline, log_model=log_model, **options)
        self.folder = Path(save_dir)
        self.timeouts = {"init_timeout": init_timeout, "finish_timeout": finish_timeout}
        self.trainer: Any = None  # whose method counts the images; set by the run
        self._earlier: list[Segment] = []
        self._points: dict[int, set[str]] = defaultdict(set)  # optimizer step -> names that W&B has
        self._pictures: set[str] = set()  # files of pictures that it has
        self._arrived = 0  # the server has every row before this step of W&B
        self._row = (-1, -1)  # the last one: optimizer step, W&B's step
        self._has_caught_up = self._has_warned = self._is_over = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, started on first use.

        Raises:
            ValueError: if there is no account, or the server refuses it.
        """
        if self._experiment is None:
            self._look(run_id(self._wandb_init["id"]))  # before there is a file of this session
            self._experiment = run = start_run(self._wandb_init, offline=self._offline, **self.timeouts)
            with self._harmless():
                self._learn(run)
                run.define_metric("images_seen", hidden=True)
                run.define_metric("*", step_metric="images_seen")
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Start the run and give it its configuration."""
        run = self.experiment
        with self._harmless():
            run.config.update(params, allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add points to the row of `step`."""
        run = self.experiment
        with self._harmless():
            step = max(self._row[0], 0) if step is None else step
            self._catch_up(run, step)
            self._send(run, step, metrics)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Add pictures to the row of `step`."""
        with self._harmless():
            super().log_image(key, images, step, **kwargs)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload checkpoints if that was asked for."""
        with self._harmless():
            super().finalize(status)

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """End the run: the next one of this process must not go on in it.

        Args:
            exit_code: 0 for a run that did all it should.
        """
        run = self._experiment
        if run is None or self._is_over:
            return
        self._is_over = True
        with self._harmless():
            self._catch_up(run, None)  # of a session that did not come to log
            for step, row in self._rows_on_disk():  # of a call that failed
                self._send(run, step, row)
        self.trainer = None
        end_run(run, exit_code)

    def _look(self, name: str | None) -> None:
        """Find the files of earlier sessions."""
        try:
            self._earlier = read_segments(self.folder / "wandb", name) if name else []
            for segment in self._earlier:
                if not segment.is_online:
                    segment.mend()
        except (ValueError, OSError) as error:
            log.warning("what W&B has of earlier sessions is not known (%s): points may come twice", error)

    def _learn(self, run: Any) -> None:
        """What W&B has: offline all that is on disk, online what the server has."""
        if run.disabled:
            return
        self._arrived = 0 if run.offline else run.starting_step
        last = self._arrived - 1
        for segment in self._earlier:
            for number, row in segment.rows.items():
                if run.offline or number < self._arrived:
                    self._points[row.step] |= row.names
                    self._pictures |= row.pictures
                    last = max(last, number)
            if not (run.offline or segment.is_online or segment.is_synced):
                segment.archive_run()  # this session sends its points; `wandb sync` would send them once more
        self._row = (-1, last)

    def _catch_up(self, run: Any, before: int | None) -> None:
        """Once: send what is on disk and not in W&B, from before this session's first step, that is its checkpoint."""
        if self._has_caught_up:
            return
        self._has_caught_up = True
        lost: dict[int, dict[str, Any]] = defaultdict(dict)
        for step, row in self._rows_on_disk():
            lost[step] |= row
        for segment in self._earlier:
            for step, name, file in segment.lost_pictures(self._pictures):
                lost[step][name] = file
        for step in sorted(lost):
            if before is None or step < before:
                self._send(run, step, lost[step])

    def _rows_on_disk(self) -> Iterator[tuple[int, dict[str, float]]]:
        file = self.folder / "metrics.csv"
        text = file.read_text() if file.exists() else ""
        for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):  # a killed process leaves half a line
            values = {}
            for name, value in row.items():
                with suppress(TypeError, ValueError):
                    values[name] = float(value)
            if "step" in values:
                yield int(values.pop("step")), values

    def _send(self, run: Any, step: int, points: Mapping[str, Any]) -> None:
        """Points that W&B does not have, into its row of this step or, where that is closed, into the next one."""
        known = self._points.get(step)
        if run.disabled or (known is None and step < self._arrived):
            return
        new = {name: value for name, value in points.items() if name not in AXES and name not in (known or ())}
        if not new:
            return
        if step != self._row[0]:
            self._row = (step, max(step, self._row[1] + 1))
        images = points.get("images_seen", self._images_at(step))
        # Two calls: W&B names the file of a picture after the step of the call before.
        run.log({"step": step} | ({} if images is None else {"images_seen": int(images)}), step=self._row[1])
        run.log({name: _picture(value) for name, value in new.items()}, step=self._row[1])
        self._points[step] |= new.keys()

    def _images_at(self, step: int) -> int | None:
        """Images seen after so many steps, which are of one size."""
        method = getattr(self.trainer, "lightning_module", None)
        if method is None or not method.progress.step:
            return None
        return round(step * method.progress.images_seen / method.progress.step)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._has_warned:
                reason = f"{type(error).__name__}: {error}"
                log.warning("W&B failed (%s); training goes on, and metrics.csv has everything", reason)
            self._has_warned = True


def _picture(value: Any) -> Any:
    import wandb

    return [wandb.Image(str(value))] if isinstance(value, Path) else value
