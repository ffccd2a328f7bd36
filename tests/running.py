"""Jobs of the commands in this process, on the smoke recipes; tests/test_cli.py runs the commands themselves."""

from pathlib import Path

from composing import composed
from consistency.commands import checks
from consistency.commands.start import start
from consistency.commands.train import train

# What the finished runs of the fixture `trained` were trained with; every step is a row of the log.
SHORT = ("trainer.max_steps=6", "callbacks.log.every_n_steps=1", "network.dropout=0.2")


def run(folder: Path, name: str, *overrides: str) -> float | None:
    """Train under outputs/NAME, as the command would."""
    cfg = composed("train", f"run_name={name}", f"paths.output_dir={folder / 'outputs' / name}", *overrides)
    checks.check("train", cfg)
    return start(cfg, lambda: train(cfg))
