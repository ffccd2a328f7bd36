"""`consistency-sample`: a trained model in, images out. Needs no Lightning."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from consistency.checkpoints.native import load_model
from consistency.commands.checks import ending_of
from consistency.commands.image_parts import ImageParts, claimed, finish_folder, finish_npz, is_finished_npz
from consistency.commands.processes import (
    Job,
    ready,
    sample_on,
    sample_parts,
    torchrun_rank,
    wait_for_first,
    wait_for_others,
    weights_digest,
)
from consistency.config import CONF_DIR
from consistency.data.image_files import is_grid, save_gif, save_grid
from consistency.io.progress import counting
from consistency.io.tensors import digest_of
from consistency.models.execution import check_execution
from consistency.ops import find_device
from consistency.sampling.images import labels_of, recorded, sample_batches
from consistency.sampling.wrappers import guided

log = logging.getLogger(__name__)


def sample(cfg: DictConfig) -> Path:
    """Draw images from a trained model; returns what was written."""
    out, device = Path(cfg.out), find_device(cfg.device)
    denoiser, info = load_model(cfg.ckpt, cfg.weights)
    cfg = OmegaConf.create({**cfg, "sampler": sampler_of(cfg, denoiser.kind)})
    sampler = instantiate(cfg.sampler, _convert_="object")
    check_sampler(sampler, denoiser.kind, cfg.ckpt)
    if ending_of(cfg.out) in (".png", ".gif"):
        batch_size = min(cfg.batch_size, cfg.num_samples)
        model = ready(denoiser, device, guidance=cfg.guidance, batch_size=batch_size, **execution_of(cfg))
        _write_picture(cfg, out, model, sampler)
        done = True
    else:
        done = _write_files(cfg, out, denoiser, sampler, device)
    log.info("%s%d images (%s, weights %s, seed %d) -> %s", "" if done else "finished already: ", cfg.num_samples,
             info.get("method", "model"), info.get("weights"), cfg.seed, out)  # fmt: skip
    return out


def execution_of(cfg: DictConfig) -> dict[str, Any]:
    """How the network is run; without what is left as it is, which earlier versions did not know."""
    usual = {"compile": False, "channels_last": False, "dtype": "fp32"}
    return {name: cfg[name] for name, value in usual.items() if cfg[name] != value}


def _write_picture(cfg: DictConfig, out: Path, denoiser: Any, sampler: Any) -> None:
    """A grid, or with `trajectory` what the network saw in each evaluation: a strip (PNG) or an animated grid (GIF)."""
    if out.exists() and not is_grid(out):
        raise ValueError(f"out={out} exists, and consistency-sample did not make it; name a new file")
    options: dict[str, Any] = {"num_samples": cfg.num_samples, "seed": cfg.seed, "batch_size": cfg.batch_size}
    options["labels"] = _plain(cfg.labels)
    with counting("sampling", cfg.num_samples) as progress:
        if not cfg.trajectory:
            save_grid(sample_in_batches(denoiser, sampler, **options, progress=progress)[0], out)
            return
        frames = trajectory(denoiser, sampler, **options, progress=progress)
    if ending_of(cfg.out) == ".gif":
        save_gif(list(frames), out)
    else:
        save_grid(frames.transpose(0, 1).flatten(0, 1), out, columns=len(frames))


def _write_files(cfg: DictConfig, out: Path, denoiser: Any, sampler: Any, device: torch.device) -> bool:
    """Single PNGs or an `.npz`, by one process or several, from where the command was stopped; False: nothing to do."""
    rank, world_size = torchrun_rank()
    devices = find_devices(cfg.devices if world_size == 1 else 1, cfg.device, device)
    labels = labels_of(_plain(cfg.labels), cfg.seed, cfg.num_samples, denoiser.num_classes)
    job = Job(
        ckpt=str(cfg.ckpt),
        weights=cfg.weights,
        digest=weights_digest(denoiser),
        guidance=cfg.guidance,
        sampler=sampler,
        seed=cfg.seed,
        labels=_plain(cfg.labels),
        batch_size=min(cfg.batch_size, cfg.num_samples),
        execution=execution_of(cfg),
        imports=tuple(cfg.get("imports") or ()),
    )
    guided(denoiser, cfg.guidance)  # refuses what this model cannot do, before anything is begun
    check_execution(device, compile=cfg.compile, precision=cfg.dtype)
    settings = _settings(cfg, job, device)
    as_npz = ending_of(cfg.out) == ".npz"
    parts = ImageParts(out.with_name(f"{out.name}.partial") if as_npz else out, cfg.num_samples, cfg.batch_size)
    if rank > 0:
        if wait_for_first(parts, out, settings):
            _sample_missing(parts, parts.missing(), job, denoiser, devices, rank, world_size)
        return True
    if as_npz and is_finished_npz(out, settings):
        return False
    with claimed(parts, out, settings):
        missing = parts.missing()
        with _stoppable(parts, out):
            _sample_missing(parts, missing, job, denoiser, devices, rank, world_size)
            if world_size > 1:
                wait_for_others(parts)
        if as_npz:
            finish_npz(parts, out, labels, settings)
        else:
            finish_folder(parts, settings)
    return bool(missing) or as_npz


def _sample_missing(
    parts: ImageParts,
    missing: list[int],
    job: Job,
    denoiser: Any,
    devices: list[torch.device],
    rank: int,
    world_size: int,
) -> None:
    """Of the missing batches those of this process of torchrun, on its devices."""
    batches = [batch for batch in missing if batch % world_size == rank]
    devices = devices[: max(1, len(batches))]
    with counting("sampling", parts.num_samples, parts.count_done(missing)) as progress:
        if batches and len(devices) == 1:
            sample_parts(job.ready(denoiser, devices[0]), job, parts, batches, progress)
        elif batches:
            sample_on(devices, job, parts, batches, progress)


def _settings(cfg: DictConfig, job: Job, device: torch.device) -> dict[str, Any]:
    """All that determines the images, bit for bit, under the names of the options."""
    given = job.labels
    if isinstance(given, list) and len(given) > 100:
        given = f"{len(given)} of them, sha256 {digest_of(torch.tensor(given))[:16]}"
    sampler = OmegaConf.to_container(cfg.sampler, resolve=True)
    own = {name: cfg[name] for name in ("seed", "num_samples", "batch_size", "guidance")}
    own |= {"labels": given, "sampler": sampler, "device": device.type, "weights_digest": job.digest[:32]}
    return own | job.execution


@contextmanager
def _stoppable(parts: ImageParts, out: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command with what is done on disk, and a line about it."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        done = parts.count_done(parts.missing())
        log.info("%s: stopped at %d of %d images; the same command goes on", out, done, parts.num_samples)
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _plain(labels: Any) -> Any:
    return OmegaConf.to_container(labels) if OmegaConf.is_config(labels) else labels


DEFAULT_SAMPLERS = {"diffusion": "heun", "consistency": "onestep", "flow_map": "onestep"}  # of each kind of model


def sampler_of(cfg: DictConfig, kind: str) -> DictConfig:
    """The sampler of a command: the one that was asked for, or the default of this kind of model."""
    if cfg.get("sampler") is not None:
        return cfg.sampler
    return DictConfig(OmegaConf.load(CONF_DIR / "sampler" / f"{DEFAULT_SAMPLERS[kind]}.yaml"))


def check_sampler(sampler: Any, kind: str, ckpt: str) -> None:
    """Refuse what draws nonsense: one evaluation of a diffusion model, an ODE solver on a consistency model.

    Args:
        sampler: With an attribute `kinds`, the kinds of models that it can sample; one without it may sample any.
        kind: Of the model.
        ckpt: For the message.

    Raises:
        ValueError: with samplers that fit.
    """
    sampler = getattr(sampler, "func", sampler)  # of a partial, what it is one of
    if kind not in getattr(sampler, "kinds", (kind,)):
        allowed = {"diffusion": "heun, euler, dpm2 or ancestral"}.get(kind, "onestep or multistep")
        raise ValueError(
            f"{ckpt} is a {kind} model, which {type(sampler).__name__} cannot sample; use sampler={allowed}"
        )


def sample_in_batches(
    denoiser: Any,
    sampler: Any,
    *,
    num_samples: int,
    seed: int,
    batch_size: int,
    labels: Any = None,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(uint8 [N, C, H, W], int64 [N] or None) on the CPU; image i is a function of (seed, i), not of the batch.

    Args:
        denoiser: A model, on its device.
        sampler: A `ConsistencySampler` or `OdeSampler`.
        num_samples: N.
        seed: Of all images.
        batch_size: Images at a time.
        labels: As `labels_of` takes them.
        progress: Called after each batch with the number of its images.
    """
    all_labels = labels_of(labels, seed, num_samples, denoiser.num_classes)
    batches = (part.tolist() for part in torch.arange(num_samples).split(batch_size))
    images = []
    for indices, batch in sample_batches(denoiser, sampler, batches, seed=seed, labels=all_labels):
        images.append(batch.cpu())
        progress(len(indices))
    return torch.cat(images), all_labels


