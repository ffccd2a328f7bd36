"""How far a command is, on standard error: a bar in a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LINES, _SECONDS_OF_SPEED = 10.0, 2.0


@contextmanager
def counting(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Within the context, tell the function that it yields how many more images are done.

    Args:
        what: Is going on, e.g. "sampling".
        total: Images.
        done: Of them, before; they do not count for the speed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    speed = _Speed()
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what, total, done, speed)
        return
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed:,}/{task.total:,}"))
    with Progress(*columns, TextColumn("{task.fields[status]}"), console=console, transient=True) as bar:
        task, before = bar.add_task(what, total=total, completed=done, status=""), done

        def advance(count: int) -> None:
            nonlocal before
            before += count
            bar.update(task, completed=before, status=speed(before, total))

        yield advance


def _lines(what: str, total: int, done: int, speed: _Speed) -> Callable[[int], None]:
    """One for every tenth, but not oftener than every few seconds: nothing at all for what is done at once."""
    shown, last = 10 * done // total, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, shown, last
        done, now = done + count, time.monotonic()
        status = speed(done, total)
        if 10 * done // total > shown and now - last >= _SECONDS_BETWEEN_LINES:
            shown, last = 10 * done // total, now
            print(f"{what} {done:,}/{total:,}  {status}".rstrip(), file=sys.stderr, flush=True)

    return advance


class _Speed:
    """Of the last batches; the first one only starts the clock: it waited for the model."""

    def __init__(self) -> None:
        self._history = deque[tuple[float, int]](maxlen=200)

    def __call__(self, done: int, total: int) -> str:
        """Images a second and the time that is left, once there is something to say."""
        self._history.append((time.monotonic(), done))
        (start, first), (end, last) = self._history[0], self._history[-1]
        if end - start < _SECONDS_OF_SPEED:
            return ""
        rate = (last - first) / (end - start)
        minutes, seconds = divmod(round((total - done) / rate), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{rate:,.{0 if rate >= 10 else 2}f} images/s  {hours}:{minutes:02d}:{seconds:02d} left"
