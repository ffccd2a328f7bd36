"""The commands. Nothing heavy is imported until a configuration has been checked."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from consistency import config
from consistency.commands.checks import check, check_teachers_settings, check_variants
from consistency.commands.folder import RefusedError
from consistency.commands.help import explained, help_page, refuse_unknown
from consistency.commands.start import REFUSED, start


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
WRONG = 2  # exit code: an option or a file that was given is wrong; 1 is a failure at work


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


_FULL_ERROR, _USERS = "HYDRA_FULL_ERROR", "CONSISTENCY_FULL_ERROR"  # the second keeps what the user has set


def _wants_traceback() -> bool:
    return os.environ.get(_USERS, os.environ.get(_FULL_ERROR, "0")) != "0"


@contextmanager
def _raising() -> Iterator[None]:
    """While Hydra composes, it raises what is wrong instead of printing it: the line is then ours."""
    os.environ[_USERS] = os.environ.get(_USERS, os.environ.get(_FULL_ERROR, "0"))
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        _restore_full_error()


def _restore_full_error() -> None:
    os.environ[_FULL_ERROR] = os.environ.pop(_USERS, os.environ.get(_FULL_ERROR, "0"))


def _command(name: str, run: str) -> Callable[[], Any]:
    """The entry point `consistency-NAME`: what it is given is composed and checked, then `run` (module:function)."""
    config_name = {"data": "prepare"}.get(name, name)

    @hydra.main(config_path=str(config.CONF_DIR), config_name=config_name, version_base="1.3")
    def composed(cfg: DictConfig) -> Any:
        _restore_full_error()
        return _one_line_errors(cfg, lambda: _run(name, run, cfg))

    def command() -> Any:
        sys.argv[1:] = [_renamed(argument, name) for argument in sys.argv[1:]]
        arguments = sys.argv[1:]
        _refuse_null_groups(arguments)
        if {"--help", "-h"} & set(arguments):
            print(help_page(name, config_name))
            return None
        own = re.compile(r"\+*imports=|--config-dir|-cd\b|.*_target_=")
        if any(own.match(argument) for argument in arguments) and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # last: a file of the user's must not take the place of a library
        try:
            refuse_unknown(config_name, arguments)
            with _raising():
                return composed()
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            if _wants_traceback():
                raise
            print(f"consistency: {explained(config_name, error)}", file=sys.stderr)
            sys.exit(WRONG)
        except SystemExit as end:
            if isinstance(end.code, str):  # of a sweep that cannot be started as asked
                print(end.code, file=sys.stderr)
                sys.exit(WRONG)
            raise

    command.__name__ = command.__qualname__ = name
    return command


def _run(name: str, run: str, cfg: DictConfig) -> Any:
    """Check the options, then import what does the work."""

    def job() -> Any:
        if name == "train":
            check_variants(cfg, HydraConfig.get())
            check_teachers_settings(cfg, HydraConfig.get().overrides.task)
        check(name, cfg)
        is_estimate = name == "train" and cfg.estimate is True
        module, function = ("commands.estimate:estimate" if is_estimate else run).split(":")
        return getattr(import_module(f"consistency.{module}"), function)(cfg)

    return start(cfg, job) if name == "train" and cfg.estimate is not True else job()


app = _command("app", "app.serve:app")
convert = _command("convert", "commands.convert:convert")
curve = _command("curve", "commands.evaluate:curve")
data = _command("data", "commands.prepare:prepare")
edit = _command("edit", "commands.edit:edit")
evaluate = _command("evaluate", "commands.evaluate:evaluate")
export = _command("export", "commands.convert:export")
sample = _command("sample", "commands.sample:sample")
search = _command("search", "commands.search:search")
train = _command("train", "commands.train:train")


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
        if HydraConfig.get().mode == RunMode.MULTIRUN or _wants_traceback():
            raise
        print("consistency: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FloatingPointError, InstantiationException, OmegaConfBaseException, OSError) as error:
        in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN  # Hydra then goes on with the other jobs
        if in_sweep or _wants_traceback():
            raise
        # Hydra wraps what a constructor says; the cause is the line that was written for the user.
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        print(f"consistency: {cause}".splitlines()[0], file=sys.stderr)
        at_work = isinstance(cause, OSError | ArithmeticError | MemoryError)  # a full disk, a run that diverged
        sys.exit(REFUSED if isinstance(error, RefusedError) else 1 if at_work else WRONG)


if __name__ == "__main__":  # python -m consistency.cli: what the launcher of a multirun starts
    train()
