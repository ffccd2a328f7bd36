"""Names of the files in a run directory, and locks on them; nothing heavy is imported."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

MODEL_FOLDER = "model"
CHECKPOINT = Path("checkpoints") / "last.ckpt"
PREVIOUS_CHECKPOINT = Path("checkpoints") / "previous.ckpt"


@contextmanager
def locked(path: Path, *, patience: float | None = None) -> Iterator[None]:
    """One process at a time works on `path`; the system frees the lock when that process ends, however it ends.

    The lock is the file `.NAME.lock` beside `path`, with the number of the process in it.

    Args:
        path: File or folder, which need not exist.
        patience: Seconds to wait for the other process; None: as long as it takes.

    Raises:
        TimeoutError: if another process still holds it after that time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = None if patience is None else time.monotonic() + patience
    with path.with_name(f".{path.name}.lock").open("a+") as file:
        waits = False
        while not _taken(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"{path} is in use by {holder}")
            if not waits:
                log.info("waiting for %s, which works on %s", holder, path)
            waits = True
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _taken(file: IO[str]) -> bool:
    import fcntl  # POSIX

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_name(name: object) -> bool:
    """Whether this can be the name of a folder of runs."""
    return isinstance(name, str) and re.fullmatch(r"[\w.,=+-]*\w[\w.,=+-]*", name) is not None
