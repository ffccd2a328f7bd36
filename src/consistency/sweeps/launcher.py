"""Runs of a multirun side by side, each in a process of its own."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from consistency.commands.folder import objective_of, status_of, write_status
from consistency.commands.slurm import requeue
from consistency.commands.start import REFUSED, command_of, environment_of_run
from consistency.sweeps.slots import Slot, find_slots
from consistency.sweeps.study import INVALID, note_runs, shown

log = logging.getLogger(__name__)


@dataclass
class Job:
    """One run: what was asked for, where it lies, and its process while it has one."""

    overrides: list[str]
    run_dir: Path
    config: DictConfig | None = None  # None: does not compose
    label: str = ""
    slot: Slot | None = None
    process: subprocess.Popen[bytes] | None = None
    since: float = 0.0
    written: float = 0.0  # when its status was, before it started
    result: JobReturn = field(default_factory=JobReturn)


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

    def __init__(self, slots: int | str = "auto", gpus: int = 1, threads: int = 1) -> None:
        self.slots, self.gpus, self.threads = slots, gpus, threads
        self._stopping: int | None = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Keep what Hydra knows; the task function is not used, its command is."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run them all; the result of a run is its objective, or the exception that says why it failed.

        Raises:
            ValueError: if two runs would share a directory.
            SystemExit: after Ctrl-C, SIGTERM or SIGUSR1, when every run has saved and stopped.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        sweep_dir = Path(str(self.config.hydra.sweep.dir))
        numbered = enumerate(job_overrides, initial_job_idx)
        jobs = [self._composed(sweep_dir, list(overrides), number) for number, overrides in numbered]
        _label(jobs)
        note_runs(sweep_dir, str(self.config.study_name), {job.run_dir.name: job.overrides for job in jobs})
        cpu_only = all(job.config is None or job.config.trainer.accelerator == "cpu" for job in jobs)
        slots = find_slots(self.slots, gpus=0 if cpu_only else self.gpus, threads=self.threads)
        log.info("%s: %d runs, %d at a time (%s)", sweep_dir, len(jobs), min(len(slots), len(jobs)), slots[0].what)
        with self._signals():
            self._work(jobs, slots)
        if self._stopping is not None:
            log.info("stopped; the same command goes on with what is left")
            if self._stopping == signal.SIGUSR1:
                requeue()
            sys.exit(128 + self._stopping)
        return [job.result for job in jobs]

    def _composed(self, sweep_dir: Path, overrides: list[str], number: int) -> Job:
        """Find the directory of a run; one that does not compose has one too, for its log and status."""
        digest = hashlib.sha256(" ".join(overrides).encode()).hexdigest()[:6]
        job = Job(overrides, sweep_dir / f"{INVALID}{digest}")
        job.result.overrides = overrides
        try:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            OmegaConf.update(config, "hydra.job.num", number, force_add=True)
            job.run_dir = sweep_dir / str(config.hydra.sweep.subdir)
        except Exception as error:
            told = "".join(traceback.format_exception(error))
            cause = error.__cause__ or error
            job.result.status, job.result.return_value = JobStatus.FAILED, error
            job.run_dir.mkdir(parents=True, exist_ok=True)
            with (job.run_dir / "train.log").open("a") as file:
                file.write(f"this run cannot be composed\n{told}")
            write_status(job.run_dir, state="failed", error=_first_line(cause), traceback=told)
            log.error("cannot be composed: %s: %s", " ".join(overrides), _first_line(error))
        else:
            job.config = job.result.cfg = config
        job.result.working_dir = str(job.run_dir)
        return job

    def _work(self, jobs: list[Job], slots: list[Slot]) -> None:
        waiting = [job for job in jobs if job.config is not None]
        free, running = list(slots), list[Job]()
        count, total = 0, len(waiting)
        while running or (waiting and self._stopping is None):
            while waiting and free and self._stopping is None:
                job = waiting.pop(0)
                job.slot = free.pop(0)
                self._start(job)
                running.append(job)
            time.sleep(0.1)
            self._pass_on(running)
            for job in [job for job in running if job.process is not None and job.process.poll() is not None]:
                running.remove(job)
                assert job.slot is not None
                free.append(job.slot)
                count += 1
                self._finish(job, f"[{count}/{total}]")

    def _start(self, job: Job) -> None:
        assert job.slot is not None
        assert job.config is not None
        job.run_dir.mkdir(parents=True, exist_ok=True)
        command = command_of(self.config.hydra, job.overrides, job.run_dir, str(self.config.study_name))
        job.written = _time_of(job.run_dir / "status.json")
        # A session of its own: Ctrl-C reaches the launcher alone, which passes it on once.
        with (job.run_dir / "console.log").open("ab") as console:
            job.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=environment_of_run(**job.slot.environment),
                start_new_session=True,
            )
        job.since = time.monotonic()
        log.info("started   %s", job.label)

    def _finish(self, job: Job, counted: str) -> None:
        """Take the result; what died without a word is written down for it."""
        assert job.process is not None
        assert job.process.stdin is not None
        job.process.stdin.close()
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)  # ranks and workers that outlived it would keep the slot busy
        code, seconds, console = job.process.returncode, time.monotonic() - job.since, job.run_dir / "console.log"
        status = status_of(job.run_dir)
        if code == 0:
            value = objective_of(status, self.config.get("objective"))
            job.result.status, job.result.return_value = JobStatus.COMPLETED, value
            name = self.config.get("objective") or status.get("objective_name")
            score = "" if value is None else f", {name} {value:.4g}"
            log.info("%s %s %s: %.0f s%s", counted, status.get("state", "finished"), job.label, seconds, score)
            return
        if code == REFUSED:
            line = _last_line(console)
        elif self._stopping is not None or status.get("state") == "interrupted":
            line = "stopped"
        else:
            if status.get("state") != "failed" or _time_of(job.run_dir / "status.json") == job.written:
                status = _write_down(job.run_dir, code, status)
            line = status.get("error", f"exit code {code}")
        job.result.status, job.result.return_value = JobStatus.FAILED, RuntimeError(line)
        how = "stopped" if line == "stopped" else "FAILED "
        log.error("%s %s %s: %s (%s)", counted, how, job.label, line, job.run_dir / "train.log")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            self._again = self._stopping is not None
            self._stopping = number

        self._stopping, self._again, self._told = None, False, False
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, running: list[Job]) -> None:
        """Ask the runs to save and stop; at the second signal, kill them."""
        if self._stopping is None or (self._told and not self._again):
            return
        if not self._told:
            log.info("stopping: %d runs save and end; once more to kill them", len(running))
        for job in running:
            if job.process is not None and job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL) if self._again else job.process.terminate()
        self._told, self._again = True, False


def _label(jobs: list[Job]) -> None:
    """What tells the runs of a sweep from each other; two of one directory are refused."""
    for job in jobs:
        job.label = shown(job.overrides, [other.overrides for other in jobs])
    by_folder: dict[Path, Job] = {}
    for job in jobs:
        other = by_folder.setdefault(job.run_dir, job)
        if other is not job:
            raise ValueError(
                f"two runs would share {job.run_dir} ({' '.join(other.overrides)}, {' '.join(job.overrides)}); leave "
                "run_name out, and values that are given twice"
            )


def _write_down(run_dir: Path, code: int, earlier: dict[str, Any]) -> dict[str, Any]:
    """The failure of a run that could not do so itself."""
    how = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    last = _last_line(run_dir / "console.log")
    why = f"{how}{'; out of memory?' if -code == signal.SIGKILL else ''}{f'; its last line: {last}' if last else ''}"
    status: dict[str, Any] = {key: value for key, value in earlier.items() if key in ("step", "images_seen", "seconds")}
    status |= {"state": "failed", "error": why}
    write_status(run_dir, **status)
    with (run_dir / "train.log").open("a") as file:
        file.write(f"the run ended without a word: {why}\n")
    return status


def _time_of(file: Path) -> float:
    return file.stat().st_mtime_ns if file.exists() else 0


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "")
