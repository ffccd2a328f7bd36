"""A search over ranges on Optuna: resumed by its own command, and bad runs stop early."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from consistency.config import is_neutral
from consistency.io.run_dir import locked
from consistency.sweeps.slots import find_slots
from consistency.sweeps.space import as_override, check_same_settings, check_same_space, read_space, settings_of
from consistency.sweeps.study import check_folder, check_no_estimate, note_runs
from consistency.sweeps.trials import (
    JOURNAL,
    latest_attempts,
    log_summary,
    name_of,
    open_study,
    requeue_unfinished,
    run_dir_of,
    tell,
    write_summary,
)
from consistency.sweeps.variants import key

log = logging.getLogger(__name__)


class SearchSweeper(Sweeper):
    """Ask Optuna for trials, launch them as runs `trial000`, `trial001`, ..., and tell it what came out.

    Everything is in the study's folder. Started again, the same command takes up what it left: trials that were killed
    go on from their checkpoints, those that failed are tried again, and new ones are asked for until there are
    `n_trials`. A trial's parameters depend on the seed and its number alone where the sampler is independent of the
    results, so an interruption does not change them. The plugin hydra-optuna-sweeper 1.3 can do none of this; see
    docs/sweeps.md.

    Args:
        n_trials: Trials in all, those of earlier commands included.
        direction: `minimize` or `maximize`.
        batch: Trials asked for at a time; the next ones know the results of these. `auto`: all of a sampler that does
            not look at results, else one a slot.
        sampler: Configuration of an Optuna sampler.
        pruner: Configuration of an Optuna pruner, whose steps are images seen; None trains all to the end.
        params: Name -> range in Hydra's grammar; those of the command line win.
        variants: Of `hydra/sweeper=study`, which a search has no use for.
    """

    hydra_context: Any
    config: Any
    launcher: Any

    def __init__(
        self,
        n_trials: int,
        direction: str = "minimize",
        batch: int | str = "auto",
        sampler: DictConfig | None = None,
        pruner: DictConfig | None = None,
        params: Mapping[str, Any] | None = None,
        variants: Mapping[str, Any] | None = None,
    ) -> None:
        self.n_trials, self.direction, self.batch = n_trials, direction, batch
        self.sampler, self.pruner, self.params = sampler, pruner, params or {}
        self.variants = variants
        self._errors: dict[str, str] = {}
        self._launched = 0

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Keep what Hydra knows, and make the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> float | None:
        """Search; returns the best objective.

        Raises:
            SystemExit: with one line if the search cannot be started as asked, with code 1 if a trial failed.
        """
        try:
            self._check()
            check_no_estimate(arguments)
            folder = Path(str(self.config.hydra.sweep.dir))
            check_folder(self.config.study_name)
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / "search", patience=0):
                best = self._search(arguments, folder)
        except TimeoutError as error:
            sys.exit(f"consistency: {error}: this search is going on already")
        except ValueError as error:
            if os.environ.get("HYDRA_FULL_ERROR", "0") != "0":
                raise
            sys.exit(f"consistency: {error}")
        for name, line in self._errors.items():
            log.error("failed: %s: %s", name, line)
        if self._errors:
            log.error("the same command tries what failed again")
            sys.exit(1)
        return best

    def _check(self) -> None:
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise ValueError("hydra/sweeper=search needs Optuna: pip install 'consistency[sweep]'") from None
        for name, value in (("n_trials", self.n_trials), ("batch", self.batch)):
            if not (type(value) is int and value >= 1) and (name, value) != ("batch", "auto"):
                raise ValueError(f"hydra.sweeper.{name} must be a positive integer, got {value}")
        if self.direction not in ("minimize", "maximize"):
            raise ValueError(f"hydra.sweeper.direction must be minimize or maximize, got {self.direction}")
        if self.variants:
            raise ValueError("a search has no variants; leave ablation= out, or use hydra/sweeper=study")
        quality = OmegaConf.select(self.config, "callbacks.quality.every_n_images")
        if self.pruner is not None and not quality:
            raise ValueError(
                "hydra.sweeper.pruner needs scores while the runs train: callbacks=quality and "
                f"callbacks.quality.every_n_images=N, got {quality}; or hydra.sweeper.pruner=null"
            )

    def _search(self, arguments: Sequence[str], folder: Path) -> float | None:
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = [*(f"{name}={value}" for name, value in self.params.items()), *arguments]
        fixed, space = read_space(parser.parse_overrides(given))
        if own := {"variant", "run_name"}.intersection(map(key, [*fixed, *space])):
            raise ValueError(f"the trials of a search have names of their own; leave {' and '.join(own)} out")
        if not space:
            raise ValueError("there is nothing to search; give ranges: 'optimizer.lr=tag(log,interval(1e-4,1e-2))'")
        study = open_study(folder, str(self.config.study_name), self.direction, _built(self.pruner))
        self._check_same(study, space)
        OmegaConf.save(self.config, folder / "multirun.yaml")

        waiting, batch = requeue_unfinished(study), self._batch_size()
        if earlier := latest_attempts(study):
            log.info("%s: %d trials so far, %d of them are taken up again", folder, len(earlier), len(waiting))
        while True:
            missing = self.n_trials - len(latest_attempts(study))
            waiting += [self._ask(study, space, fixed) for _ in range(min(missing, batch - len(waiting)))]
            if not waiting:
                break
            self._run(study, waiting[:batch], fixed, folder)
            waiting = waiting[batch:]
        summary = write_summary(study, folder, self.config.get("objective"))
        log_summary(summary, folder)
        return summary["best"]["objective"] if summary["best"] else None

    def _check_same(self, study: Any, space: Mapping[str, Any]) -> None:
        """An earlier search of this folder must be one that this goes on with."""
        trials = study.get_trials(deepcopy=False)
        check_same_space(trials, space)
        new, old = settings_of(self.config, self.config.get("objective")), study.user_attrs.get("settings")
        if old is not None:
            check_same_settings(old, new, {*space, *(name for trial in trials for name in trial.params)})
        study.set_user_attr("settings", new)

    def _batch_size(self) -> int:
        if isinstance(self.batch, int):
            return self.batch
        from optuna.samplers import QMCSampler, RandomSampler

        if isinstance(self._sampler(0), QMCSampler | RandomSampler):
            return self.n_trials  # they learn nothing from trials, and may be asked for all at once
        if not hasattr(self.launcher, "slots"):
            raise ValueError("hydra.sweeper.batch=auto is for hydra/launcher=local; give a number with this launcher")
        gpus = 0 if OmegaConf.select(self.config, "trainer.accelerator") == "cpu" else self.launcher.gpus
        return len(find_slots(self.launcher.slots, gpus=gpus, threads=self.launcher.threads))

    def _ask(self, study: Any, space: Mapping[str, Any], fixed: Sequence[str]) -> Any:
        study.sampler = self._sampler(len(study.get_trials(deepcopy=False)))
        trial = study.ask(dict(space))
        params = [as_override(name, value) for name, value in trial.params.items()]
        trial.set_user_attr("overrides", [*fixed, *params])
        log.info("%s: %s", name_of(trial), " ".join(params))
        return trial

    def _sampler(self, number: int) -> Any:
        """Build a sampler for the trial of this number: one seed for all would repeat itself after a restart."""
        from optuna.samplers import QMCSampler

        settings: Any = OmegaConf.to_container(self.sampler) if self.sampler is not None else {}
        sampler = _built(settings or None)
        # The seed of a quasi-random sequence names the sequence, whose position is in the journal.
        if not isinstance(settings.get("seed"), int) or isinstance(sampler, QMCSampler):
            return sampler
        digest = hashlib.sha256(f"{settings['seed']} {number}".encode()).digest()
        return _built({**settings, "seed": int.from_bytes(digest[:4], "big")})

    def _run(self, study: Any, trials: Sequence[Any], fixed: Sequence[str], folder: Path) -> None:
        jobs = [self._overrides(study, trial, fixed, folder) for trial in trials]
        results = self.launcher.launch(jobs, initial_job_idx=self._launched)
        self._launched += len(jobs)
        # The launcher of this package has listed them already, others have not.
        listed = {run_dir_of(result).name: job for result, job in zip(results, jobs, strict=True)}
        note_runs(folder, str(self.config.study_name), listed)
        for trial, result in zip(trials, results, strict=True):
            if (error := tell(study, trial, result)) is not None:
                self._errors[name_of(trial)] = error

    def _overrides(self, study: Any, trial: Any, fixed: Sequence[str], folder: Path) -> list[str]:
        """Settings as when the trial was asked for, so that its run is found again; neutral ones as they are now."""
        asked = trial.user_attrs["overrides"]
        overrides = [f"variant={name_of(trial)}", *(entry for entry in asked if not is_neutral(key(entry)))]
        overrides += [entry for entry in fixed if is_neutral(key(entry))]
        if self.pruner is None:
            return overrides
        callback = {
            "_target_": "consistency.training.pruning.PruneTrial",
            "storage": str((folder / JOURNAL).absolute()),
            "study": study.study_name,
            "trial": trial.number,
            "pruner": OmegaConf.to_container(self.pruner),
            "objective": self.config.get("objective"),
        }
        return [*overrides, f"+callbacks.prune={_in_grammar(callback)}"]


def _built(settings: Any) -> Any:
    return None if settings is None else instantiate(settings, _convert_="object")


def _in_grammar(value: Any) -> str:
    """A value as Hydra's command line reads it back."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_in_grammar(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_in_grammar, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return json.dumps(value)
