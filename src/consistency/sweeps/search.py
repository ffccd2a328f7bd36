"""A search over ranges on Optuna: resumed by its own command, and bad runs stop early."""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from consistency.commands.folder import status_of
from consistency.config import is_neutral
from consistency.io.atomic import write_text
from consistency.io.nested import flatten
from consistency.io.run_dir import locked
from consistency.io.safe_load import first_line
from consistency.sweeps.grid import Multirun, key
from consistency.sweeps.study import Run, listed_runs
from consistency.sweeps.trials import (
    ANOTHER,
    as_override,
    launched_trials,
    name_of,
    open_study,
    read_space,
    sampler_for,
)
from consistency.training.scores_file import read_scores

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)


@dataclass
class SearchSweeper(Multirun):
    """Ask Optuna for trials, launch them as runs `trial000`, `trial001`, ..., and tell it what came out.

    Everything is in the study's folder: what was asked for in `search.journal`, how the runs ended in their
    `status.json`. Started again, the same command takes up what it left: trials that were killed go on from their
    checkpoints, those that failed are tried again, and new ones are asked for until there are `n_trials`. A trial's
    parameters depend on the seed and its number alone where the sampler is independent of the results, so an
    interruption does not change them. The plugin hydra-optuna-sweeper 1.3 can do none of this; see docs/sweeps.md.

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

    n_trials: int
    direction: str = "minimize"
    batch: int | str = "auto"
    sampler: DictConfig | None = None
    pruner: DictConfig | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, Sequence[str]] | None = None

    def carry_out(self, arguments: Sequence[str]) -> dict[str, str]:
        """Search; at the end name the best trials."""
        self._check()
        overrides = self.parse(self.params, arguments)
        space = read_space(overrides)
        fixed = [str(override.input_line) for name, override in overrides.items() if name not in space]
        if own := {"variant", "run_name"}.intersection(map(key, overrides)):
            raise ValueError(f"the trials of a search have names of their own; leave {' and '.join(own)} out")
        if not space:
            raise ValueError("there is nothing to search; give ranges: 'optimizer.lr=tag(log,interval(1e-4,1e-2))'")
        try:
            with locked(self.folder / "search", patience=0):
                study = open_study(self.folder, str(self.config.study_name), self.direction, self.pruner)
                self._check_settings(study, space)
                failed = self._search(study, fixed, space)
                self._summarize(study, failed)
        except TimeoutError as error:
            raise ValueError(f"{error}: this search is going on already") from None
        return failed

    def _check(self) -> None:
        try:
            import optuna
        except ImportError:
            raise ValueError("hydra/sweeper=search needs Optuna: pip install 'consistency[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        for name, value in (("n_trials", self.n_trials), ("batch", self.batch)):
            if not (type(value) is int and value >= 1) and (name, value) != ("batch", "auto"):
                raise ValueError(f"hydra.sweeper.{name} must be a positive integer, got {value}")
        if self.direction not in ("minimize", "maximize"):
            raise ValueError(f"hydra.sweeper.direction must be minimize or maximize, got {self.direction}")
        if self.variants:
            raise ValueError("a search has no variants; leave ablation= out, or use hydra/sweeper=study")
        if self.pruner is not None and not self._every_n_images:
            raise ValueError(
                "hydra.sweeper.pruner needs scores while the runs train: callbacks=quality and "
                f"callbacks.quality.every_n_images=N, got {self._every_n_images}; or hydra.sweeper.pruner=null"
            )

    @property
    def _every_n_images(self) -> int | None:
        return OmegaConf.select(self.config, "callbacks.quality.every_n_images")

    def _search(self, study: Study, fixed: Sequence[str], space: Mapping[str, BaseDistribution]) -> dict[str, str]:
        """Launch trials until there are enough; returns name -> error of those that failed."""
        trials, batch = launched_trials(study), self._batch_size()
        waiting: list[Trial | FrozenTrial] = [trial for trial in trials if not trial.state.is_finished()]
        if trials:
            log.info("%s: %d trials so far, %d of them are taken up again", self.folder, len(trials), len(waiting))
        missing, failed = self.n_trials - len(trials), dict[str, str]()
        while waiting or missing > 0:
            while len(waiting) < batch and missing > 0:
                waiting.append(self._ask(study, space, fixed))
                missing -= 1
            now, waiting = waiting[:batch], waiting[batch:]
            runs = self.launch([self._overrides(study, trial, fixed) for trial in now])
            for trial, run in zip(now, runs, strict=True):
                if error := self._tell(study, trial, run):
                    failed[name_of(trial)] = error
        return failed

    def _check_settings(self, study: Study, space: Mapping[str, BaseDistribution]) -> None:
        """Refuse to go on with other settings than those of earlier trials, which could not be compared.

        Raises:
            ValueError: with the settings that differ; what is or was searched may.
        """
        direction = "hydra.sweeper.direction"
        settings = flatten(OmegaConf.to_container(self.config)).items()
        new = {name: value for name, value in settings if not is_neutral(name)}
        new |= {"objective": self.config.get("objective"), direction: self.direction}
        old = {**study.user_attrs.get("settings", new), direction: study.direction.name.lower()}
        searched = {*space, *(name for trial in study.get_trials(deepcopy=False) for name in trial.params)}
        may_change = tuple(f"{name}." for name in [*searched, "data.dataset.path"])  # data may move
        differ = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if changed := [name for name in differ if not f"{name}.".startswith(may_change)]:
            listed = ", ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in changed[:5])
            raise ValueError(f"this search was started with other settings ({listed}); use them, or {ANOTHER}")
        study.set_user_attr("settings", new)

    def _batch_size(self) -> int:
        if isinstance(self.batch, int):
            return self.batch
        from optuna.samplers import QMCSampler, RandomSampler

        if isinstance(sampler_for(0, self.sampler), QMCSampler | RandomSampler):
            return self.n_trials  # they learn nothing from trials, and may be asked for all at once
        if not hasattr(self.launcher, "slots_for"):
            raise ValueError("hydra.sweeper.batch=auto is for hydra/launcher=local; give a number with this launcher")
        return len(self.launcher.slots_for(cpu_only=OmegaConf.select(self.config, "trainer.accelerator") == "cpu"))

    def _ask(self, study: Study, space: Mapping[str, BaseDistribution], fixed: Sequence[str]) -> Trial:
        number = len(study.get_trials(deepcopy=False))
        study.sampler = sampler_for(number, self.sampler)
        try:
            trial = study.ask(dict(space))
        except ValueError as error:
            name = next(name for name in space if name not in study.get_trials(deepcopy=False)[number].params)
            raise ValueError(
                f"{name} is now searched in {space[name]}, which does not go with earlier trials; only the ends of a "
                f"range may change ({first_line(error)}): take the earlier range, or {ANOTHER}"
            ) from None
        params = [as_override(name, value) for name, value in trial.params.items()]
        trial.set_user_attr("overrides", [*fixed, *params])  # a trial without them was given up half-way
        log.info("%s: %s", name_of(trial), " ".join(params))
        return trial

    def _overrides(self, study: Study, trial: Trial | FrozenTrial, fixed: Sequence[str]) -> list[str]:
        """Settings as when the trial was asked for, so that its run is found again; neutral ones as they are now."""
        asked = trial.user_attrs["overrides"]
        overrides = [f"variant={name_of(trial)}", *(entry for entry in asked if not is_neutral(key(entry)))]
        overrides += [entry for entry in fixed if is_neutral(key(entry))]
        if self.pruner is None:
            return overrides
        callback = {
            "_target_": "consistency.training.pruning.PruneTrial",
            "study": study.study_name,
            "pruner": OmegaConf.to_container(self.pruner),
            "direction": self.direction,
            "objective": self.config.get("objective"),
        }
        pruning = flatten(callback).items()
        return [*overrides, *(f"+callbacks.prune.{name}={json.dumps(value)}" for name, value in pruning)]

    def _tell(self, study: Study, trial: Trial | FrozenTrial, run: Run) -> str | None:
        """Tell the study how a run ended; returns the error of one that failed, which the next command tries again.

        A run that diverged is worse than any other: its objective is infinite (Optuna takes no NaN).
        """
        from optuna import Trial
        from optuna.trial import TrialState

        run_dir = run.run_dir or self.folder  # one that does not compose has none, and says so
        status = status_of(run_dir)
        value, state = status.get("objective"), TrialState.COMPLETE
        if run.error is not None and not status.get("diverged"):
            return run.error
        if status.get("state") == "pruned":
            value, state = None, TrialState.PRUNED
        elif status.get("diverged") or (value is not None and math.isnan(value)):
            value = math.inf if self.direction == "minimize" else -math.inf
        elif value is None:
            return "it returned no objective; give it callbacks=quality or callbacks.log"
        if isinstance(trial, Trial):  # of a trial that an earlier command asked for, Optuna takes no scores
            for images, score in self._scores(run_dir, status).items():
                trial.report(score, images)
        study.tell(trial.number, value, state)
        return None

    def _scores(self, run_dir: Path, status: Mapping[str, Any]) -> dict[int, float]:
        """What a run has measured: images -> score."""
        name, every = self.config.get("objective") or status.get("objective_name"), self._every_n_images
        return read_scores(run_dir, name, every) if name and every else {}

    def _summarize(self, study: Study, failed: Mapping[str, str]) -> None:
        """Write `search.json`, all trials, the best first; and log the best."""
        runs = {entry: run for run, about in listed_runs(self.folder).items() for entry in about["overrides"]}
        rows, names = [], [self.config.get("objective")]
        for trial in launched_trials(study):
            run = runs.get(f"variant={name_of(trial)}", "")
            status = status_of(self.folder / run)
            names.append(status.get("objective_name"))
            rows.append(self._row(trial, run, status, failed.get(name_of(trial))))
        sign = 1 if self.direction == "minimize" else -1
        rows.sort(key=lambda row: (row["state"] != "finished", sign * (row["objective"] or 0)))
        best = [row for row in rows if row["state"] == "finished"][:5]
        about = {"study": study.study_name, "direction": self.direction, "objective": next(filter(None, names), None)}
        content = {**about, "best": best[0] if best else None, "trials": rows}
        write_text(self.folder / "search.json", json.dumps(content, indent=1) + "\n")

        counts = Counter(row["state"] for row in rows)
        ends = ", ".join(f"{count} {state}" for state, count in counts.items())
        log.info("%s: %d trials (%s), %s", self.folder, len(rows), ends, "the best:" if best else "none to compare")
        for row in best:
            overrides = shlex.join(row["overrides"])
            log.info("%s, %s %.5g: %s", row["trial"], about["objective"], row["objective"], overrides)
        log.info("all of them: %s; compare them: consistency-report %s", self.folder / "search.json", self.folder)

    def _row(self, trial: FrozenTrial, run: str, status: Mapping[str, Any], error: str | None) -> dict[str, Any]:
        state = {"COMPLETE": "finished", "PRUNED": "pruned"}.get(trial.state.name, "failed")
        if trial.values is not None and math.isinf(trial.values[0]):
            state = "diverged"
        return {
            "trial": name_of(trial),
            "state": state,
            "objective": status.get("objective") if state in ("finished", "pruned") else None,
            "overrides": [as_override(name, value) for name, value in trial.params.items()],
            "scores": self._scores(self.folder / run, status),
            "run": run or None,
            "error": error or status.get("error") if state in ("failed", "diverged") else None,
        }
