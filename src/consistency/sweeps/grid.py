"""Which runs a study has: a grid over overrides, times named variants."""

from __future__ import annotations

import itertools
import logging
import os
import re
import sys
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from consistency.io.run_dir import is_name
from consistency.io.safe_load import first_line
from consistency.sweeps.launcher import LocalLauncher
from consistency.sweeps.study import Run, labels, plan_runs

log = logging.getLogger(__name__)


class Multirun(Sweeper):
    """What sweepers share: checks before anything is written, the launch, and an exit code that says how it ended."""

    hydra_context: Any
    config: Any
    launcher: Any

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives, and make the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Carry the multirun out.

        Raises:
            SystemExit: with one line if it cannot be started as asked, with code 1 if a run failed.
        """
        try:
            if any(argument.lstrip("+").startswith("estimate=") for argument in arguments):
                # Side by side, runs that are measured would slow each other down.
                raise ValueError("estimate=true is for one run; leave out -m, ablation= and sweep=")
            if not is_name(name := self.config.study_name):
                raise ValueError(
                    f"study_name must be of letters, digits and . , = + - _ (a folder in outputs/), got {name!r}"
                )
            failed = self.carry_out(arguments)
        except ValueError as error:
            if os.environ.get("HYDRA_FULL_ERROR", "0") != "0":
                raise
            sys.exit(f"consistency: {error}".splitlines()[0])
        for name, line in failed.items():
            log.error("failed: %s: %s", name, line)
        if failed:
            log.error("the same command tries what failed again")
            sys.exit(1)

    @abstractmethod
    def carry_out(self, arguments: Sequence[str]) -> dict[str, str]:
        """Launch the runs, and report how they ended; returns which failed, and why on one line.

        Raises:
            ValueError: if the multirun cannot be started as asked.
        """

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(str(self.config.hydra.sweep.dir))

    def parse(self, params: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Override]:
        """Name -> override, of a file and of the command line; of one name the last wins."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*(f"{name}={values}" for name, values in params.items()), *arguments])
        named: dict[str, Override] = {}
        for override in overrides:
            named.pop(override.get_key_element(), None)  # the order is that of the last ones: samplers draw in it
            named[override.get_key_element()] = override
        return named

    def launch(self, jobs: Sequence[Sequence[str]]) -> list[Run]:
        """Carry out runs, by their overrides; those that do not compose do not keep the others from it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.folder / "multirun.yaml")
        runs = plan_runs(self.hydra_context, self.config, jobs)
        if isinstance(self.launcher, LocalLauncher):
            return list(self.launcher.run(runs))
        composed = [run for run in runs if run.config is not None]
        results = self.launcher.launch([run.overrides for run in composed], 0)
        for run, result in zip(composed, results, strict=True):
            try:
                _ = result.return_value
            except Exception as error:  # whatever the run raised
                run.error = first_line(error)
        return runs


@dataclass
class StudySweeper(Multirun):
    """Hydra's grid, with variants of several settings each, and a failed run that does not end the study.

    Args:
        variants: Name -> overrides (`["metric=l2", "curriculum=ct"]`); one of the axes of the grid. On the command line
            `variant=NAME,NAME` picks some of them.
        params: Axes of the grid beside those of the command line, which wins.
    """

    variants: Mapping[str, Sequence[str]] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)

    def carry_out(self, arguments: Sequence[str]) -> dict[str, str]:
        """Launch all runs at once."""
        jobs = grid(self.parse(self.params, arguments), self.variants)
        runs = self.launch(jobs)
        named = zip(runs, labels(jobs), strict=True)
        failed = {label: run.error for run, label in named if run.error is not None}
        log.info("%s: %d runs finished, %d failed", self.folder, len(runs) - len(failed), len(failed))
        log.info("compare them: consistency-report %s", self.folder)
        return failed


def grid(overrides: Mapping[str, Override], variants: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Every combination of the values that are listed, for every variant that is asked for.

    Raises:
        ValueError: if a range has no list of values; if there is no variant of that name, its name cannot be that of a
            folder, or it changes what the command line sets.
    """
    axes: dict[str, list[str]] = {}
    for name, override in overrides.items():
        if override.is_interval_sweep():
            raise ValueError(
                f"{override.input_line} is a range to search, and a grid needs values, as {name}=1,2; add "
                "hydra/sweeper=search to search it"
            )
        is_axis = override.is_sweep_override()
        axes[name] = list(override.sweep_string_iterator()) if is_axis else [override.get_value_element_as_str()]
    if not variants:
        return [_joined(axes, point) for point in itertools.product(*axes.values())]
    chosen = axes.pop("variant", list(variants))  # the last axis: all variants of the first seed come first
    if unknown := [name for name in chosen if name not in variants]:
        raise ValueError(f"variant must be of {', '.join(variants)}, got {', '.join(unknown)}")
    for name in chosen:
        own = variants[name]
        if isinstance(own, str) or not all(isinstance(override, str) for override in own):
            raise ValueError(f"hydra.sweeper.variants.{name} must be a list of overrides, as [metric=l2]")
        if re.fullmatch(r"[\w.+-]+", name) is None:
            raise ValueError(f"hydra.sweeper.variants has {name!r}; a name has letters, digits and . + - _ only")
        if twice := sorted(set(map(key, axes)) & set(map(key, own))):
            raise ValueError(f"variant {name} sets {', '.join(twice)} itself; leave it out of the command")
    points = [_joined(axes, point) for point in itertools.product(*axes.values())]
    return [[*point, f"variant={name}", *variants[name]] for point in points for name in chosen]


def _joined(names: Iterable[str], values: Iterable[str]) -> list[str]:
    return [f"{name}={value}" for name, value in zip(names, values, strict=True)]


def key(override: str) -> str:
    """`+optimizer.lr=1e-3` -> `optimizer.lr`."""
    return override.lstrip("+~").split("=")[0]
