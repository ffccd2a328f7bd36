"""LPIPS, the learned metric of CM. Apart from `metrics.py`, because it holds a network and must find its weights."""

from __future__ import annotations

import http.client
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
_FILE = _URL.rpartition("/")[2]
_MIN_SIZE = 16  # four max-pools come before the last of the five feature maps


class LPIPS:
    """sum_l mean_hw w_l . (phi_l(a) - phi_l(b))^2, phi_l unit-length VGG-16 features; [B] (Zhang et al. 2018, Eq. 1).

    CM trains with it (Sec. 5, App. C). This is the VGG of the `lpips` package, with max-pools, as in CM's JAX code;
    OpenAI's PyTorch code has average pools in their place, so its values differ.

    The network is a constant of the loss, not a part of the model. So this is no `nn.Module`: it stays out of state
    dicts, averages and optimizers, and no `train()` turns on the dropout in its heads. It follows its input to another
    device, and computes in float32 under autocast too. Gradients reach whichever image asks for one, never the weights.

    Args:
        backbone: File of torchvision's VGG-16 weights, whole or `features.*` only. None takes it from torch's cache,
            or downloads it there (528 MB).
        resize: Images whose shorter side is below this are enlarged to it, bilinearly. CM uses 224, the size VGG was
            trained at. None compares them as they are: far cheaper, but no longer CM's loss.

    Raises:
        ValueError: if the weights are absent or not VGG-16's, or `resize` is below 16.
    """

    def __init__(self, backbone: str | None = None, *, resize: int | None = 224) -> None:
        if resize is not None and resize < _MIN_SIZE:
            raise ValueError(f"resize must be at least {_MIN_SIZE} or null, got {resize}; change metric.resize")
        self.resize = resize
        self._net = _build(_cached() if backbone is None else Path(backbone).expanduser())

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair of images, without a unit, 0 where they are equal; [B], float32.

        Args:
            a: [B, C, H, W] in [-1, 1], not clamped; C is 1 (grey, seen as three equal channels) or 3.
            b: Shape of `a`.

        Raises:
            ValueError: for other shapes, and for images below 16 pixels with `resize=None`.
        """
        if a.shape != b.shape:
            raise ValueError(f"LPIPS compares images of one shape, got {list(a.shape)} and {list(b.shape)}")
        self._follow(a.device)
        with torch.autocast(a.device.type, enabled=False):
            return self._net(self._prepare(a), self._prepare(b)).flatten()  # [B, 1, 1, 1] -> [B]

    def _prepare(self, images: Tensor) -> Tensor:
        """[B, 1 or 3, H, W] -> [B, 3, H', W'], float32 and large enough."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"LPIPS needs images [B, C, H, W] with 1 or 3 channels, got {list(images.shape)}; "
                "use metric=pseudo_huber"
            )
        images = images.float()
        height, width = images.shape[2:]
        shortest = min(height, width)
        if self.resize is not None and shortest < self.resize:
            size = [round(side * self.resize / shortest) for side in (height, width)]
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        elif shortest < _MIN_SIZE:
            raise ValueError(
                f"LPIPS needs images of at least {_MIN_SIZE}x{_MIN_SIZE} pixels, got {height}x{width}; "
                "set metric.resize=224 to enlarge them"
            )
        return images.expand(-1, 3, -1, -1)

    def _follow(self, device: torch.device) -> None:
        if self._net.scaling_layer.shift.device != device:
            # Weights moved in inference mode (a validation before training) could not serve a backward pass later.
            with torch.inference_mode(False):
                self._net.to(device)


def _build(file: Path) -> Any:
    """The package's network: VGG-16 of `file`, the package's own heads; eval and frozen."""
    state = _read(file)
    # The package first fills a whole VGG-16 at random, which must not shift the random numbers of the run.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips

        # Keep its use_dropout=True: without dropout the heads have other names, and silently stay random.
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    trunk = net.net.state_dict()
    sources = {name: f"features.{name.partition('.')[2]}" for name in trunk}  # slice2.5.weight <- features.5.weight
    for name, source in sources.items():
        if not isinstance(state.get(source), Tensor):
            raise _not_vgg16(file, f"it has no {source}")
        if state[source].shape != trunk[name].shape:
            raise _not_vgg16(file, f"{source} is {list(state[source].shape)}, not {list(trunk[name].shape)}")
    surplus = [name for name in state if str(name).startswith("features.") and name not in sources.values()]
    if surplus:
        raise _not_vgg16(file, f"it also has {surplus[0]}")
    net.net.load_state_dict({name: state[source] for name, source in sources.items()})
    return net.eval().requires_grad_(False)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"no file {file} for metric.backbone; download {_URL} and set metric.backbone=FILE")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _not_vgg16(file, f"it cannot be read: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # torch's own text runs over many lines and advises to turn off its protection.
        raise _not_vgg16(file, "it is damaged, or not a file of tensors") from error
    if not isinstance(state, dict):
        raise _not_vgg16(file, f"it holds a {type(state).__name__}")
    return state


def _not_vgg16(file: Path, reason: str) -> ValueError:
    return ValueError(f"{file} is not torchvision's VGG-16 ({reason}); set metric.backbone to a copy of {_URL}")


def _cached() -> Path:
    """torchvision's VGG-16 in torch's cache, downloaded on the first use."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / _FILE
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(_URL, str(file), hash_prefix="397923af")
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise ValueError(
                f"metric=lpips needs {_FILE}, and its download failed ({error}): fetch {_URL} on another machine, "
                f"then put it at {file} or set metric.backbone=FILE"
            ) from error
    return file
