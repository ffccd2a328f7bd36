"""Which runs a study has: a grid over overrides, times named variants."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from consistency.sweeps.launcher import LocalLauncher
from consistency.sweeps.study import check_folder, check_no_estimate, in_one_line, note_runs, shown

log = logging.getLogger(__name__)


class StudySweeper(Sweeper):
    """Hydra's grid, with variants of several settings each, and a failed run that does not end the study.

    Args:
        variants: Name -> overrides (`["metric=l2", "curriculum=ct"]`); one of the axes of the grid. On the command line
            `variant=NAME,NAME` picks some of them.
        params: Axes of the grid beside those of the command line, which wins.
    """

    hydra_context: Any
    config: Any
    launcher: Any

    def __init__(
        self,
        variants: Mapping[str, Sequence[str]] | None = None,
        params: dict[str, str] | None = None,
    ) -> None:
        self.params = params or {}
        self.variants = dict(variants or {})

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Keep what Hydra knows, and make the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Launch all runs at once; afterwards name those that failed.

        Raises:
            SystemExit: with one line if the study cannot be started as asked, with code 1 if a run failed.
        """
        with in_one_line():
            check_no_estimate(arguments)
            results = self._launch(arguments)
        folder = Path(str(self.config.hydra.sweep.dir))
        failed = [result for result in results if result.status != JobStatus.COMPLETED]
        log.info("%s: %d runs finished, %d failed", folder, len(results) - len(failed), len(failed))
        everything = [result.overrides or [] for result in results]
        for result in failed:
            why = next(iter(str(result._return_value).splitlines()), "")
            log.error("failed: %s: %s", shown(result.overrides or [], everything), why)
        log.info("compare them: consistency-report %s", folder)
        if failed:
            sys.exit(1)
        return results

    def _launch(self, arguments: list[str]) -> Sequence[JobReturn]:
        # Hydra executes the module anew when it looks for plugins: a class of an earlier import would be another one.
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = parser.parse_overrides([*(f"{name}={values}" for name, values in self.params.items()), *arguments])
        chosen, given = choose(self.variants, given)
        grid = BasicSweeper.split_arguments(given, None)[0]
        jobs = [[*point, *own] for point in grid for own in in_turn(self.variants, chosen, point)]
        folder = Path(str(self.config.hydra.sweep.dir))
        check_folder(self.config.study_name)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        if not isinstance(self.launcher, LocalLauncher):  # ours lists its runs, and survives one that does not compose
            self.validate_batch_is_legal(jobs)
            load = self.hydra_context.config_loader.load_sweep_config
            numbered = [[*job, f"hydra.job.num={number}"] for number, job in enumerate(jobs)]
            names = [str(load(self.config, job).hydra.sweep.subdir) for job in numbered]
            note_runs(folder, str(self.config.study_name), dict(zip(names, jobs, strict=True)))
        return self.launcher.launch(jobs, initial_job_idx=0)


def choose(variants: Mapping[str, Any], given: list[Override]) -> tuple[list[str], list[Override]]:
    """Take `variant=A,B` out of the overrides; without it, all variants.

    Raises:
        ValueError: if there is no variant of that name.
    """
    asked = [override for override in given if override.key_or_group == "variant"]
    rest = [override for override in given if override.key_or_group != "variant"]
    if not asked or not variants:
        return list(variants), given
    last = asked[-1]
    if last.is_sweep_override():
        names = [str(value) for value in last.sweep_string_iterator()]
    else:
        names = [last.get_value_element_as_str()]
    if unknown := [name for name in names if name not in variants]:
        raise ValueError(f"variant must be of {', '.join(variants)}, got {', '.join(unknown)}")
    return names, rest


def in_turn(variants: Mapping[str, Sequence[str]], chosen: Sequence[str], point: Sequence[str]) -> list[list[str]]:
    """Overrides of each chosen variant, its name first.

    Raises:
        ValueError: if a variant changes what the command line sets, or has a name that cannot be a folder's.
    """
    if not variants:
        return [[]]
    fixed = {key(override) for override in point}
    for name in chosen:
        if isinstance(variants[name], str) or not all(isinstance(override, str) for override in variants[name]):
            raise ValueError(f"hydra.sweeper.variants.{name} must be a list of overrides, as [metric=l2]")
        if re.fullmatch(r"[\w.+-]+", name) is None:
            raise ValueError(f"hydra.sweeper.variants has {name!r}; a name has letters, digits and . + - _ only")
        if twice := sorted(fixed & {key(override) for override in variants[name]}):
            raise ValueError(f"variant {name} sets {', '.join(twice)} itself; leave it out of the command")
    return [[f"variant={name}", *variants[name]] for name in chosen]


def key(override: str) -> str:
    """`+optimizer.lr=1e-3` -> `optimizer.lr`."""
    return override.lstrip("+~").split("=")[0]
