"""Networks that turn images into features and class logits: Inception, and a classifier of the data set."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.evaluation.features import SmallClassifier, train_classifier
from consistency.evaluation.residual import ResidualClassifier, ResidualRecipe
from consistency.io.run_dir import locked
from consistency.io.tensors import digest_of, digest_of_file, read_meta, read_tensors, write_tensors

log = logging.getLogger(__name__)

PREPROCESSING = 1  # version of the way from pixels to features; a new one makes caches of references stale
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"  # how the hash of the published file begins
_CLASSIFIER = 1  # version of the classifier and its training
_TIMEOUT = 30.0  # seconds without a byte; a network that swallows packets would hang for ever


class Extractor(nn.Module):
    """Frozen, always in eval mode. `forward` maps uint8 [B, C, H, W], C 1 or 3, to features and logits, both float32.

    Attributes:
        name: "inception" or "classifier".
        prefix: Name of its Frechet distance: "fid" or "fd_classifier".
        dim: Length of a feature vector.
        num_logits: Length of the logits.
        digest: First 16 hexadecimal digits of the sha256 of the weights (of their file, for Inception).
    """

    name: str
    prefix: str
    dim: int
    num_logits: int
    digest: str

    def train(self, mode: bool = True) -> Extractor:
        """Stay in eval mode, whatever a trainer does to its modules."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


class Inception(Extractor):
    """The Inception of the FID paper, as torch-fidelity ported it: TF1 resize to 299, 2048 features, unbiased logits.

    Args:
        weights: See `find_inception`.
    """

    name, prefix, dim, num_logits = "inception", "fid", 2048, 1008

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        path = find_inception(weights)
        self.digest = digest_of_file(path)[:16]
        self.published = self.digest.startswith(INCEPTION_SHA256)  # else its scores are named proxies
        self.network = _read_inception(path).requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 1 or 3, H, W] -> features [B, 2048], logits [B, 1008]. Grey images are replicated."""
        return self.network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)


class ClassifierExtractor(Extractor):
    """A trained classifier; images of another size are resized, grey and colour brought to its channels.

    Args:
        model: The classifier.
        accuracy: On images that it was not trained on.
    """

    name, prefix = "classifier", "fd_classifier"

    def __init__(self, model: SmallClassifier | ResidualClassifier, accuracy: float) -> None:
        super().__init__()
        self.model, self.accuracy = model.requires_grad_(False), accuracy
        self.dim, self.num_logits = model.feature_dim, model.num_classes
        self.digest = digest_of(*model.state_dict().values())[:16]
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 1 or 3, H, W] -> features [B, dim], logits [B, num_classes]."""
        channels, size = self.model.in_channels, self.model.image_size
        if images.shape[1] != channels:
            # The mean of three equal channels is exact: grey images that became RGB on disk come back.
            images = images.expand(-1, 3, -1, -1) if channels == 3 else images.float().mean(dim=1, keepdim=True)
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        features = self.model.features(images)
        return features, self.model.head(features)


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of uint8 images, on the extractor's device; in full float32, whatever the caller runs in."""
    with _full_precision(extractor.device.type):
        return extractor(images.to(extractor.device))


def find_inception(weights: str | Path | None = None) -> Path:
    """The file of Inception's weights: the one named, else torch's cache, else downloaded there and checked.

    Args:
        weights: A file of one's own; one that is not the published file is used with a warning.

    Raises:
        ValueError: in one line, if there is none.
    """
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ValueError(f"evaluation.weights={weights} is no file; the published one is at {INCEPTION_URL}")
        if not (found := digest_of_file(path)).startswith(INCEPTION_SHA256):
            log.warning("%s is not the published Inception (sha256 %s...): scores compare to no paper", path, found[:8])
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        _download(path)
    if not (found := digest_of_file(path)).startswith(INCEPTION_SHA256):
        raise ValueError(f"{path} is damaged: its sha256 begins with {found[:8]}, not {INCEPTION_SHA256}; delete it")
    return path


