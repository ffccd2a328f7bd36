"""What generated samples are compared with: statistics of real images, computed once or read from published files."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency.evaluation.extractors import INCEPTION_SHA256, PREPROCESSING, Extractor, extract
from consistency.evaluation.statistics import FeatureStatistics, Moments
from consistency.io.run_dir import locked
from consistency.io.safe_load import read_npz
from consistency.io.tensors import digest_of, digest_of_file, read_meta, read_tensors, write_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Features of real images, as moments or one by one.

    Args:
        id: For people, e.g. "cifar10_32x32_train_50000".
        digest: First 16 hexadecimal digits of the sha256 of the images, or of the file read.
        count: Images; None where a file does not say.
        extractor: Name of what made the features.
        extractor_digest: Its weights; None where a file does not say.
        moments: Mean and covariance.
        features: float32 [count, dim], for KID, precision and recall; None if not kept.
    """

    id: str
    digest: str
    count: int | None
    extractor: str
    extractor_digest: str | None
    moments: Moments
    features: Tensor | None = None


def compute_reference(
    batches: Iterable[Tensor],
    *,
    id: str,
    count: int,
    extractor: Extractor,
    keep_features: bool,
    cache_dir: str | Path,
    content_digest: str,
) -> Reference:
    """The reference of a data set, from the cache; computed first if it is not there.

    Args:
        batches: uint8 [B, C, H, W] each; not touched when the cache has what is asked for.
        id: See `Reference`.
        count: Images in all batches together.
        extractor: What makes the features, on its device.
        keep_features: Also for KID, precision and recall; 4 count dim bytes on disk.
        cache_dir: Of all caches.
        content_digest: Of the pixels as they are measured (so of their size too) and their order.

    Raises:
        ValueError: if not exactly `count` images came.
    """
    settings = {
        "id": id,
        "content": content_digest,
        "count": count,
        "preprocessing": PREPROCESSING,
        "extractor": extractor.name,
        "extractor_digest": extractor.digest,
    }
    key = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(cache_dir) / "evaluation" / f"{re.sub(r'[^A-Za-z0-9_.]+', '_', id)}-{extractor.name}-{key}.safetensors"
    names = ["mean", "covariance", "features"][: 3 if keep_features else 2]
    with locked(path):
        tensors = _cached(path, settings, names)
        if tensors is None:
            tensors = _compute(batches, count, extractor, keep_features)
            write_tensors(path, tensors, settings)
    moments = Moments(tensors["mean"], tensors["covariance"])
    digest = content_digest[:16]
    return Reference(id, digest, count, extractor.name, extractor.digest, moments, tensors.get("features"))


def reference_of_images(images: Tensor, *, id: str, extractor: Extractor, keep_features: bool = False) -> Reference:
    """The reference of uint8 images [N, C, H, W] in memory; not cached."""
    tensors = _compute(images.split(256), len(images), extractor, keep_features)
    moments = Moments(tensors["mean"], tensors["covariance"])
    digest = digest_of(images)[:16]
    return Reference(id, digest, len(images), extractor.name, extractor.digest, moments, tensors.get("features"))


def read_reference(
    path: str | Path, extractor: Extractor, *, keep_features: bool = False, batch_size: int = 256
) -> Reference:
    """A reference from an `.npz` file: EDM's (`mu`, `sigma`), or ADM's and OpenAI's (`arr_0` images, `mu`, `sigma`).

    The moments in a file are Inception's and are taken for Inception only, as ADM's evaluator takes them. Features, and
    moments for another extractor, are computed from `arr_0`. Spatial moments (`mu_s`, `sigma_s`, of sFID) are not used.

    Args:
        path: The file.
        extractor: What makes the features of the samples.
        keep_features: Also for KID, precision and recall.
        batch_size: Images at a time.

    Raises:
        ValueError: if the file is no such file, or has nothing for this extractor.
    """
    path = Path(path)
    trusts_moments = extractor.name == "inception"
    arrays = _read_npz(path, moments_only=trusts_moments and not keep_features)
    if "mu_s" in arrays:
        log.info("%s: the spatial moments mu_s, sigma_s (of sFID) are not used", path)
    images = _images(arrays["arr_0"], path) if "arr_0" in arrays else None
    stated = _moments(arrays, extractor, path) if "mu" in arrays and trusts_moments else None
    if images is None and (stated is None or keep_features):
        wanted = "its features" if keep_features else f"the moments of the {extractor.name}"
        raise ValueError(
            f"reference={path} has no images (arr_0) to compute {wanted} from, it has {', '.join(sorted(arrays))}"
        )
    digest = digest_of_file(path)[:16]
    if images is None or (stated is not None and not keep_features):
        assert stated is not None
        return Reference(path.stem, digest, None, extractor.name, None, stated)
    tensors = _compute(images.split(batch_size), len(images), extractor, keep_features)
    moments = stated or Moments(tensors["mean"], tensors["covariance"])
    features = tensors.get("features")
    return Reference(path.stem, digest, len(images), extractor.name, extractor.digest, moments, features)


