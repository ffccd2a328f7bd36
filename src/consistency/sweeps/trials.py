"""Optuna's side of a search: ranges in Hydra's override grammar, trials in a journal, samplers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from consistency.io.safe_load import first_line

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

ANOTHER = "study_name=NAME for another search"


def read_space(overrides: Mapping[str, Override]) -> dict[str, BaseDistribution]:
    """The ranges among overrides; the others are left out.

    Raises:
        ValueError: if a range cannot be one.
    """
    space = {}
    for name, override in overrides.items():
        try:
            if override.is_sweep_override():
                space[name] = _distribution(override)
        except ValueError as error:
            raise ValueError(f"{override.input_line} is not a range to search: {error}") from None
    return space


def _distribution(override: Override) -> BaseDistribution:
    """`choice` and `a,b`: categories, as the text of an override; `range` (its end excluded, as in a grid); `interval`.

    Integers stay integers (`int(interval(1,9))`, both ends included), `tag(log, ...)` searches the logarithm.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    if isinstance(sweep, RangeSweep):
        points, step = sorted(sweep.range()), abs(sweep.step)
        if not points:
            raise ValueError("it has no values")
        low, high = points[0], points[-1]
    elif isinstance(sweep, IntervalSweep):
        low, high, step = sweep.start, sweep.end, None
    else:
        return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))
    is_log = "log" in sweep.tags
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int | None):
        return IntDistribution(low, high, log=is_log, step=step or 1)
    return FloatDistribution(float(low), float(high), log=is_log, step=None if step is None else float(step))


def as_override(name: str, value: object) -> str:
    """One parameter of a trial, exact to the last digit."""
    return f"{name}={value if isinstance(value, str) else repr(value)}"


def open_study(folder: Path, name: str, direction: str, pruner: DictConfig | None) -> Study:
    """Open the search of the folder, or begin it; a folder that was renamed keeps its search.

    Raises:
        ValueError: if its file is damaged.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection

    file = (folder / "search.journal").absolute()  # Optuna's lock is a link to it
    written = file.read_bytes() if file.exists() else b""
    if written and not written.endswith(b"\n"):  # with half a line, Optuna could read nothing that comes after it
        os.truncate(file, written.rfind(b"\n") + 1)
    goal, judge = StudyDirection[direction.upper()], built(pruner)
    try:
        storage = JournalStorage(JournalFileBackend(str(file)))
        name = next(iter(optuna.get_all_study_names(storage)), name)
        return optuna.create_study(study_name=name, storage=storage, direction=goal, pruner=judge, load_if_exists=True)
    except OSError:
        raise
    except Exception as error:  # Optuna replays the file, and stumbles over whatever is wrong in it
        what = f"{file} is damaged ({type(error).__name__}: {first_line(error)})"
        raise ValueError(f"{what}; move it away, or {ANOTHER}") from error


def name_of(trial: Trial | FrozenTrial) -> str:
    """`trial007`; in the journals of version 0.1, a later try may have the name of the first."""
    return trial.user_attrs.get("name", f"trial{trial.number:03d}")


def launched_trials(study: Study) -> list[FrozenTrial]:
    """Trials that have all their parameters; version 0.1 gave a failed one up for a later try."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if "overrides" in trial.user_attrs and trial.state.name != "FAIL"]


def sampler_for(number: int, config: DictConfig | None) -> BaseSampler:
    """Build a sampler for the trial of this number: one seed for all would repeat itself after a restart."""
    from optuna.samplers import QMCSampler, TPESampler

    if config is None:
        return TPESampler()  # Optuna's own choice
    settings: Any = OmegaConf.to_container(config)
    sampler = built(settings)
    # The seed of a quasi-random sequence names the sequence, whose position is in the journal.
    if not isinstance(settings.get("seed"), int) or isinstance(sampler, QMCSampler):
        return sampler
    digest = hashlib.sha256(f"{settings['seed']} {number}".encode()).digest()
    return built({**settings, "seed": int.from_bytes(digest[:4], "big")})


def built(settings: Any) -> Any:
    """A part of Optuna from its configuration."""
    return None if settings is None else instantiate(settings, _convert_="object")
