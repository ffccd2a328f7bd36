"""The configuration of a command, as the command itself composes it; tests/test_cli.py runs the commands."""

import copy
from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from consistency import config

config.register()
ROOTS = (config.CONF_DIR, config.EXPERIMENTS_DIR)


def composed(name: str, *overrides: str, hydra: bool = False) -> DictConfig:
    """The configuration `name` under overrides, with `hydra` Hydra's own beside it.

    Composing takes half a second. Overrides that choose files are composed once and kept; those that only set values
    are set in a copy, as Hydra does it at the end of composing.
    """
    values = {override: parsed for override in overrides if (parsed := _value(override)) is not None}
    cfg = copy.deepcopy(_kept(name, tuple(override for override in overrides if override not in values), hydra))
    for key, value in values.values():
        OmegaConf.update(cfg, key, value, merge=True)
    return cfg


@cache
def _kept(name: str, overrides: tuple[str, ...], hydra: bool) -> DictConfig:
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        return compose(name, overrides=list(overrides), return_hydra_config=hydra)


@cache
def _value(text: str) -> tuple[str, object] | None:
    """(key, value) of an override that sets one value; None of any other."""
    override = OverridesParser.create().parse_override(text)
    key = override.key_or_group
    chooses = override.package is not None or "/" in key or any((root / key).is_dir() for root in ROOTS)
    plain = not (override.is_add() or override.is_delete() or override.is_sweep_override() or key.startswith("hydra"))
    return (key, override.value()) if plain and not chooses else None
