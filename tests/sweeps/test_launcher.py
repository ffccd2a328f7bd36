"""The queue over slots, with small scripts in place of trainings; tests/test_sweep.py trains."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from consistency.sweeps import launcher as module
from consistency.sweeps.launcher import LocalLauncher
from consistency.sweeps.slots import find_slots, visible_gpus
from consistency.sweeps.study import plan_runs

SCRIPT = """
import json, os, sys, time, pathlib
run_dir, what = pathlib.Path(sys.argv[1]), sys.argv[2]
value = what.split('=')[1]
if value == 'raises':
    (run_dir / 'status.json').write_text(json.dumps({'state': 'failed', 'error': 'ValueError: no good'}))
    sys.exit(1)
if value == 'dies':
    (run_dir / 'status.json').write_text(json.dumps({'state': 'running', 'step': 3}))
    print('so far so good', flush=True)
    os.kill(os.getpid(), 9)
if value == 'refused':
    print('in use by another'); sys.exit(3)
if value == 'mute':
    print('cannot start'); sys.exit(1)
start = time.time()
(run_dir / 'at-work').touch()
while len(list(run_dir.parent.glob('*/at-work'))) < int(os.environ.get('MEET', '0')):
    time.sleep(0.01)
time.sleep(float(os.environ.get('NAP', '0')))
seen = {name: os.environ.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')}
facts = {'state': 'finished', 'objective': float(value.strip('numberedsame')), 'objective_name': 'loss'}
(run_dir / 'status.json').write_text(json.dumps({**facts, 'seen': seen, 'from': start, 'to': time.time()}))
"""


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A launcher of small scripts: `x=VALUE` does what VALUE says; `x=nope` does not compose."""

    def fake_command(hydra, overrides, run_dir, study_name):
        return [sys.executable, "-c", SCRIPT, str(run_dir), overrides[-1]]

    def load_sweep_config(config, overrides):
        if overrides[-1] == "x=nope":
            raise RuntimeError("Could not find 'x/nope'\n\nAvailable options: 1, 2")
        subdir = "same" if overrides[-1].startswith("x=same") else overrides[-1]
        subdir = "${hydra.job.num}" if overrides[-1].startswith("x=numbered") else subdir
        hydra = {"sweep": {"subdir": subdir}, "job": {"num": "???"}}
        return OmegaConf.create({"hydra": hydra, "trainer": {"accelerator": "auto"}})

    def local(**settings):
        launcher = LocalLauncher(**{"slots": 2, **settings})
        config = OmegaConf.create(
            {"hydra": {"sweep": {"dir": str(tmp_path)}, "hydra_logging": None, "verbose": False}, "study_name": "s"}
        )
        context = SimpleNamespace(config_loader=SimpleNamespace(load_sweep_config=load_sweep_config))
        launcher.setup(hydra_context=context, task_function=None, config=config)
        return launcher

    monkeypatch.setattr(module, "command_of", fake_command)
    return local


@pytest.fixture
def launch(local):
    """Carry out runs `x=VALUE`."""

    def launch(*values, **settings):
        launcher = local(**settings)
        return launcher.run(plan_runs(launcher.hydra_context, launcher.config, [[f"x={value}"] for value in values]))

    return launch


def status(folder, value):
    return json.loads((folder / f"x={value}" / "status.json").read_text())


def test_a_sweeper_of_others_gets_objectives_in_order(local):
    results = local(slots=1).launch([["x=3"], ["x=raises"], ["x=1"]], 0)
    assert [result.status for result in results] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.COMPLETED]
    assert [results[0].return_value, results[2].return_value] == [3.0, 1.0]
    with pytest.raises(RuntimeError, match="no good"):
        _ = results[1].return_value


def test_a_run_that_fails_or_dies_does_not_touch_the_others(launch, tmp_path):
    runs = launch(1, "raises", "dies", "mute", "nope", 2)
    dead = "killed by signal 9 (SIGKILL); out of memory?; its last line: so far so good"
    assert [run.error for run in runs] == [
        *(None, "ValueError: no good", dead, "exit code 1; its last line: cannot start"),
        *("Could not find 'x/nope'", None),
    ]
    assert status(tmp_path, "dies") == {"state": "failed", "step": 3, "error": dead}
    assert "SIGKILL" in (tmp_path / "x=dies/train.log").read_text()
    listed = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert list(listed) == ["x=1", "x=raises", "x=dies", "x=mute", "x=2"]


def test_a_folder_that_cannot_be_made_does_not_touch_the_others(launch, tmp_path):
    (tmp_path / "x=1").write_text("a file in its place")
    first, second = launch(1, 2)
    assert "x=1" in first.error
    assert second.error is None


def test_a_refused_run_keeps_its_status(launch, tmp_path):
    """Another process may be in the middle of it."""
    (tmp_path / "x=refused").mkdir()
    (tmp_path / "x=refused/status.json").write_text('{"state": "running"}')
    (run,) = launch("refused")
    assert run.error == "in use by another"
    assert status(tmp_path, "refused") == {"state": "running"}