def _compute(batches: Iterable[Tensor], count: int, extractor: Extractor, keep_features: bool) -> dict[str, Tensor]:
    """Mean, covariance and perhaps features of exactly `count` images."""
    device = torch.device("cpu") if extractor.device.type == "mps" else extractor.device
    statistics = FeatureStatistics(extractor.dim, 0, total=count, keep_features=keep_features, device=device)
    start = 0
    for images in batches:
        features, logits = extract(extractor, images)
        statistics.add(features, logits, torch.arange(start, start + len(images)))
        start += len(images)
    if start != count:
        raise ValueError(f"a reference of {count} images was announced, {start} came")
    tensors = {"mean": statistics.moments.mean, "covariance": statistics.moments.covariance}
    return tensors if statistics.features is None else {**tensors, "features": statistics.features}


def _cached(path: Path, settings: dict[str, Any], names: list[str]) -> dict[str, Tensor] | None:
    """Tensors of a cached reference, or None with a line in the log that says why it has to be computed."""
    try:
        if path.exists() and read_meta(path) == settings:
            return read_tensors(path, names)
        reason = f"{path.name} holds something else" if path.exists() else _other_settings(path, settings)
        log.info("computing the reference %s: %s", settings["id"], reason)
    except ValueError as error:
        log.warning("computing the reference %s anew: %s", settings["id"], error)
    return None


def _other_settings(path: Path, settings: dict[str, Any]) -> str:
    """How the caches of the same set differ from what is asked for."""
    others = []
    for other in sorted(path.parent.glob(f"{path.name.rpartition('-')[0]}-*.safetensors")):
        try:
            found = read_meta(other)
        except ValueError:
            continue
        others.append(f"{other.name} has another " + ", ".join(k for k in settings if found.get(k) != settings[k]))
    return "; ".join(others) or "no cache"


def _read_npz(path: Path, moments_only: bool) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` that concern us, without images where its moments are enough; nothing is unpickled."""
    if not path.is_file():
        raise ValueError(f"reference={path} is no file")
    try:
        return read_npz(path, ("mu", "sigma", "mu_s", "arr_0"), unless=("arr_0", "mu") if moments_only else None)
    except ValueError as error:
        raise ValueError(f"reference={error}") from error


def _images(array: np.ndarray, path: Path) -> Tensor:
    """uint8 NHWC -> [N, C, H, W]."""
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        raise ValueError(f"reference={path}: arr_0 must be uint8 [N, H, W, 1 or 3], got {array.dtype} {array.shape}")
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def _moments(arrays: dict[str, np.ndarray], extractor: Extractor, path: Path) -> Moments:
    """`mu` and `sigma` of a file, float64, if they fit the extractor."""
    if "sigma" not in arrays:
        raise ValueError(f"reference={path} has mu but no sigma")
    mean, covariance = (torch.from_numpy(np.asarray(arrays[name], dtype=np.float64)) for name in ("mu", "sigma"))
    if mean.shape != (extractor.dim,) or covariance.shape != (extractor.dim, extractor.dim):
        raise ValueError(
            f"reference={path} has moments {list(mean.shape)} and {list(covariance.shape)}, the {extractor.name} has "
            f"{extractor.dim} features; take a reference of the same extractor"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"reference={path} has moments that are not finite; compute it anew")
    if not extractor.digest.startswith(INCEPTION_SHA256):
        log.warning("the moments of %s are of the published Inception, yours is %s", path, extractor.digest)
    return Moments(mean, covariance)
