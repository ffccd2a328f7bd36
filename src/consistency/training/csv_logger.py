"""Metrics as a CSV file that survives a resume."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from consistency.io.atomic import write_text


class CsvLogger(Logger):
    """`metrics.csv`: one row a step, appended; the columns are those that were announced and those of the first row.

    Lightning's own logger deletes the file of the run that it resumes. This one keeps it, and drops the rows past the
    checkpoint that the run resumes from, so that no step is lost or doubled. A second row of the last step completes
    it. A column that nobody announced is added all the same, which costs writing the file anew.

    Args:
        save_dir: Folder of the file.
    """

    name, version, experiment = "csv", "", None

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._announced: list[str] = []
        self._columns: list[str] = []  # none before the first row
        self._last: dict[str, Any] = {}  # the last row, and where it begins in the file
        self._last_start = 0

    def announce(self, columns: Iterable[str]) -> None:
        """Columns that later rows will have."""
        self._announced += columns

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run directory holds the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row, or complete that of the same step."""
        row: dict[str, Any] = {"step": step or 0, **metrics}
        if not self._columns:
            earlier = [old for old in self._rows() if int(old["step"]) <= row["step"]]
            if not earlier:  # a file that is continued keeps its columns
                row = {"step": row["step"], **dict.fromkeys(self._announced, ""), **metrics}
            self._rewrite(earlier, row)
        elif not row.keys() <= set(self._columns):
            self._rewrite(self._rows(), row)
        if str(row["step"]) == str(self._last.get("step")):
            row = {**self._last, **{name: value for name, value in row.items() if value != ""}}
        else:
            self._last_start = self.path.stat().st_size
        with self.path.open("r+", newline="") as file:
            file.seek(self._last_start)
            csv.DictWriter(file, self._columns).writerow(row)
            file.truncate()
        self._last = row

    @rank_zero_only
    def drop_rows_after(self, step: int) -> None:
        """Forget steps that a resumed run makes again, under other settings perhaps."""
        if self.path.exists():
            self._rewrite([row for row in self._rows() if int(row["step"]) <= step], {})
            self._columns = []

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        text = self.path.read_text(errors="replace")
        # A process that was killed while writing leaves a last line without its end.
        complete = text[: text.rfind("\n") + 1]
        return [row for row in csv.DictReader(complete.splitlines()) if (row.get("step") or "").isdigit()]

    def _rewrite(self, rows: list[dict[str, str]], more: dict[str, Any]) -> None:
        """Write the file anew with these rows, their columns and those of `more`."""
        self._columns = list(dict.fromkeys([*(rows[0] if rows else ()), "step", *more]))
        self._last = rows[-1] if rows else {}
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[:-1])
        self._last_start = len(text.getvalue().encode())
        writer.writerows(rows[-1:])
        write_text(self.path, text.getvalue())


def announce_columns(trainer: L.Trainer, columns: Iterable[str]) -> None:
    """Tell every CSV file of the run which columns are to come."""
    for logger in trainer.loggers:
        if isinstance(logger, CsvLogger):
            logger.announce(columns)