def classifier_extractor(
    images: Tensor,
    labels: Tensor,
    cache_dir: str | Path,
    *,
    recipe: ResidualRecipe | None = None,
    seed: int = 0,
    epochs: int | None = None,
    holdout: float = 0.2,
    device: torch.device | str = "cpu",
) -> ClassifierExtractor:
    """A classifier of a data set, trained once and kept in `cache_dir`; processes that ask at once train once.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], at least two classes.
        cache_dir: Of all caches.
        recipe: Which network, and how it is trained; None for the small one, which the next three arguments are for.
        seed: See `train_classifier`, as for `epochs` and `holdout`.
        epochs: Passes over the training part.
        holdout: Fraction kept for the accuracy.
        device: Where to train; the extractor comes back on the CPU.
    """
    if len(labels) < 2 or labels.min() == labels.max():
        raise ValueError(
            "a classifier needs labels of at least two classes; use evaluation=proxy (Inception), or "
            "callbacks.quality=null to train without scores"
        )
    small = {"seed": seed, "epochs": epochs, "holdout": holdout, "version": _CLASSIFIER}
    settings = {"content": digest_of(images, labels), **(recipe.settings() if recipe else small)}
    key = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(cache_dir) / "evaluation" / f"classifier-{key}.safetensors"
    shape = (images.shape[1], images.shape[2], int(labels.max()) + 1)
    with locked(path):
        build = recipe.build if recipe else SmallClassifier
        if (found := _cached_classifier(path, lambda: build(*shape))) is not None:
            return found
        model, accuracy = (
            recipe.train(images, labels, device)
            if recipe
            else train_classifier(images, labels, seed=seed, epochs=epochs, holdout=holdout, device=device)
        )
        extractor = ClassifierExtractor(model.cpu(), accuracy)
        meta = {**settings, "accuracy": accuracy, "digest": extractor.digest}
        write_tensors(path, model.state_dict(), meta)
        log.info("trained a classifier on %d images: %.1f %% of the others right", len(images), 100 * accuracy)
        return extractor


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """No autocast and no TF32, which is the default of convolutions on a GPU."""
    cudnn: Any = torch.backends.cudnn
    # PyTorch 2.9 renamed the switch, and refuses to read the old one after somebody has used the new one.
    switch, name, off = (
        (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    )
    matmul, convolutions = torch.get_float32_matmul_precision(), getattr(switch, name)
    torch.set_float32_matmul_precision("highest")
    setattr(switch, name, off)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        setattr(switch, name, convolutions)
        torch.set_float32_matmul_precision(matmul)


def _cached_classifier(
    path: Path, build: Callable[[], SmallClassifier | ResidualClassifier]
) -> ClassifierExtractor | None:
    """The classifier in a file, or None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        with torch.random.fork_rng(devices=[]):  # its constructor draws weights first
            model = build()
        model.load_state_dict(read_tensors(path))
        return ClassifierExtractor(model, read_meta(path)["accuracy"])
    except (ValueError, KeyError, RuntimeError) as error:
        log.warning("%s; the classifier is trained anew", str(error).splitlines()[0])
        return None


def _download(path: Path) -> None:
    """Fetch the published weights to torch's cache, whole and with the right hash or not at all."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA256, progress=os.isatty(2))
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"no Inception weights: {INCEPTION_URL} cannot be read ({error}); fetch it on another machine and put it "
            f"at {path}, or name it with evaluation.weights=FILE"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _read_inception(path: Path) -> nn.Module:
    """torch-fidelity's network with the weights in a file, of which nothing but tensors is read."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # The library unpickles what it is given, whatever it does: give it our own copy.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        with torch.random.fork_rng(devices=[]):  # its constructor draws weights first
            return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], buffer)
    except (OSError, EOFError, RuntimeError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        reason = "it is another kind of file" if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise ValueError(f"{path} does not hold torch-fidelity's Inception ({reason}); see {INCEPTION_URL}") from error
