"""The short form of `make test-faults`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    script = Path(__file__).with_name("faults.py")
    command = [
        sys.executable,
        script,
        "--kills=2",
        "--at-least=1",
        "--recipe=smoke_ct",
        f"--folder={tmp_path}",
        "trainer.max_steps=100",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal, bit for bit" in done.stdout
    assert "nothing left over" in done.stdout
