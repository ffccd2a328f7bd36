"""A search over ranges on Optuna: resumed by its own command, and bad runs stop early."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from consistency.commands.folder import status_of
from consistency.config import is_neutral
from consistency.io.atomic import write_text
from consistency.io.run_dir import locked
from consistency.io.safe_load import first_line
from consistency.sweeps.grid import Multirun, key
from consistency.sweeps.space import as_override, read_space
from consistency.sweeps.study import Run, listed_runs
from consistency.training.scores_file import read_scores

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

_MAY_MOVE = ("data.dataset.path",)  # as when a run goes on
_STATES = {"COMPLETE": "finished", "PRUNED": "pruned"}
_ANOTHER = "study_name=NAME for another search"


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

    def __init__(
        self,
        n_trials: int,
        direction: str = "minimize",
        batch: int | str = "auto",
        sampler: DictConfig | None = None,
        pruner: DictConfig | None = None,
        params: Mapping[str, str] | None = None,
        variants: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.n_trials, self.direction, self.batch = n_trials, direction, batch
        self.sampler, self.pruner, self.params, self.variants = sampler, pruner, params or {}, variants

    def carry_out(self, arguments: Sequence[str]) -> dict[str, str]:
        """Search; at the end name the best trials."""
        self._check()
        fixed, space = read_space(self.parse(self.params, arguments))
        if own := {"variant", "run_name"}.intersection(map(key, [*fixed, *space])):
            raise ValueError(f"the trials of a search have names of their own; leave {' and '.join(own)} out")
        if not space:
            raise ValueError("there is nothing to search; give ranges: 'optimizer.lr=tag(log,interval(1e-4,1e-2))'")
        try:
            with locked(self.folder / "search", patience=0):
                return self._search(fixed, space)
        except TimeoutError as error:
            raise ValueError(f"{error}: this search is going on already") from None

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

    def _search(self, fixed: Sequence[str], space: Mapping[str, BaseDistribution]) -> dict[str, str]:
        """Launch trials until there are enough; returns name -> error of those that failed."""
        study, batch = self._open(space), self._batch_size()
        trials = _launched(study)
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
                    failed[_name_of(trial)] = error
        self._summarize(study, failed)
        return failed

    def _open(self, space: Mapping[str, BaseDistribution]) -> Study:
        """Open the search of the folder, or begin it; a folder that was renamed keeps its search.

        Raises:
            ValueError: if its file is damaged, or it was begun with other settings, which could not be compared.
        """
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        file = (self.folder / "search.journal").absolute()  # Optuna's lock is a link to it
        written = file.read_bytes() if file.exists() else b""
        if not written.endswith(b"\n"):  # not written to its end; with it, Optuna could read nothing that comes after
            file.write_bytes(written[: written.rfind(b"\n") + 1])
        direction = optuna.study.StudyDirection[self.direction.upper()]
        try:
            storage = JournalStorage(JournalFileBackend(str(file)))
            name = next(iter(optuna.get_all_study_names(storage)), str(self.config.study_name))
            study = optuna.create_study(
                study_name=name, storage=storage, direction=direction, pruner=_built(self.pruner), load_if_exists=True
            )
        except OSError:
            raise
        except Exception as error:  # Optuna replays the file, and stumbles over whatever is wrong in it
            what = f"{file} is damaged ({type(error).__name__}: {first_line(error)})"
            raise ValueError(f"{what}; move it away, or {_ANOTHER}") from error

        settings = {k: v for k, v in _flat(OmegaConf.to_container(self.config)).items() if not is_neutral(k)}
        settings = {k: v for k, v in settings.items() if k not in _MAY_MOVE}
        settings |= {"objective": self.config.get("objective"), "hydra.sweeper.direction": self.direction}
        old = {"hydra.sweeper.direction": study.direction.name.lower(), **study.user_attrs.get("settings", settings)}
        searched = tuple(f"{name}." for trial in study.get_trials(deepcopy=False) for name in [*trial.params, *space])
        changed = [
            f"{name}: {old.get(name)} -> {settings.get(name)}"
            for name in sorted(old.keys() | settings.keys())
            if old.get(name) != settings.get(name) and not f"{name}.".startswith(searched)
        ]
        if changed:
            listed = ", ".join(changed[:5])
            raise ValueError(f"this search was started with other settings ({listed}); use them, or {_ANOTHER}")
        study.set_user_attr("settings", settings)
        return study

    def _batch_size(self) -> int:
        if isinstance(self.batch, int):
            return self.batch
        from optuna.samplers import QMCSampler, RandomSampler

        if isinstance(self._sampler(0), QMCSampler | RandomSampler):
            return self.n_trials  # they learn nothing from trials, and may be asked for all at once
        if not hasattr(self.launcher, "slots_for"):
            raise ValueError("hydra.sweeper.batch=auto is for hydra/launcher=local; give a number with this launcher")
        return len(self.launcher.slots_for(cpu_only=OmegaConf.select(self.config, "trainer.accelerator") == "cpu"))

    def _ask(self, study: Study, space: Mapping[str, BaseDistribution], fixed: Sequence[str]) -> Trial:
        number = len(study.get_trials(deepcopy=False))
        study.sampler = self._sampler(number)
        try:
            trial = study.ask(dict(space))
        except ValueError as error:
            name = next(name for name in space if name not in study.get_trials(deepcopy=False)[number].params)
            raise ValueError(
                f"{name} is now searched in {space[name]}, which does not go with earlier trials; only the ends of a "
                f"range may change ({first_line(error)}): take the earlier range, or {_ANOTHER}"
            ) from None
        params = [as_override(name, value) for name, value in trial.params.items()]
        trial.set_user_attr("overrides", [*fixed, *params])  # a trial without them was given up half-way
        log.info("%s: %s", _name_of(trial), " ".join(params))
        return trial

    def _sampler(self, number: int) -> BaseSampler:
        """Build a sampler for the trial of this number: one seed for all would repeat itself after a restart."""
        from optuna.samplers import QMCSampler, TPESampler

        if self.sampler is None:
            return TPESampler()  # Optuna's own choice
        settings: Any = OmegaConf.to_container(self.sampler)
        sampler = _built(settings)
        # The seed of a quasi-random sequence names the sequence, whose position is in the journal.
        if not isinstance(settings.get("seed"), int) or isinstance(sampler, QMCSampler):
            return sampler
        digest = hashlib.sha256(f"{settings['seed']} {number}".encode()).digest()
        return _built({**settings, "seed": int.from_bytes(digest[:4], "big")})

    def _overrides(self, study: Study, trial: Trial | FrozenTrial, fixed: Sequence[str]) -> list[str]:
        """Settings as when the trial was asked for, so that its run is found again; neutral ones as they are now."""
        asked = trial.user_attrs["overrides"]
        overrides = [f"variant={_name_of(trial)}", *(entry for entry in asked if not is_neutral(key(entry)))]
        overrides += [entry for entry in fixed if is_neutral(key(entry))]
        callback = {
            "_target_": "consistency.training.pruning.PruneTrial",
            "study": study.study_name,
            "pruner": OmegaConf.to_container(self.pruner) if self.pruner is not None else None,
            "direction": self.direction,
            "objective": self.config.get("objective"),
        }
        pruning = [f"+callbacks.prune.{name}={json.dumps(value)}" for name, value in _flat(callback).items()]
        return overrides if self.pruner is None else [*overrides, *pruning]

    def _tell(self, study: Study, trial: Trial | FrozenTrial, run: Run) -> str | None:
        """Tell the study how a run ended; returns the error of one that failed, which the next command tries again.

        A run that diverged is worse than any other: its objective is infinite (Optuna takes no NaN).
        """
        from optuna import Trial
        from optuna.trial import TrialState

        status = status_of(run.run_dir) if run.run_dir is not None else {}
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
            for images, score in self._scores(run.run_dir, status).items():
                trial.report(score, images)
        study.tell(trial.number, value, state)
        return None

    def _scores(self, run_dir: Any, status: Mapping[str, Any]) -> dict[int, float]:
        """What a run has measured: images -> score."""
        name, every = self.config.get("objective") or status.get("objective_name"), self._every_n_images
        return read_scores(run_dir, name, every) if name and every else {}

    def _summarize(self, study: Study, failed: Mapping[str, str]) -> None:
        """Write `search.json`, all trials, the best first; and log the best."""
        listed = listed_runs(self.folder).items()
        rows, names = [], [self.config.get("objective")]
        for trial in _launched(study):
            name = _name_of(trial)
            run = next((run for run, about in listed if f"variant={name}" in about["overrides"]), None)
            status = status_of(self.folder / run) if run is not None else {}
            names.append(status.get("objective_name"))
            has_diverged = trial.state.name == "COMPLETE" and math.isinf(trial.value or 0)
            state = "diverged" if has_diverged else _STATES.get(trial.state.name, "failed")
            row: dict[str, Any] = {
                "trial": name,
                "state": state,
                "objective": status.get("objective") if state in ("finished", "pruned") else None,
                "overrides": [as_override(name, value) for name, value in trial.params.items()],
                "scores": self._scores(self.folder / run, status) if run is not None else {},
                "run": run,
                "error": failed.get(name) or status.get("error") if state in ("failed", "diverged") else None,
            }
            rows.append(row)
        sign = 1 if self.direction == "minimize" else -1
        rows.sort(key=lambda row: (row["state"] != "finished", sign * (row["objective"] or 0)))
        best = [row for row in rows if row["state"] == "finished"][:5]
        about = {"study": study.study_name, "direction": self.direction, "objective": next(filter(None, names), None)}
        content = {**about, "best": best[0] if best else None, "trials": rows}
        write_text(self.folder / "search.json", json.dumps(content, indent=1) + "\n")

        states = [row["state"] for row in rows]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        log.info("%s: %d trials (%s)", self.folder, len(rows), counts)
        log.info(
            "best by %s:" if best else "no trial has finished with a finite objective",
            *[about["objective"]][: len(best)],
        )
        for row in best:
            log.info("%s, %.5g: %s", row["trial"], row["objective"], shlex.join(row["overrides"]))
        log.info("all of them: %s; compare them: consistency-report %s", self.folder / "search.json", self.folder)


def _name_of(trial: Trial | FrozenTrial) -> str:
    """`trial007`; in the journals of version 0.1, a later try may have the name of the first."""
    return trial.user_attrs.get("name", f"trial{trial.number:03d}")


def _launched(study: Study) -> list[FrozenTrial]:
    """Trials that have all their parameters; version 0.1 gave a failed one up for a later try."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if "overrides" in trial.user_attrs and trial.state.name != "FAIL"]


def _built(settings: Any) -> Any:
    return None if settings is None else instantiate(settings, _convert_="object")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, value in tree.items() for k, v in _flat(value, f"{prefix}.{name}".lstrip(".")).items()}
