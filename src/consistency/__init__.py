"""Consistency models on PyTorch Lightning and Hydra: EDM, CD, CT, iCT and ECT.

The names below are imported on first use, so that `import consistency` costs next to nothing and
`consistency-train --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Model": "consistency.api",
    "load": "consistency.api",
    "Denoiser": "consistency.models.denoiser",
    "UNet": "consistency.models.unet",
    "save_grid": "consistency.data.image_files",
    "load_denoiser": "consistency.checkpoints.native",
    "save_denoiser": "consistency.checkpoints.native",
    "EDM": "consistency.methods.edm",
    "ConsistencyDistillation": "consistency.methods.distillation",
    "ConsistencyTraining": "consistency.methods.training",
    "ConsistencySampler": "consistency.sampling.samplers",
    "OdeSampler": "consistency.sampling.samplers",
    "Method": "consistency.methods.base",
    "Step": "consistency.methods.base",
    "Random": "consistency.methods.random",
    "register_network": "consistency.models.register",
    "register_parametrization": "consistency.models.register",
    "add_noise": "consistency.ops",
    "karras_grid": "consistency.noise.grids",
    "to_uint8": "consistency.ops",
}

__all__ = [
    "EDM",
    "ConsistencyDistillation",
    "ConsistencySampler",
    "ConsistencyTraining",
    "Denoiser",
    "Method",
    "Model",
    "OdeSampler",
    "Random",
    "Step",
    "UNet",
    "__version__",
    "add_noise",
    "karras_grid",
    "load",
    "load_denoiser",
    "register_network",
    "register_parametrization",
    "save_denoiser",
    "save_grid",
    "to_uint8",
]

if TYPE_CHECKING:
    from consistency.api import Model, load
    from consistency.checkpoints.native import load_denoiser, save_denoiser
    from consistency.data.image_files import save_grid
    from consistency.methods.base import Method, Step
    from consistency.methods.distillation import ConsistencyDistillation
    from consistency.methods.edm import EDM
    from consistency.methods.random import Random
    from consistency.methods.training import ConsistencyTraining
    from consistency.models.denoiser import Denoiser
    from consistency.models.register import register_network, register_parametrization
    from consistency.models.unet import UNet
    from consistency.noise.grids import karras_grid
    from consistency.ops import add_noise, to_uint8
    from consistency.sampling.samplers import ConsistencySampler, OdeSampler


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'consistency' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
