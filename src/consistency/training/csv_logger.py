"""Metrics as a CSV file that survives a resume."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class CsvLogger(Logger):
    """`metrics.csv`: one row a step, columns as they appear.

    Lightning's own logger deletes the file of the run that it resumes. This one keeps it, and drops the rows past the
    checkpoint that the run resumes from, so that no step is lost or doubled. A first row of a step that is there
    already completes it: scores that were given up when the run was stopped.

    Args:
        save_dir: Folder of the file.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] | None = None
        self._last_step: int | None = None

    @property
    def name(self) -> str:
        """Of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """None is kept."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        """There is no object behind this logger."""
        return

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run directory holds the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write one row, or complete that of the same step."""
        row = {"step": step, **metrics}
        if self._columns is None:
            rows = [old for old in self._read() if (old["step"] or "").isdigit() and int(old["step"]) <= (step or 0)]
            self._columns = list(rows[0]) if rows else []
            self._last_step = int(rows[-1]["step"]) if rows else None
            self._rewrite(rows)
        new = [name for name in row if name not in self._columns]
        self._columns += new
        rows = self._read() if new or step == self._last_step else []
        if rows and step == self._last_step and rows[-1]["step"] == str(step):  # of another callback
            self._rewrite([*rows[:-1], {**rows[-1], **{name: str(value) for name, value in metrics.items()}}])
            return
        if new:
            self._rewrite(rows)
        self._last_step = step
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def drop_rows_after(self, step: int) -> None:
        """Forget steps that a resumed run makes again, under other settings perhaps."""
        rows = self._read()
        kept = [row for row in rows if (row["step"] or "").isdigit() and int(row["step"]) <= step]
        if kept != rows:
            self._columns = list(kept[0]) if kept else []
            self._rewrite(kept)
            self._columns = None

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        text = self.path.read_text(errors="replace")
        # A process that was killed while writing leaves a last line without its end.
        complete = text[: text.rfind("\n") + 1]
        return list(csv.DictReader(complete.splitlines()))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns or ["step"])
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.path)
