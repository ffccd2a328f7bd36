"""How far a command is: a bar in a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


class ProgressBar:
    """A live bar in a terminal; where the output is none, a plain line for every tenth.

    Args:
        what: Is counted, e.g. "sampling" or "step"; the line begins with it.
        total: When it is done.
        done: How much of it is done already; it does not count for the speed.
        file: Where to write; standard error by default.
        refresh_seconds: Least time between two updates in a terminal.
        line_seconds: Least time between two lines, so that there is none at all for what is done at once.
        keep: Whether the last state stays on the screen.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        *,
        file: TextIO | None = None,
        refresh_seconds: float = 0.1,
        line_seconds: float = 10.0,
        keep: bool = False,
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.what, self.total, self._file = what, total, file or sys.stderr
        console = Console(file=self._file)
        self.is_live = console.is_terminal
        self._pause = refresh_seconds if self.is_live else line_seconds
        self._tenth, self._last = 10 * done // total, 0.0 if self.is_live else time.monotonic()
        self._history = deque[tuple[float, int, int]](maxlen=200)  # time, done, images
        if self.is_live:
            self._bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=not keep)
            self._task = self._bar.add_task(f"{what} {done:,}/{total:,}", total=total, completed=done)
            self._bar.start()

    def advance(self, done: int, images: int, status: Callable[[], str] = lambda: "") -> None:
        """Note the state, and show it if it is time.

        Args:
            done: Of `total`.
            images: So far, for the speed. The first call only starts the clock: it waited for the model.
            status: What else to show; called only when it is shown.
        """
        now, tenth = time.monotonic(), 10 * done // self.total
        self._history.append((now, done, images))
        is_time = now - self._last >= self._pause
        if not (is_time or done >= self.total if self.is_live else is_time and tenth > self._tenth):
            return
        self._tenth, self._last = tenth, now
        parts = [f"{self.what} {done:,}/{self.total:,}", *self._speed(), status()]
        line = "  ".join(part for part in parts if part)
        if self.is_live:
            self._bar.update(self._task, completed=done, description=line)
        else:
            print(line, file=self._file, flush=True)

    def _speed(self) -> list[str]:
        """Images a second and the time that is left, once there is something to say."""
        (start, first, first_images), (end, last, last_images) = self._history[0], self._history[-1]
        if end <= start or last <= first:
            return []
        rate = (last_images - first_images) / (end - start)
        minutes, seconds = divmod(round((self.total - last) * (end - start) / (last - first)), 60)
        hours, minutes = divmod(minutes, 60)
        return [f"{rate:,.{0 if rate >= 10 else 2}f} images/s", f"{hours}:{minutes:02d}:{seconds:02d} left"]

    def close(self) -> None:
        """Give the terminal back."""
        if self.is_live:
            self._bar.stop()


@contextmanager
def counting(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Within the context, call the function that it yields with the number of further images that are done.

    Args:
        what: Is going on, e.g. "sampling".
        total: Images.
        done: Of them, before; they do not count for the speed.
    """
    bar = ProgressBar(what, total, done)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.advance(done, done)

    try:
        yield advance
    finally:
        bar.close()
