"""Models and settings of earlier versions: what their files say, in the words of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KIND_OF_METHOD = {"EDM": "diffusion"}  # `info["method"]` of format 2; every other was a consistency model


def upgrade_config(config: Mapping[str, Any], method: str | None = None) -> dict[str, Any]:
    """`Denoiser.config` as this version writes it; what is already so is returned as it is.

    Until format 2 the network was always a `UNet` without a name, the parametrization was `scalings` with `boundary`,
    `sigma_data` and `noise_scale` beside it, `label_dropout` stood with the network, and there was no `kind`.

    Args:
        config: As it lies in a file or checkpoint.
        method: Name of the class that trained it, where the file says it: it tells EDM from ECT, whose boundary is 0
            as well.
    """
    config = dict(config)
    if "parametrization" in config:
        return config
    network = dict(config.pop("network"))
    scalings, label_dropout = config.pop("scalings", "edm"), network.pop("label_dropout", 0.0)
    arguments = {name: config.pop(name) for name in ("boundary", "sigma_data", "noise_scale") if name in config}
    if scalings == "flow":
        arguments.pop("sigma_data", None)  # the path of flow matching has none
    upgraded = {
        "network": {"name": "unet", "arguments": network},
        "parametrization": {"name": scalings, "arguments": arguments},
        "label_dropout": label_dropout,
        **config,
    }
    if method is not None:
        upgraded["kind"] = KIND_OF_METHOD.get(method, "consistency")
    return upgraded


def upgrade_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration of a run, as this version writes it; what is already so is returned as it is.

    Until version 0.1 `levels` was called `draw`, `model` and `parametrization` were `noise` and `method.denoiser`, and
    `sigma_data` was not the data's.
    """
    settings = dict(settings)
    if "noise" not in settings or "draw" not in settings:
        return _renamed_targets(settings)
    noise, levels = settings.pop("noise"), _renamed_targets(settings.pop("draw"))
    method = {key: value for key, value in settings["method"].items() if key != "draw"}
    old = method.get("denoiser", noise)
    network = dict(settings.get("network") or {})
    label_dropout = network.pop("label_dropout", 0.0)
    is_flow = old.get("scalings") == "flow"
    consistency_boundary = noise["sigma_min"] if "teacher" in method else 0.0
    parametrization = {
        "_target_": f"consistency.models.parametrization.{'Flow' if is_flow else 'EDM'}",
        **({} if is_flow else {"sigma_data": noise["sigma_data"]}),
        "boundary": old.get("boundary", consistency_boundary),
        "noise_scale": noise["noise_scale"] if "denoiser" in method else 0.25,  # CD takes its teacher's
    }
    model = {
        "_target_": "consistency.models.denoiser.Denoiser",
        "_convert_": "object",
        "network": network or None,
        "parametrization": parametrization,
        "sigma_min": noise["sigma_min"],
        "sigma_max": noise["sigma_max"],
        "label_dropout": label_dropout,
    }
    settings |= {"model": model, "parametrization": parametrization, "levels": levels, "network": network or None}
    settings["method"] = {**method, "levels": levels, **({"denoiser": model} if "denoiser" in method else {})}
    settings["data"] = {**settings["data"], "sigma_data": noise["sigma_data"]}
    return _renamed_targets(settings)


_MODULES = {
    "consistency.noise.draws.": "consistency.noise.levels.",
    "consistency.losses.": "consistency.methods.",
    "consistency.callbacks.": "consistency.training.",
    "consistency.runs.": "consistency.commands.",
    "consistency.checkpoints.io.": "consistency.checkpoints.native.",
}


def _renamed_targets(tree: Any) -> Any:
    """Dotted names of classes and functions that have moved."""
    if isinstance(tree, Mapping):
        return {key: _renamed_targets(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_renamed_targets(value) for value in tree]
    for old, new in _MODULES.items():
        if isinstance(tree, str) and tree.startswith(old):
            return new + tree[len(old) :]
    return tree
