"""Batches of images drawn by one process, or by several to which they are dealt out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from consistency.checkpoints.native import load_model
from consistency.commands.shards import Shards
from consistency.io.tensors import digest_of
from consistency.models.execution import configure_execution
from consistency.models.register import import_modules
from consistency.sampling.images import labels_of, sample_images
from consistency.sampling.wrappers import guided, in_full_batches

_AHEAD = 2  # batches that a process has: it never waits for the next one
_SECONDS_TO_END = 5.0


@dataclass(frozen=True)
class Job:
    """What is drawn; each process loads the model for itself.

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
        """The denoiser, ready to draw on its device."""
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


def draw(denoiser: Any, job: Job, shards: Shards, batches: Iterable[int], told: Callable[[int], None]) -> None:
    """Draw these batches in this process, and put them on disk.

    Args:
        denoiser: As `job.model` makes it.
        job: What to draw.
        shards: Where batches go.
        batches: Numbers of batches.
        told: After each batch, the number of its images.
    """
    labels = labels_of(job.labels, job.seed, shards.num_samples, denoiser.num_classes)
    for batch in batches:
        indices = shards.indices(batch)
        of_batch = None if labels is None else labels[indices.start : indices.stop]
        try:
            images = sample_images(denoiser, job.sampler, indices, seed=job.seed, labels=of_batch).cpu()
        except torch.OutOfMemoryError as error:
            raise ValueError(f"batch_size={shards.batch_size} does not fit into memory; take a smaller one") from error
        shards.write(batch, images)
        told(len(indices))


def draw_on(
    devices: Sequence[torch.device], job: Job, shards: Shards, batches: Sequence[int], told: Callable[[int], None]
) -> None:
    """As `draw`, by one process a device; each gets the next batch when it is done with one.

    Raises:
        ValueError: or OSError, as the process that failed.
        RuntimeError: if one failed otherwise.
    """
    context = multiprocessing.get_context("spawn")
    threads, waiting = max(1, torch.get_num_threads() // len(devices)), iter(batches)
    children: dict[Connection, Any] = {}
    try:
        with _not_interrupted():
            for device in devices:
                mine, its = context.Pipe()
                child = context.Process(target=_child, args=(job, shards, str(device), threads, its), daemon=True)
                child.start()
                its.close()  # the end of the child is then the end of the pipe
                children[mine] = child
                for _ in range(_AHEAD):
                    mine.send(next(waiting, None))
        open_pipes = list(children)
        while open_pipes:
            for pipe in wait(open_pipes):
                assert isinstance(pipe, Connection)
                try:
                    _hear(pipe.recv(), told)
                except (EOFError, ConnectionResetError):
                    open_pipes.remove(pipe)
                    _check_end(children[pipe])
                else:
                    with suppress(ConnectionError):  # it has left already, and what it still said is read next
                        pipe.send(next(waiting, None))
    finally:
        _end(children.values())


def _hear(word: int | tuple[str, str], told: Callable[[int], None]) -> None:
    if isinstance(word, int):
        told(word)
        return
    kind, text = word
    raise {"ValueError": ValueError, "OSError": OSError}.get(kind, RuntimeError)(text)


def _check_end(child: Any) -> None:
    child.join()
    if child.exitcode != 0:
        raise RuntimeError(f"a process that draws ended with exit code {child.exitcode}; out of memory?")


def _end(children: Iterable[Any]) -> None:
    for child in children:
        child.terminate()
    deadline = time.monotonic() + _SECONDS_TO_END
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill()


def _child(job: Job, shards: Shards, device: str, threads: int, pipe: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        draw(job.model(torch.device(device)), job, shards, iter(pipe.recv, None), pipe.send)
    except SystemExit as end:  # nothing is half written now, and to unload torch takes seconds
        os._exit(int(str(end.code)))
    except (ValueError, OSError) as error:
        pipe.send(("OSError" if isinstance(error, OSError) else "ValueError", str(error)))
    except Exception:
        pipe.send(("RuntimeError", traceback.format_exc()))


def _end_with_parent() -> None:
    """Also after a SIGKILL, which the parent cannot pass on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _not_interrupted() -> Iterator[None]:
    """Processes that are started here do not see Ctrl-C, which a terminal sends to all: their parent ends them."""
    resource_tracker.ensure_running()  # it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
