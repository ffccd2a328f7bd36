"""The ladder on photographs: its commands compose, its figures are counted, its table says what is missing."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from composing import composed
from consistency import config
from consistency.commands import checks


@pytest.fixture(scope="module")
def script():
    """experiments/measure_photographs.py, and what it imports from beside it."""
    sys.path.insert(0, str(config.EXPERIMENTS_DIR))
    yield importlib.import_module("measure_photographs")
    sys.path.remove(str(config.EXPERIMENTS_DIR))


REPORT = {
    "about": {
        **{"data": "cifar10_jpeg", "image_size": 16, "sample_seed": 0, "reference_count": 50_000},
        **{"classifier_accuracy": 0.8, "classifier_features": 64, "date": "2026-01-01"},
        **{"machine": {"name": "CPU", "threads": 1, "torch": "2"}},
        **{"peak_flops": 5e10, "peak_of": "matrix product of 1024, float32"},
    },
    "yardsticks": {"halves": 0.1, "real_10000": 0.2, "uniform_noise": 300.0},
    "runs": {
        "edm": {
            **{"images_seen": 64_000, "seconds": 700.4, "images_per_second": 99.6, "share_of_peak": 0.314},
            "scores": {"Heun-18": {"10000": 12.345}},
        },
        "ict": {
            **{"images_seen": 64_000, "seconds": 1700.0, "images_per_second": 30.0, "share_of_peak": 0.2},
            "scores": {"1-step": {"10000": 20.0, "50000": 19.0}, "2-step": {"10000": 18.0, "50000": 17.0}},
        },
    },
}


def test_table(script):
    head, _, edm, cd, ct, ict, ect, *_ = script.table(REPORT).splitlines()
    cells = [cell.strip() for cell in head.strip("|").split("|")]
    assert cells[5:] == [f"{name}, {n}" for name in ("1-step", "2-step", "Heun-18") for n in ("10k", "50k")]
    assert edm == "| EDM | 64,000 | 700 s | 100 | 31% | - | - | - | - | 12.3 | not measured |"
    assert ict == "| iCT | 64,000 | 1,700 s | 30 | 20% | 20.0 | 19.0 | 18.0 | 17.0 | - | - |"
    for name, line in (("CD", cd), ("CT", ct), ("ECT", ect)):
        assert line == f"| {name} |" + 10 * " not measured |"
    few = {**REPORT, "runs": {"ict": {**REPORT["runs"]["ict"], "scores": {"1-step": {"2500": 1234.56}}}}}
    assert "| 1-step, 2.5k |" in script.table(few)
    assert "| 1,234.6 |" in script.table(few)
    assert all(len(line) <= 160 for line in script.table(REPORT).splitlines())


def test_only_what_is_between_its_markers_is_replaced(script):
    text = "a\n<!-- one: begin -->\nold\n<!-- one: end -->\nb\n<!-- two: begin -->\nkept\n<!-- two: end -->\nc\n"
    new = script.replaced(text, "one", "new")
    assert new == text.replace("old", "new")
    assert script.replaced(new, "one", "new") == new


@pytest.mark.parametrize(
    "text", ["", "<!-- one: end --><!-- one: begin -->", 2 * "<!-- one: begin --><!-- one: end -->"]
)
def test_no_place_for_the_table(script, text):
    with pytest.raises(ValueError, match=r"no place for the table: expected .*one: begin"):
        script.replaced(text, "one", "new")


def test_readme_has_the_places(script):
    readme = (config.EXPERIMENTS_DIR / "README.md").read_text()
    for machine in script.LADDERS:
        script.replaced(readme, f"photographs {machine}", "")


def of(ladder_command):
    overrides = [option for option in ladder_command if not option.startswith("hydra.")]
    return composed("train", *overrides, "paths.output_dir=unused")


@pytest.mark.parametrize("machine", ["gpu", "cpu"])
@pytest.mark.parametrize(
    ("method", "data"),
    [*((method, "cifar10_jpeg") for method in ("edm", "cd", "ct", "ict", "ect")), ("edm", "cifar10")],
)
def test_commands_compose(script, machine, method, data):
    ladder = script.LADDERS[machine]
    cfg = of(ladder.command(method, Path("runs"), data))
    for option in ("teacher", "init_from"):
        if cfg[option] is not None:
            assert cfg[option] == f"runs/{ladder.prefix}edm"
            cfg[option] = str(config.CONF_DIR)  # one that exists
    checks.check("train", cfg)
    OmegaConf.to_container(cfg, resolve=True)
    assert cfg.run_name == f"{ladder.prefix}{method}"
    assert (cfg.network is None) == (method == "cd")
    assert cfg.data.dataset._target_.endswith("cifar10" if data == "cifar10" else "image_zip")
    first = of(ladder.command("edm", Path("runs"), "cifar10_jpeg"))
    images = [one.data.batch_size * one.trainer.max_steps for one in (cfg, first)]
    assert images[0] == images[1]


def test_missing_runs_are_left_out(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr(sys, "argv", ["script", "cpu", "--measure-only", f"--outputs={tmp_path}", f"--into={tmp_path}"])
    script.main()
    said = capsys.readouterr().out
    assert said.count("is not finished: not measured") == 5
    assert "nothing measured" in said
    assert list((tmp_path / "experiments").iterdir()) == []


def test_a_finished_run_is_not_started_again(script, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(script.subprocess, "run", lambda command, check: started.append(command[1:]))
    for state in ("finished", "interrupted"):
        (tmp_path / "status.json").write_text(json.dumps({"state": state}))
        script.train([state], tmp_path)
    assert started == [["interrupted"]]
