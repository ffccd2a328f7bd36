"""Tensor operations that every layer needs: broadcasting, shared randomness, derived seeds."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """Append axes of length 1 until `x` has `ndim` of them: [B] -> [B, 1, 1, 1] for ndim 4.

    Explicit, because [B] against [B, C, H, W] broadcasts silently along W whenever B == W.
    """
    if x.ndim > ndim:
        raise ValueError(f"cannot append dimensions: the tensor has {x.ndim}, {ndim} were asked for")
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def add_noise(x: Tensor, z: Tensor, sigma: Tensor | float) -> Tensor:
    """x + sigma z, [B, C, H, W]: images under noise z ~ N(0, I) of level sigma, [B] or one for all."""
    return x + (append_dims(sigma, x.ndim) if isinstance(sigma, Tensor) else sigma) * z


def send(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on another device; on CUDA through pinned memory, so that nobody waits for the device."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@contextmanager
def same_randomness(device: torch.device) -> Iterator[Callable[[], None]]:
    """Two forward passes with one dropout mask, on CPU and on CUDA (iCT, Sec. 3.1).

    Yields `rewind`, which puts the random state back to what it was on entry:

        with same_randomness(images.device) as rewind:
            online = denoiser(x_hi, sigma_hi)
            rewind()
            target = denoiser(x_lo, sigma_lo)

    Both the CPU generator and that of `device` are rewound: saving only the CPU state, as public code does,
    leaves the masks on a GPU different.
    """
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None

    def rewind() -> None:
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)

    yield rewind


def seed_everywhere(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and one device; that one walks the stack where CUDA is unused, 2 ms a call."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def derive_seed(purpose: str, *keys: int) -> int:
    """A 63-bit seed that is a fixed function of a purpose and non-negative integers, e.g. ("step", seed, rank, images).

    Neighbouring keys give unrelated seeds, unlike `seed + rank`; other purposes never share a stream.
    """
    # The length is a key too: SeedSequence ignores trailing zeros.
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), len(keys), *keys])
    low, high = sequence.generate_state(2)
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


def image_seeds(seed: int, indices: Iterable[int]) -> list[int]:
    """Seed of each image that a sampling run with `seed` draws; image i depends on (seed, i) alone."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2^63 - 1, got {seed}")
    return [derive_seed("image", seed, int(index)) for index in indices]


def randn_of_seeds(seeds: list[int], shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Standard normal noise in which row i depends on `seeds[i]` alone, whatever the batch.

    Returns a function like `torch.randn_like`: each call draws the next [B, *shape] for these B seeds, on the CPU
    (so that every device gets the same numbers), and moves it to the device and dtype of its argument.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def randn_like(x: Tensor) -> Tensor:
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return send(noise, x.device).to(x.dtype)

    return randn_like


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by clamping and *rounding*; the identity on all 256 levels after `from_uint8`.

    Truncation, as in much public code, darkens by half a grey level and moves FID.
    """
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float() / 127.5 - 1


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name; `auto` is CUDA, else MPS, else the CPU.

    Raises:
        ValueError: if it cannot be used here.
    """
    if name != "auto":
        try:
            return torch.zeros(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
