"""The commands. Nothing heavy is imported until a configuration has been checked."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from consistency import config
from consistency.commands.folder import RefusedError
from consistency.commands.start import REFUSED, start
from consistency.validation import commands, training


def let_waiting_threads_sleep() -> None:
    """Where other processes need the cores, threads of torch that wait for each other sleep instead of spin.

    A thread that spins holds the core that the thread it waits for needs: two threads on two busy cores were ten times
    slower (docs/performance.md). OpenMP reads this once, when torch is loaded; no result depends on it. A machine that
    is quiet, where sleeping may cost time, and what the user has set stay as they are.
    """
    given = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys()
    if not given and os.getloadavg()[0] >= 1:
        os.environ["OMP_WAIT_POLICY"] = "passive"


let_waiting_threads_sleep()
config.register()
# `--help` copies all stored configurations for each of 90 groups, which takes two seconds; our commands change none.
ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
_MAIN = {"config_path": str(config.CONF_DIR), "version_base": "1.3"}
WRONG = 2  # exit code: an option or a file that was given is wrong; 1 is a failure at work


def _exit_codes(command: Callable[..., Any]) -> Callable[..., Any]:
    """What does not compose ends with `WRONG`; Hydra itself ends with 1, and says in one line what was wrong."""

    @wraps(command)
    def wrapped(*args: Any) -> Any:
        sys.argv[1:] = [_renamed(argument, command.__name__) for argument in sys.argv[1:]]
        _refuse_null_groups(sys.argv[1:])
        own = re.compile(r"\+*imports=|--config-dir|-cd\b|.*_target_=")
        if any(own.match(argument) for argument in sys.argv[1:]) and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # last: a file of the user's must not take the place of a library
        try:
            return command(*args)
        except SystemExit as end:
            if isinstance(end.code, str):  # of a sweep that cannot be started as asked
                print(end.code, file=sys.stderr)
                sys.exit(WRONG)
            if end.code == 1 and isinstance(end.__context__, HydraException | OmegaConfBaseException):
                sys.exit(WRONG)
            raise

    return wrapped


def _refuse_null_groups(arguments: list[str]) -> None:
    """`network=null`, for which Hydra has a traceback only."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        if value == "null" and re.fullmatch(r"\w+", group) and (config.CONF_DIR / group).is_dir():
            names = ", ".join(sorted(file.stem for file in (config.CONF_DIR / group).glob("*.yaml")))
            print(f"consistency: {group} is null; allowed: {names}, or ~{group} to leave it out", file=sys.stderr)
            sys.exit(WRONG)


# Options of version 0.1 and what they are called now; for one version.
_RENAMED = {
    "draw": "levels",
    "noise.rho": "levels.rho",
    "noise.sigma_data": "data.sigma_data",
    "noise.noise_scale": "parametrization.noise_scale",
    "noise": "model",
    "network.label_dropout": "model.label_dropout",
    "denoiser@method.denoiser": "parametrization",
    "method.denoiser.sigma_min": "model.sigma_min",
    "method.denoiser.sigma_max": "model.sigma_max",
    "method.denoiser": "parametrization",
    "method.draw": "method.levels",
}
_RENAMED_IN_EDIT = {"levels": "sigmas"}  # `levels` is a group now


def _renamed(argument: str, command: str = "train") -> str:
    """An override in today's words, with a line about it where it was in yesterday's."""
    option, equals, value = argument.partition("=")
    if argument == "experiment=null":
        return "~experiment"  # which Hydra takes for it
    prefix = option[: len(option) - len(option.lstrip("+~"))]
    bare = option[len(prefix) :]
    for old, new in (_RENAMED_IN_EDIT if command == "edit" else _RENAMED).items():
        if bare == old or bare.startswith(f"{old}."):
            now = f"{new}{bare[len(old) :]}"
            print(f"consistency: {bare} is called {now} now; the old name goes with the next version", file=sys.stderr)
            return f"{prefix}{now}{equals}{value}"
    return argument


@_exit_codes
@hydra.main(**_MAIN, config_name="train")
def train(cfg: DictConfig) -> float | None:
    """consistency-train: train a model, or continue its training."""

    def job() -> float | None:
        training.validate_variants(cfg, HydraConfig.get())
        training.validate(cfg)
        from consistency.commands.train import train

        return train(cfg)

    if cfg.estimate is True:
        return _one_line_errors(cfg, lambda: _estimate(cfg))
    return _one_line_errors(cfg, lambda: start(cfg, job))


def _estimate(cfg: DictConfig) -> None:
    training.validate_variants(cfg, HydraConfig.get())
    training.validate(cfg)
    from consistency.commands.estimate import estimate

    estimate(cfg)


