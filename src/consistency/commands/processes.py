"""Batches sampled by one process, by several that this command starts, or by those that torchrun has started."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from consistency.checkpoints.native import load_model
from consistency.commands.image_parts import ImageParts, check_same, is_finished_npz
from consistency.data.image_files import MANIFEST
from consistency.io.safe_load import read_json
from consistency.io.tensors import digest_of
from consistency.models.execution import configure_execution
from consistency.models.register import import_modules
from consistency.sampling.images import labels_of, sample_batches
from consistency.sampling.wrappers import guided, in_full_batches

_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_FOR_THE_FIRST = 600.0  # until the first process of torchrun has read the model and made the folder


@dataclass(frozen=True)
class Job:
    """What is sampled; each process loads the model for itself.

    Args:
        ckpt: The model.
        weights: Of it; see `load_model`.
        digest: sha256 of these weights: a checkpoint may be replaced while the processes start.
        guidance: Weight; 1 is none.
        sampler: A `ConsistencySampler` or `OdeSampler`.
        seed: Of all images.
        labels: As `labels_of` takes them.
        batch_size: Images at a time; of a compiled network all batches are that large.
        execution: How the network is run; see `ready`.
        imports: Modules that register what the model is made of.
    """

    ckpt: str
    weights: str | None
    digest: str
    guidance: float
    sampler: Any
    seed: int
    labels: Any
    batch_size: int = 1
    execution: dict[str, Any] = field(default_factory=dict)
    imports: tuple[str, ...] = ()

    def model(self, device: torch.device) -> Any:
        """The denoiser, loaded and ready to sample on its device."""
        import_modules(self.imports)
        denoiser, _ = load_model(self.ckpt, self.weights)
        if weights_digest(denoiser) != self.digest:
            raise ValueError(f"{self.ckpt} changed while it was read; the same command draws from the new weights")
        return self.ready(denoiser, device)

    def ready(self, denoiser: Any, device: torch.device) -> Any:
        """`ready` with the settings of the job."""
        return ready(denoiser, device, guidance=self.guidance, batch_size=self.batch_size, **self.execution)


def ready(
    denoiser: Any,
    device: torch.device,
    *,
    guidance: float,
    batch_size: int,
    compile: bool | str = False,
    channels_last: bool = False,
    dtype: str = "fp32",
) -> Any:
    """A denoiser that was just read: on its device, run as asked, guided.

    Args:
        denoiser: Changed in place.
        device: Where it will run.
        guidance: Weight; 1 is none.
        batch_size: Images at a time.
        compile: See `configure_execution`, as for `channels_last`.
        dtype: Its precision; the option cannot have that name, it is a group of configurations.
    """
    configure_execution(denoiser.to(device), compile=compile, channels_last=channels_last, precision=dtype)
    model: Any = denoiser if compile is False else in_full_batches(denoiser, batch_size)
    return guided(model, guidance)


def weights_digest(denoiser: Any) -> str:
    """sha256 of what a denoiser computes: its weights, and the settings beside them."""
    tensors = {name: value for name, value in denoiser.state_dict().items() if isinstance(value, torch.Tensor)}
    settings = torch.tensor(list(repr(sorted(denoiser.config.items())).encode()), dtype=torch.uint8)
    return digest_of(settings, *(tensors[name] for name in sorted(tensors)))


def sample_parts(
    denoiser: Any, job: Job, parts: ImageParts, batches: Iterable[int], progress: Callable[[int], None]
) -> None:
    """Sample these batches in this process, and write them to disk.

    Args:
        denoiser: As `job.model` makes it.
        job: What to sample.
        parts: Where the images go.
        batches: Numbers of batches.
        progress: Called after each batch with the number of its images.

    Raises:
        ValueError: if a batch does not fit into memory.
    """
    labels = labels_of(job.labels, job.seed, parts.num_samples, denoiser.num_classes)
    numbers = list(batches)
    sampled = sample_batches(denoiser, job.sampler, map(parts.indices, numbers), seed=job.seed, labels=labels)
    try:
        for batch, (indices, images) in zip(numbers, sampled, strict=True):
            parts.write(batch, images.cpu())
            progress(len(indices))
    except torch.OutOfMemoryError as error:
        raise ValueError(f"batch_size={parts.batch_size} does not fit into memory; take a smaller one") from error


def sample_on(
    devices: Sequence[torch.device],
    job: Job,
    parts: ImageParts,
    batches: Sequence[int],
    progress: Callable[[int], None],
) -> None:
    """As `sample_parts`, by one process a device; process r takes every n-th of the batches.

    Raises:
        ValueError: or OSError, as the process that failed; the others are then ended.
        ProcessRaisedException: or ProcessExitedException, if one failed otherwise.
    """
    context = multiprocessing.get_context("spawn")
    done, errors = context.Value("q", 0), context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // len(devices))
    work = (list(map(str, devices)), threads, job, parts, list(batches), done, errors)
    processes = multiprocessing.start_processes(_run, work, len(devices), join=False, daemon=True, start_method="spawn")
    shown, over = 0, False
    try:
        while not over:
            over = processes.join(_SECONDS_BETWEEN_LOOKS)
            count = done.value
            progress(count - shown)
            shown = count
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException):
        if errors.empty():
            raise
        kind, text = errors.get()
        raise (OSError if kind == "OSError" else ValueError)(text) from None
    finally:
        for process in processes.processes:
            process.terminate()


def _run(
    rank: int,
    devices: Sequence[str],
    threads: int,
    job: Job,
    parts: ImageParts,
    batches: list[int],
    done: Any,
    errors: Any,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all: the parent ends its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)

    def count(images: int) -> None:
        with done.get_lock():
            done.value += images

    try:
        device = torch.device(devices[rank])
        sample_parts(job.model(device), job, parts, batches[rank :: len(devices)], count)
    except (ValueError, OSError) as error:
        errors.put(("OSError" if isinstance(error, OSError) else "ValueError", str(error)))
        raise


def _end_with_parent() -> None:
    """Exit when the parent dies, even by SIGKILL."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def torchrun_rank() -> tuple[int, int]:
    """(rank, number of processes) as torchrun says it; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_first(parts: ImageParts, out: Path, settings: dict[str, Any]) -> bool:
    """Of torchrun's other processes: wait until the first has claimed the folder; False if all is finished already."""
    deadline = time.monotonic() + _SECONDS_FOR_THE_FIRST
    while not (parts.folder / MANIFEST).exists():
        if out.suffix == ".npz" and is_finished_npz(out, settings):
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"{parts.folder} was not made by the first process in {_SECONDS_FOR_THE_FIRST:.0f} s")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    check_same(settings, read_json(parts.folder / MANIFEST), out)
    return True


def wait_for_others(parts: ImageParts) -> None:
    """Of torchrun's first process: wait until no batch is missing; torchrun ends it when another one fails."""
    while parts.missing():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
