"""What a run will take, from a probe that touches nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from composing import composed
from consistency.commands import checks
from consistency.commands.estimate import estimate
from consistency.io.run_dir import locked

COMMAND = Path(sys.executable).parent / "consistency-train"


def asked(*overrides):
    cfg = composed("train", "experiment=smoke_ct", "estimate=true", *overrides)
    checks.check("train", cfg)
    return cfg


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def test_says_what_the_whole_will_take(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"):
        # An end that comes before that of the probe does not cut it short.
        found = estimate(asked("trainer.max_steps=2", f"paths.output_dir={tmp_path / 'run'}"), steps=3)
    assert found["parameters"] > 10_000
    assert 1e8 < found["peak_memory"] < 1e11
    assert found["hours"] == pytest.approx(2 * 16 / found["images_per_second"] / 3600)
    assert "median of 3 steps" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_micro_batches_are_found_by_themselves(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    settings = ["trainer.accumulate_grad_batches=auto", f"paths.output_dir={tmp_path / 'run'}"]
    with caplog.at_level("INFO"):
        estimate(asked(*settings), steps=1)
    assert "16 = 1 devices x 1 micro-batches of 16" in caplog.text


def command(folder, *overrides):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [COMMAND, *overrides, "experiment=smoke_ct", "estimate=true"]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_touches_no_run_even_one_under_way(tmp_path):
    run = tmp_path / "outputs" / "smoke_ct"
    (run / ".hydra").mkdir(parents=True)
    for name in ("status.json", "train.log", ".hydra/config.yaml"):
        (run / name).write_text("of the run\n")
    with locked(run / "run", patience=0):
        before = snapshot(tmp_path)
        done = command(tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "images/s" in done.stdout
        assert snapshot(tmp_path) == before


def test_is_for_one_run(tmp_path):
    done = command(tmp_path, "-m", "seed=0,1")
    assert done.returncode == 2
    assert "estimate=true is for one run" in done.stderr
    assert list(tmp_path.iterdir()) == []