@_exit_codes
@hydra.main(**_MAIN, config_name="sample")
def sample(cfg: DictConfig) -> None:
    """consistency-sample: images from a trained model."""

    def job() -> None:
        commands.validate_sample(cfg)
        from consistency.commands.sample import sample

        sample(cfg)

    _one_line_errors(cfg, job)


@_exit_codes
@hydra.main(**_MAIN, config_name="edit")
def edit(cfg: DictConfig) -> None:
    """consistency-edit: zero-shot editing with a trained model."""

    def job() -> None:
        commands.validate_edit(cfg)
        from consistency.commands.edit import edit

        edit(cfg)

    _one_line_errors(cfg, job)


@_exit_codes
@hydra.main(**_MAIN, config_name="prepare")
def data(cfg: DictConfig) -> None:
    """consistency-data: make a data set ready, and look at it."""

    def job() -> None:
        commands.validate_prepare(cfg)
        from consistency.commands.prepare import prepare

        prepare(cfg)

    _one_line_errors(cfg, job)


@_exit_codes
@hydra.main(**_MAIN, config_name="convert")
def convert(cfg: DictConfig) -> None:
    """consistency-convert: weights of other projects in."""

    def job() -> None:
        commands.validate_convert(cfg)
        from consistency.commands.convert import convert

        convert(cfg)

    _one_line_errors(cfg, job)


@_exit_codes
@hydra.main(**_MAIN, config_name="export")
def export(cfg: DictConfig) -> None:
    """consistency-export: a trained model out."""

    def job() -> None:
        commands.validate_export(cfg)
        from consistency.commands.convert import export

        export(cfg)

    _one_line_errors(cfg, job)


@_exit_codes
@hydra.main(**_MAIN, config_name="evaluate")
def evaluate(cfg: DictConfig) -> None:
    """consistency-evaluate: scores of a model or of images."""

    def job() -> None:
        commands.validate_evaluate(cfg)
        from consistency.commands.evaluate import evaluate

        evaluate(cfg)

    _one_line_errors(cfg, job)


@_exit_codes
@hydra.main(**_MAIN, config_name="app")
def app(cfg: DictConfig) -> None:
    """consistency-app: a page to play on."""

    def job() -> None:
        commands.validate_app(cfg)
        from consistency.app.serve import app

        app(cfg)

    _one_line_errors(cfg, job)


@_exit_codes
@hydra.main(**_MAIN, config_name="search")
def search(cfg: DictConfig) -> None:
    """consistency-search: levels for sampling in a few steps."""

    def job() -> None:
        commands.validate_search(cfg)
        from consistency.commands.search import search

        search(cfg)

    _one_line_errors(cfg, job)


@_exit_codes
@hydra.main(**_MAIN, config_name="curve")
def curve(cfg: DictConfig) -> None:
    """consistency-curve: scores against network evaluations."""

    def job() -> None:
        commands.validate_curve(cfg)
        from consistency.commands.evaluate import curve

        curve(cfg)

    _one_line_errors(cfg, job)


def report() -> None:
    """consistency-report: the runs of a study compared. No Hydra: it reads what is on disk."""
    from consistency.report.report import main

    sys.exit(main())


def _one_line_errors(cfg: DictConfig, job: Callable[[], Any]) -> Any:
    """Mistakes in the configuration end in one line; HYDRA_FULL_ERROR=1 shows the traceback."""
    try:
        if cfg.get("imports"):
            from consistency.models.register import import_modules

            import_modules(OmegaConf.to_container(cfg.imports) if OmegaConf.is_config(cfg.imports) else cfg.imports)
        return job()
    except KeyboardInterrupt:
        if HydraConfig.get().mode == RunMode.MULTIRUN or os.environ.get("HYDRA_FULL_ERROR", "0") != "0":
            raise
        print("consistency: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FloatingPointError, InstantiationException, OmegaConfBaseException, OSError) as error:
        in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN  # Hydra then goes on with the other jobs
        if in_sweep or os.environ.get("HYDRA_FULL_ERROR", "0") != "0":
            raise
        # Hydra wraps what a constructor says; the cause is the line that was written for the user.
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        print(f"consistency: {cause}".splitlines()[0], file=sys.stderr)
        at_work = isinstance(cause, OSError | ArithmeticError | MemoryError)  # a full disk, a run that diverged
        sys.exit(REFUSED if isinstance(error, RefusedError) else 1 if at_work else WRONG)


if __name__ == "__main__":  # python -m consistency.cli: what the launcher of a multirun starts
    train()
