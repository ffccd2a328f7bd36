"""The data set of a command: the one that is named, or that of the run, which may be somebody else's."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from consistency.io.safe_load import read_yaml

if TYPE_CHECKING:  # Lightning costs seconds, and images of one's own need no data set
    from consistency.data.module import ImageDataModule


def data_of(cfg: DictConfig) -> ImageDataModule | None:
    """The data module that is named, or that of the run; None if there is neither."""
    node = cfg.get("data")
    if node is None and cfg.ckpt is not None and (file := Path(cfg.ckpt) / "config.yaml").exists():
        node = OmegaConf.create(_own_parts(read_yaml(file).get("data"), file, tuple(cfg.get("imports") or ())))
        use_local_paths(cfg.paths, node)
    if node is None:
        return None
    data: ImageDataModule = instantiate(node, _convert_="object")
    data.setup("fit")
    return data


def use_local_paths(paths: DictConfig, node: Any) -> None:
    """Caches and downloads go where this command's user keeps them, not where the run's configuration says."""
    dataset = node.get("dataset") if isinstance(node, DictConfig) else None
    if not isinstance(dataset, DictConfig):
        return
    if "cache_dir" in dataset and dataset.cache_dir is not None:
        dataset.cache_dir = paths.cache_dir
    if "root" in dataset and not Path(str(dataset.root)).is_dir():
        dataset.root = paths.data_dir


def _own_parts(node: Any, file: Path, imports: tuple[str, ...] = ()) -> Any:
    """The data of a run, which may be somebody else's: only parts of this package and of `imports` are made.

    Raises:
        ValueError: if it names anything else.
    """
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        own = key != "_target_" or (isinstance(value, str) and _is_own(value, imports))
        if not own or (isinstance(value, str) and "${" in value):
            raise ValueError(
                f"{file} asks for {str(value)[:80]!r}, which may run anything; name the data with data=, or "
                "bring its module with imports=[MODULE]"
            )
        _own_parts(value, file, imports)
    return node


def _is_own(target: str, imports: tuple[str, ...]) -> bool:
    """Whether a dotted name is of a public class or function of ours, not of one that such a module has imported."""
    module, _, name = target.rpartition(".")
    own = (
        module in imports or re.fullmatch(r"consistency\.data\.(module|datasets|cropping|augment)", module) is not None
    )
    return own and name[:1] != "_" and getattr(getattr(import_module(module), name, None), "__module__", "") == module
