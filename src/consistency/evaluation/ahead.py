"""Sampling that runs ahead of the extractor: while it works on one batch, the next ones are drawn.

A thread draws on a CUDA stream of its own. Noise is made on the CPU, and each of the two stages leaves parts of a GPU
idle; on a CPU both use all cores, and there is nothing to gain.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from consistency.evaluation.extractors import PRECISION_LOCK
from consistency.sampling.wrappers import DenoiserWrapper

_AHEAD = 2  # batches that are drawn and not yet taken, at most
_END = object()

Batch = tuple[Tensor, Tensor]


def in_turn(denoiser: Any) -> DenoiserWrapper:
    """The denoiser, whose kernels are never launched while an extractor has switched the precision of all threads."""

    def answer(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        with PRECISION_LOCK:
            return denoiser(x, sigma, labels)

    return DenoiserWrapper(denoiser, answer)


@contextmanager
def drawn_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Iterator[Batch]]:
    """Within the context, the same batches in the same order, drawn by a thread that is at most two ahead.

    Its errors are raised where the batches are taken. When the context is left, for whatever reason, the thread has
    ended, and what it launched comes before all that is launched afterwards.

    Args:
        batches: (images, indices); its code runs in the thread, in the caller's autocast and without gradients.
        device: Of the images.
    """
    caller = torch.cuda.current_stream(device) if device.type == "cuda" else None
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    drawn: SimpleQueue[Any] = SimpleQueue()
    room, stop = threading.Semaphore(_AHEAD), threading.Event()
    # These two are the caller's thread's; in the new one they would have their defaults.
    autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    def draw() -> None:
        try:
            like_the_caller = torch.autocast(device.type, autocast[1], enabled=autocast[0])
            with torch.cuda.stream(stream), like_the_caller, torch.no_grad():
                while room.acquire() and not stop.is_set() and (batch := next(batches, None)) is not None:
                    drawn.put((batch, stream.record_event() if stream is not None else None))
        except BaseException as error:  # whatever it is, it belongs to who waits for the batch
            drawn.put(error)
        finally:
            drawn.put(_END)

    def take() -> Iterator[Batch]:
        while (item := drawn.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            (images, indices), event = item
            room.release()
            if event is not None:
                here = torch.cuda.current_stream(device)
                here.wait_event(event)
                images.record_stream(here)  # or its memory would be drawn into while the extractor reads it
            yield images, indices

    if stream is not None and caller is not None:
        stream.wait_stream(caller)  # weights that were just written
    thread = threading.Thread(target=draw, name="consistency-draws-ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stop.set()
        room.release()
        thread.join()
        if stream is not None and caller is not None:
            caller.wait_stream(stream)  # the caller may go on to change the weights
