"""Searches, with a function in place of the trainings; tests/training/test_pruning.py stops real ones."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from consistency import config
from consistency.io.run_dir import locked
from consistency.sweeps.launcher import LocalLauncher
from consistency.sweeps.search import SearchSweeper
from consistency.sweeps.study import Run, note_runs
from consistency.sweeps.trials import read_space
from consistency.training.pruning import PruneTrial

optuna = pytest.importorskip("optuna")
config.register()

RANDOM = {"_target_": "optuna.samplers.RandomSampler", "seed": 0}
TPE = {"_target_": "optuna.samplers.TPESampler", "seed": 0, "n_startup_trials": 5}
RANGES = {"lr": "tag(log,interval(1e-5,1e-1))", "batch": "choice(64,128)", "start": "int(interval(2,9))"}


def values(job):
    """Overrides as numbers where they are."""
    pairs = (override.split("=", 1) for override in job)
    return {name: float(text) if text.replace(".", "").replace("e-", "").isdigit() else text for name, text in pairs}


def lr(job):
    return values(job)["lr"]


def fails(job):
    raise RuntimeError("no space left")


def stopped(job):
    raise SystemExit(143)  # as the launcher does after SIGTERM


class Search:
    """A folder with one; each call is the command once more; `run(job)` is a training, and returns its objective."""

    def __init__(self, folder):
        self.folder, self.batches = folder, []

    def __call__(self, run, *arguments, config=None, launcher=None, **settings):
        self.batches = []
        settings = {"n_trials": 4, "sampler": RANDOM, "pruner": None, "params": RANGES, **settings}
        for part in ("sampler", "pruner"):
            settings[part] = settings[part] and OmegaConf.create(settings[part])
        sweeper = SearchSweeper(**settings)
        sweeper.hydra_context = SimpleNamespace(config_loader=None)
        quality = {"callbacks": {"quality": {"every_n_images": 100}}}
        hydra = {"hydra": {"sweep": {"dir": str(self.folder)}}, "study_name": "s", "trainer": {"accelerator": "cpu"}}
        sweeper.config = OmegaConf.create({**hydra, **quality, **(config or {})})
        sweeper.launcher = launcher
        sweeper.launch = lambda jobs: self._launch(run, jobs)
        sweeper.sweep(list(arguments))

    def _launch(self, run, jobs):
        self.batches.append([list(job) for job in jobs])
        note_runs(self.folder, "s", {values(job)["variant"]: job for job in jobs})
        return [self._carry_out(run, job) for job in jobs]

    def _carry_out(self, run, job):
        result = Run(job, self.folder / values(job)["variant"])
        result.run_dir.mkdir(exist_ok=True)
        try:
            outcome = run(job)
            status = outcome if isinstance(outcome, dict) else {"state": "finished", "objective": outcome}
        except Exception as error:
            result.error = str(error)
            status = {"state": "failed", "error": str(error), "diverged": isinstance(error, FloatingPointError)}
        (result.run_dir / "status.json").write_text(json.dumps({"objective_name": "score_onestep", **status}))
        return result

    @property
    def jobs(self):
        return [job for batch in self.batches for job in batch]

    @property
    def study(self):
        backend = optuna.storages.journal.JournalFileBackend(str(self.folder / "search.journal"))
        return optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))

    @property
    def states(self):
        return [trial.state.name for trial in self.study.trials]

    @property
    def summary(self):
        return json.loads((self.folder / "search.json").read_text())


@pytest.fixture
def search(tmp_path):
    return Search(tmp_path / "study")


def space_of(*overrides):
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return read_space({override.get_key_element(): override for override in parsed})


class TestSpace:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("interval(0,1)", ("FloatDistribution", 0.0, 1.0, False, None)),
            ("int(interval(1,9))", ("IntDistribution", 1, 9, False, 1)),
            ("tag(log,interval(1e-4,1e-2))", ("FloatDistribution", 1e-4, 1e-2, True, None)),
            ("int(tag(log,interval(20,320)))", ("IntDistribution", 20, 320, True, 1)),
            ("range(10,50,10)", ("IntDistribution", 10, 40, False, 10)),  # 50 excluded, as in a grid
            ("range(1,4)", ("IntDistribution", 1, 3, False, 1)),
            ("range(5,1,-2)", ("IntDistribution", 3, 5, False, 2)),
            ("range(0,1,0.25)", ("FloatDistribution", 0.0, 0.75, False, 0.25)),
        ],
    )
    def test_numbers(self, text, expected):
        new = space_of(f"x={text}")["x"]
        assert (type(new).__name__, new.low, new.high, new.log, new.step) == expected
        assert type(new.low) is type(expected[1])

    @pytest.mark.parametrize(
        ("text", "choices"),
        [
            ("choice(64,128)", ("64", "128")),
            ("l2,pseudo_huber", ("l2", "pseudo_huber")),
            ("choice([0.9,0.99],[0.999])", ("[0.9,0.99]", "[0.999]")),
            ("null,0.5", ("null", "0.5")),
        ],
    )
    def test_choices_are_overrides(self, text, choices):
        assert space_of(f"x={text}")["x"].choices == choices

    @pytest.mark.parametrize("text", ["tag(log,interval(0,1))", "interval(1,0)", "range(3,3)"])
    def test_impossible_ranges(self, text):
        with pytest.raises(ValueError, match=r"x=.* is not a range to search: "):
            space_of(f"x={text}")


def test_random_trials_are_in_their_ranges(search):
    search(lr, "experiment=e", n_trials=40)
    [batch] = search.batches
    assert batch[7][:2] == ["variant=trial007", "experiment=e"]
    found = [values(job) for job in batch]
    assert {run["start"] for run in found} == set(range(2, 10))
    assert {run["batch"] for run in found} == {64, 128}
    assert all(1e-5 <= run["lr"] <= 1e-1 for run in found)
    assert len({run["lr"] for run in found}) == 40
    below = sum(run["lr"] < 1e-3 for run in found)
    assert 12 <= below <= 28  # half of the decades; 1 % of a range that is not logarithmic


def test_the_command_line_wins(search):
    search(lr, "batch=1,2", "start=range(20,22)", "batch=32")
    assert all("batch=32" in job for job in search.jobs)
    assert {values(job)["start"] for job in search.jobs} <= {20, 21}


@pytest.mark.parametrize(("direction", "choose"), [("minimize", min), ("maximize", max)])
def test_best_and_summary(search, caplog, direction, choose):
    caplog.set_level("INFO")
    search(lr, "experiment=e", "logger=wandb", direction=direction)
    summary = search.summary
    assert (summary["objective"], summary["direction"]) == ("score_onestep", direction)
    found = [row["objective"] for row in summary["trials"]]
    assert found == sorted((lr(job) for job in search.jobs), reverse=direction == "maximize")
    best = summary["best"]
    assert best == summary["trials"][0]
    assert best["objective"] == choose(found)
    [job] = [job for job in search.jobs if f"variant={best['trial']}" in job]
    assert set(best["overrides"]) < set(job)
    assert best["run"] == best["trial"]
    assert f"{best['trial']}, score_onestep {best['objective']:.5g}: {' '.join(best['overrides'])}" in caplog.text


def test_complete_search_runs_nothing(search, caplog):
    search(lr)
    before = search.summary
    caplog.set_level("INFO")
    search(lr)
    assert search.batches == []
    assert search.summary == before
    assert "4 trials (4 finished)" in caplog.text


def test_more_trials_are_new_ones(search, tmp_path):
    search(lr, n_trials=2)
    first = [lr(job) for job in search.jobs]
    search(lr, n_trials=5)
    more = [lr(job) for job in search.jobs]
    assert len(more) == 3
    assert len({*first, *more}) == 5
    straight = Search(tmp_path / "straight")
    straight(lr, n_trials=5)
    assert [lr(job) for job in straight.jobs] == first + more


def test_killed_search_goes_on(search):
    """The same runs again, so that they continue from their checkpoints; with neutral settings as they are now."""
    with pytest.raises(SystemExit):
        search(stopped, "experiment=e", "logger=wandb", "paths.data_dir=old")
    asked = [[entry for entry in job if entry not in ("logger=wandb", "paths.data_dir=old")] for job in search.jobs]
    assert search.states == ["RUNNING"] * 4
    search(lr, "experiment=e", "paths.data_dir=new", n_trials=5)
    assert search.jobs[:4] == [[*job, "paths.data_dir=new"] for job in asked]
    assert search.states == ["COMPLETE"] * 5


def test_killed_while_a_trial_was_asked_for(search):
    search(lr, n_trials=2)
    search.study.ask()
    search(lr, n_trials=3)
    assert [job[0] for job in search.jobs] == ["variant=trial003"]
    assert [row["state"] for row in search.summary["trials"]] == ["finished"] * 3


def test_failed_trials_are_named_and_tried_again(search, caplog):
    with pytest.raises(SystemExit) as caught:
        search(lambda job: fails(job) if values(job)["variant"] == "trial001" else lr(job))
    assert caught.value.code == 1
    assert "failed: trial001: no space left" in caplog.text
    assert [(row["trial"], row["error"]) for row in search.summary["trials"]][-1] == ("trial001", "no space left")
    assert [row["state"] for row in search.summary["trials"]] == ["finished"] * 3 + ["failed"]
    failed = search.jobs[1]
    search(lr)
    assert search.jobs == [failed]  # the same run, so that it goes on from its checkpoint
    assert [row["state"] for row in search.summary["trials"]] == ["finished"] * 4
    search(lr)
    assert search.jobs == []


def test_a_trial_without_an_objective_fails(search, caplog):
    with pytest.raises(SystemExit):
        search(lambda job: None, n_trials=1)
    assert "it returned no objective" in caplog.text


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_diverged_trials_are_the_worst(search, direction):
    def diverges(job):
        name = values(job)["variant"]
        if name == "trial000":
            raise FloatingPointError("the loss is nan")
        return math.nan if name == "trial001" else lr(job)

    search(diverges, direction=direction)
    worst = math.inf if direction == "minimize" else -math.inf
    assert [trial.value for trial in search.study.trials[:2]] == [worst, worst]
    assert [row["state"] for row in search.summary["trials"]] == ["finished"] * 2 + ["diverged"] * 2
    search(lr, direction=direction)
    assert search.jobs == []


def test_all_diverged(search, caplog):
    caplog.set_level("INFO")
    search(lambda job: math.inf)
    assert "4 trials (4 diverged), none to compare" in caplog.text
    assert search.summary["best"] is None


def test_scores_of_runs_reach_optuna(search):
    """For its samplers, which learn from pruned trials, and for optuna-dashboard."""

    def pruned(job):
        file = search.folder / values(job)["variant"] / "quality.jsonl"
        rows = [{"name": "onestep", "images_seen": images, "score": images / 10} for images in (128, 256)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"state": "pruned", "objective": 25.6}

    search(pruned, n_trials=1)
    [trial] = search.study.trials
    assert (trial.state.name, trial.value, trial.intermediate_values) == ("PRUNED", 25.6, {100: 12.8, 200: 25.6})
    [row] = search.summary["trials"]
    assert (row["state"], row["objective"], row["scores"]) == ("pruned", 25.6, {"100": 12.8, "200": 25.6})


class TestBatches:
    def test_a_sampler_that_learns_is_asked_for_one_a_slot(self, search):
        search(lr, sampler=TPE, n_trials=7, launcher=LocalLauncher(slots=3))
        assert [len(batch) for batch in search.batches] == [3, 3, 1]

    def test_of_a_given_size(self, search):
        search(lr, batch=3)
        assert [len(batch) for batch in search.batches] == [3, 1]

    def test_of_another_launcher_must_be_given(self, search):
        with pytest.raises(SystemExit, match=r"hydra.sweeper.batch=auto is for hydra/launcher=local"):
            search(lr, sampler=TPE)

    @pytest.mark.parametrize("sampler", [TPE, RANDOM])
    def test_later_trials_know_the_earlier(self, tmp_path, sampler):
        asked = []
        for sign in (1, -1):
            search = Search(tmp_path / str(sign))
            search(lambda job, sign=sign: sign * lr(job), sampler=sampler, batch=1, n_trials=7)
            asked.append([job[0][1:] for job in search.batches])
        first, second = asked
        assert first[:5] == second[:5]  # drawn at random
        assert (first[5:] == second[5:]) == (sampler is RANDOM)


class TestGoingOnWith:
    def test_other_ends_of_a_range(self, search):
        search(lr)
        search(lr, n_trials=8, params={**RANGES, "lr": "tag(log,interval(1e-2,1))"})
        assert all(lr(job) >= 1e-2 for job in search.jobs)
        assert len(search.jobs) == 4

    @pytest.mark.parametrize(
        ("name", "text"), [("batch", "choice(64,256)"), ("batch", "interval(0,1)"), ("lr", "interval(1e-5,1e-1)")]
    )
    def test_other_choices_or_kinds_is_refused(self, search, name, text):
        search(lr)
        with pytest.raises(SystemExit, match=rf"{name} is now searched in .* earlier trials.*study_name=NAME"):
            search(lr, n_trials=5, params={**RANGES, name: text})
        assert search.jobs == []
        search(lr, n_trials=5)
        assert len(search.jobs) == 1

    def test_a_parameter_more_or_less(self, search):
        search(lr, "seed=0")
        search(lr, "batch=64", "more=interval(0,1)", n_trials=6)
        assert all("batch=64" in job and "more" in values(job) for job in search.jobs)

    def test_other_settings_is_refused(self, search):
        search(lr, config={"images": 100, "lr": 1})
        search(lr, config={"images": 100, "lr": 2, "logger": {"wandb": 1}})  # searched, and neutral
        with pytest.raises(SystemExit, match=r"other settings \(images: 100 -> 200\).*study_name=NAME"):
            search(lr, config={"images": 200, "lr": 1})

    def test_another_objective_or_direction_is_refused(self, search):
        search(lr)
        with pytest.raises(SystemExit, match=r"objective: None -> loss"):
            search(lr, config={"objective": "loss"})
        with pytest.raises(SystemExit, match=r"sweeper\.direction: minimize -> maximize"):
            search(lr, direction="maximize")

    def test_a_renamed_folder(self, search):
        search(lr)
        search(lr, config={"study_name": "renamed"})
        assert search.jobs == []

    def test_a_line_that_was_not_written_to_its_end(self, search):
        search(lr, n_trials=2)
        with (search.folder / "search.journal").open("a") as journal:
            journal.write('{"op_code":')
        search(lr)
        assert search.states == ["COMPLETE"] * 4

    def test_a_damaged_journal_is_refused_and_stays(self, search):
        search(lr, n_trials=1)
        (search.folder / "search.journal").write_text("no journal\n" * 2)
        with pytest.raises(SystemExit, match=r"search.journal is damaged .*move it away, or study_name=NAME"):
            search(lr)
        assert (search.folder / "search.journal").read_text() == "no journal\n" * 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_trials": 0}, "n_trials must be a positive integer, got 0"),
        ({"batch": "all"}, "batch must be a positive integer, got all"),
        ({"direction": "down"}, "direction must be minimize or maximize, got down"),
        ({"variants": {"a": []}}, "a search has no variants; leave ablation= out"),
        ({"params": {"lr": "0.1"}}, "there is nothing to search"),
        ({"params": {**RANGES, "variant": "a,b"}}, "names of their own; leave variant out"),
        ({"params": {"lr": "tag(log,interval(0,1))"}}, "lr=tag.* is not a range to search"),
        (
            {"pruner": {"_target_": "optuna.pruners.NopPruner"}, "config": {"callbacks": {"quality": None}}},
            "callbacks.quality.every_n_images=N, got None; or hydra.sweeper.pruner=null",
        ),
    ],
)
def test_mistakes_are_one_line(search, settings, words):
    with pytest.raises(SystemExit, match=words) as caught:
        search(lr, **settings)
    assert str(caught.value).startswith("consistency: ")
    assert "\n" not in str(caught.value)
    assert search.batches == []


def test_without_optuna(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit, match=r"needs Optuna: pip install 'consistency\[sweep\]'"):
        search(lr)


def test_one_search_at_a_time(search):
    search.folder.mkdir()
    with locked(search.folder / "search"), pytest.raises(SystemExit, match="this search is going on already"):
        search(lr)


def composed(*overrides):
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        return compose("train", ["experiment=digits_ict", *overrides], return_hydra_config=True)


@pytest.mark.parametrize("name", sorted(file.stem for file in (config.EXPERIMENTS_DIR / "sweep").glob("*.yaml")))
@pytest.mark.parametrize("batch", [64, 96])
def test_files_compare_runs_after_as_many_images(name, batch):
    cfg = composed(f"sweep={name}", f"data.batch_size={batch}", "images=6400", "variant=trial000")
    assert cfg.trainer.max_steps == math.ceil(6400 / batch)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert cfg.run_name.startswith("trial000-")
    params = cfg.hydra.sweeper.params
    assert all(OmegaConf.select(cfg, key) is not None for key in params)
    space_of(*(f"{key}={text}" for key, text in params.items()))


def test_file_of_the_search_starts_this_sweeper():
    settings = composed("sweep=search_digits").hydra.sweeper
    assert settings["_target_"] == "hydra_plugins.consistency.SearchSweeper"
    assert composed("hydra/sweeper=search").hydra.sweeper["_target_"] == settings["_target_"]
    sweeper = instantiate(settings)  # as Hydra does
    assert (sweeper.n_trials, sweeper.sampler.seed, sweeper.pruner.n_startup_trials) == (24, 0, 4)


def test_a_run_builds_its_pruner_and_is_named_without_it(search):
    cfg = composed("sweep=search_digits")
    search(lr, pruner=cfg.hydra.sweeper.pruner, n_trials=1, direction="maximize", config={"objective": "it's"})
    prune = [entry for entry in search.jobs[0] if entry.startswith("+callbacks.prune.")]
    of_run = composed(*prune, "paths.output_dir=unused")
    callback = instantiate(of_run.callbacks.prune, _convert_="object")
    assert isinstance(callback, PruneTrial)
    assert isinstance(callback.pruner, optuna.pruners.MedianPruner)
    assert (callback.direction, callback.objective) == ("maximize", "it's")
    assert list(of_run.callbacks)[-1] == "prune"  # after the scores
    given = ["variant=trial000", "optimizer.lr=0.1"]
    assert config.run_name({}, given) == config.run_name({}, [*given, *prune])


def test_steps_for():
    assert [config.steps_for(images, 128) for images in (1, 128, 129, 25600)] == [1, 1, 2, 200]
    for wrong in ((0, 8), (100, 0), (2.5, 8), ("100", 8)):
        with pytest.raises(ValueError, match=r"consistency.steps:IMAGES,BATCH.* takes two positive integers"):
            config.steps_for(*wrong)