def test_an_old_failure_is_not_taken_for_the_new_one(launch, tmp_path):
    (tmp_path / "x=mute").mkdir()
    (tmp_path / "x=mute/status.json").write_text('{"state": "failed", "error": "OLD", "step": 2}')
    (run,) = launch("mute")
    assert status(tmp_path, "mute") == {"state": "failed", "step": 2, "error": run.error}
    assert "cannot start" in run.error


def test_directories_may_be_numbered(launch, tmp_path):
    assert [run.run_dir.name for run in launch("numbered1", "numbered2")] == ["0", "1"]


def test_as_many_at_a_time_as_there_are_slots(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("MEET", "2")  # the first waits for the second
    monkeypatch.setenv("NAP", "0.3")
    launch(1, 2, 3, 4, 5)
    spans = [status(tmp_path, value) for value in range(1, 6)]
    together = [sum(a["from"] <= b["from"] < a["to"] for a in spans) for b in spans]
    assert max(together) == 2


def test_two_runs_of_one_directory_are_refused(launch):
    with pytest.raises(ValueError, match=r"two runs would share .*same .x=same1, x=same2.; leave run_name out"):
        launch("same1", "same2")


def test_slots_reach_the_runs_before_torch_does(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("MEET", "2")
    launch(1, 2, 3, slots="auto", gpus=2)
    seen = [status(tmp_path, value)["seen"]["CUDA_VISIBLE_DEVICES"] for value in (1, 2, 3)]
    assert set(seen[:2]) == {"4,5", "6,7"}
    assert seen[2] in seen[:2]


@pytest.mark.parametrize("second", [False, True])
def test_ctrl_c_is_passed_on_once(launch, tmp_path, monkeypatch, caplog, second):
    """Runs end by SIGTERM, or by SIGKILL at the second Ctrl-C; what waits is not started."""
    monkeypatch.setenv("NAP", "600")

    def interrupt():
        wait_until(lambda: len(list(tmp_path.glob("*/at-work"))) == 2)
        os.kill(os.getpid(), signal.SIGINT)
        if second:
            wait_until(lambda: "stopping: 2 runs" in caplog.text)
            os.kill(os.getpid(), signal.SIGINT)

    if second:  # a run that does not hear SIGTERM
        monkeypatch.setattr(module, "command_of", lambda h, o, run_dir, s: [sys.executable, "-c", DEAF, str(run_dir)])
    thread = threading.Thread(target=interrupt)
    thread.start()
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as caught:
        launch(1, 2, 3)
    thread.join()
    assert caught.value.code == 130
    assert not (tmp_path / "x=3/console.log").exists()


DEAF = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(pathlib.Path(sys.argv[1]) / 'at-work').touch()
time.sleep(600)
"""


def wait_until(condition):
    deadline = time.monotonic() + 600
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_run_ends_with_its_launcher(tmp_path):
    """SIGKILL of the launcher closes the pipe that the run reads."""
    environment = {**os.environ, "CONSISTENCY_WATCH_STDIN": "1"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(tmp_path / "pid")], env=environment)
    wait_until((tmp_path / "pid").exists)
    child = int((tmp_path / "pid").read_text())
    time.sleep(0.3)
    assert is_alive(child)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(child))
    assert not is_alive(child)


PARENT = """
import subprocess, sys, pathlib, os
child = subprocess.Popen(
    [sys.executable, '-c', sys.argv[1], sys.argv[2]], stdin=subprocess.PIPE, start_new_session=True
)
child.wait()
"""
CHILD = """
import os, pathlib, sys, time
from consistency.commands.start import _end_with_launcher
_end_with_launcher()
pathlib.Path(sys.argv[1] + '.partial').write_text(str(os.getpid()))
os.replace(sys.argv[1] + '.partial', sys.argv[1])
time.sleep(600)
"""


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestSlots:
    def test_cores_are_shared_out(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
        slots = find_slots("auto", gpus=1, threads=3)
        assert [slot["OMP_NUM_THREADS"] for slot in slots] == ["3", "3"]

    def test_more_slots_than_gpus_share_them(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        slots = find_slots(3, gpus=1, threads=1)
        assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1", "0"]

    def test_gpus_are_left_alone_by_cpu_runs(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        assert "CUDA_VISIBLE_DEVICES" not in find_slots(1, gpus=0, threads=1)[0]

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"slots": "many", "gpus": 0, "threads": 1}, "slots must be auto or a positive integer, got many"),
            ({"slots": 0, "gpus": 0, "threads": 1}, "slots must be auto or a positive integer, got 0"),
            ({"slots": 1, "gpus": 0, "threads": 0}, "threads must be an integer of at least 1, got 0"),
            ({"slots": 1, "gpus": 3, "threads": 1}, "gpus is 3, but this machine shows 2 GPUs"),
        ],
    )
    def test_mistakes(self, monkeypatch, settings, words):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with pytest.raises(ValueError, match=words):
            find_slots(settings.pop("slots"), **settings)

    def test_nvidia_smi_is_asked_where_nothing_is_set(self, monkeypatch, tmp_path):
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
        tool.chmod(0o755)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert visible_gpus() == ["0", "1", "2"]
