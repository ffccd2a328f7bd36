"""Runs of a multirun side by side, each in a process of its own."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from consistency.commands.folder import objective_of, status_of, write_status
from consistency.commands.slurm import requeue
from consistency.commands.start import REFUSED, command_of, environment_of_run
from consistency.io.safe_load import first_line
from consistency.sweeps.slots import find_slots
from consistency.sweeps.study import Run, labels, plan_runs

log = logging.getLogger(__name__)


class LocalLauncher(Launcher):
    """A queue of runs over slots; each run is the command that a person would type for it.

    joblib's launcher keeps its workers between jobs, hands out no devices and ends with the first worker that dies;
    submitit's local executor has no queue. A process a run also means that nothing leaks from one to the next, and
    that a run of several devices starts its own ranks and not the multirun again.

    Args:
        slots: Runs at a time: a number, or `auto` for one a group of `gpus` GPUs, else one a group of `threads` cores.
        gpus: GPUs a run, as `CUDA_VISIBLE_DEVICES`; where there are fewer than slots x gpus, slots share them.
        threads: CPU threads a run without a GPU.
    """

    hydra_context: Any
    config: Any

    def __init__(self, slots: int | str = "auto", gpus: int = 1, threads: int = 1) -> None:
        self.slots, self.gpus, self.threads = slots, gpus, threads
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stop_signal: int | None = None
        self._lock = threading.RLock()  # a second signal may come while the first one is handled

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives; the task function is not used, its command is."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Carry out runs for a sweeper of others; the result of a run is its objective, or why it failed."""
        runs = self.run(plan_runs(self.hydra_context, self.config, job_overrides, initial_job_idx))
        results = []
        for run in runs:
            result = JobReturn(run.overrides, run.config, working_dir=str(run.run_dir))
            if run.error is None and run.run_dir is not None:
                result.status, result.return_value = JobStatus.COMPLETED, self._score(run.run_dir)[1]
            else:
                result.status, result.return_value = JobStatus.FAILED, RuntimeError(run.error)
            results.append(result)
        return results

    def slots_for(self, *, cpu_only: bool) -> list[dict[str, str]]:
        """What each run that goes on at the same time gets: GPUs, or threads."""
        return find_slots(self.slots, gpus=0 if cpu_only else self.gpus, threads=self.threads)

    def run(self, runs: Sequence[Run]) -> Sequence[Run]:
        """Carry out runs, and fill in the errors of those that fail.

        Raises:
            SystemExit: after Ctrl-C, SIGTERM or SIGUSR1, when every run has saved and stopped.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        named = zip(runs, labels([run.overrides for run in runs]), strict=True)
        waiting = [(run, label) for run, label in named if run.config is not None]
        slots = self.slots_for(cpu_only=all(run.config.trainer.accelerator == "cpu" for run, _ in waiting))  # type: ignore[union-attr]
        each = f"{self.gpus} GPU" if "CUDA_VISIBLE_DEVICES" in slots[0] else f"{self.threads} CPU thread"
        where, count = self.config.hydra.sweep.dir, min(len(slots), len(waiting))
        log.info("%s: %d runs, %d at a time (%s each)", where, len(runs), count, each)
        queue, numbers = iter(waiting), itertools.count(1)  # the threads share both

        def work(slot: dict[str, str]) -> None:
            for run, label in queue:
                ended = self._carry_out(run, label, slot)
                if ended is None:
                    return
                level = logging.INFO if run.error is None else logging.ERROR
                log.log(level, "[%d/%d] %s", next(numbers), len(waiting), ended)

        with self._stops_by_signal(), ThreadPoolExecutor(len(slots)) as pool:
            list(pool.map(work, slots))
        if self._stop_signal is not None:
            log.info("stopped; the same command goes on with what is left")
            if self._stop_signal == signal.SIGUSR1:
                requeue()
            sys.exit(128 + self._stop_signal)
        return runs

    def _carry_out(self, run: Run, label: str, slot: dict[str, str]) -> str | None:
        """Start a run and wait for its end; says how it ended, None for one that was not started."""
        assert run.run_dir is not None
        since, before = time.monotonic(), _time_of_status(run.run_dir)
        try:
            with self._lock:  # a signal comes before the start, or reaches the process
                if self._stop_signal is not None:
                    return None
                process = self._start(run, slot)
                self._processes.add(process)
            log.info("started   %s", label)
            code = process.wait()
        except OSError as error:  # of this run's folder; the others may have theirs
            run.error = first_line(error)
            return f"FAILED  {label}: {run.error}"
        with self._lock:
            self._processes.remove(process)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks and workers that outlived it would keep the slot busy
        status = status_of(run.run_dir)
        if code == 0:
            name, value = self._score(run.run_dir)
            score = "" if value is None else f", {name} {value:.4g}"
            return f"{status.get('state', 'finished')} {label}: {time.monotonic() - since:.0f} s{score}"
        state = status.get("state") if _time_of_status(run.run_dir) != before else None  # what this process wrote
        if code == REFUSED:  # what lies there is another's
            run.error = _last_line(run.run_dir)
        elif self._stop_signal is not None or state == "interrupted":
            run.error = "stopped"
        else:
            run.error = str(status["error"]) if state == "failed" else _write_failure(run.run_dir, code, status)
        how = "stopped" if run.error == "stopped" else "FAILED "
        return f"{how} {label}: {run.error} ({run.run_dir / 'train.log'})"

    def _start(self, run: Run, slot: dict[str, str]) -> subprocess.Popen[bytes]:
        assert run.run_dir is not None
        run.run_dir.mkdir(parents=True, exist_ok=True)
        # A session of its own: Ctrl-C reaches the launcher alone, which passes it on once.
        with (run.run_dir / "console.log").open("ab") as console:
            return subprocess.Popen(
                command_of(self.config.hydra, run.overrides, run.run_dir, str(self.config.study_name)),
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=environment_of_run(**slot),
                start_new_session=True,
            )

    def _score(self, run_dir: Path) -> tuple[str | None, float | None]:
        """Name and value of the objective of a run that is over."""
        status, name = status_of(run_dir), self.config.get("objective")
        return name or status.get("objective_name"), objective_of(status, name)

    @contextmanager
    def _stops_by_signal(self) -> Iterator[None]:
        """At a signal, ask the runs to save and stop; at a second one, kill them."""

        def stop(number: int, frame: FrameType | None) -> None:
            is_first = self._stop_signal is None
            if is_first:
                log.info("stopping: %d runs save and end; once more to kill them", len(self._processes))
            with self._lock:
                self._stop_signal = number
                for process in self._processes:
                    with suppress(ProcessLookupError):
                        process.terminate() if is_first else os.killpg(process.pid, signal.SIGKILL)

        self._stop_signal = None
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _write_failure(run_dir: Path, code: int, status: dict[str, Any]) -> str:
    """Write down the failure of a run that could not do so itself; returns it."""
    error = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    error += "; out of memory?" if -code == signal.SIGKILL else ""
    error += f"; its last line: {line}" if (line := _last_line(run_dir)) else ""
    progress = {name: status[name] for name in ("step", "images_seen", "seconds") if name in status}
    write_status(run_dir, **progress, state="failed", error=error)
    with (run_dir / "train.log").open("a") as file:
        file.write(f"the run ended without a word: {error}\n")
    return error


def _time_of_status(run_dir: Path) -> int:
    file = run_dir / "status.json"
    return file.stat().st_mtime_ns if file.exists() else 0


def _last_line(run_dir: Path) -> str:
    """Of what a run has printed."""
    file = run_dir / "console.log"
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "")