def trajectory(denoiser: Any, sampler: Any, *, batch_size: int, **options: Any) -> torch.Tensor:
    """The estimate of each image in every network evaluation, the sample last; uint8 [T, N, C, H, W] on the CPU.

    Args:
        denoiser: A model, on its device.
        sampler: A `ConsistencySampler` or `OdeSampler`.
        batch_size: Images at a time.
        options: As of `sample_in_batches`.
    """
    view, estimates = recorded(denoiser)
    images, _ = sample_in_batches(view, sampler, batch_size=batch_size, **options)
    evaluations = len(estimates) // -(-len(images) // batch_size)  # of a batch
    frames = torch.stack([torch.cat(estimates[step::evaluations]) for step in range(evaluations)])
    if (frames[-1].int() - images.int()).abs().max() <= 1:  # most samplers end in their last estimate
        frames = frames[:-1]
    return torch.cat([frames, images[None]])


def find_devices(devices: int | str, name: str, first: torch.device) -> list[torch.device]:
    """One device a process.

    Args:
        devices: How many; `auto` for all GPUs, and for one process where there are none.
        name: The device as the user named it.
        first: What `find_device` made of it.

    Raises:
        ValueError: if there are not so many.
    """
    if first.type == "cpu":
        return [first] * (1 if devices == "auto" else int(devices))
    there = torch.cuda.device_count() if first.type == "cuda" and ":" not in name else 1
    count = there if devices == "auto" else int(devices)
    if count > there:
        raise ValueError(f"devices is {count}, but device={name} has {there} here; take fewer, or auto")
    return [first] if count == 1 else [torch.device(first.type, index) for index in range(count)]
