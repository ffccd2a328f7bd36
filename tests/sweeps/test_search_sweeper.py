"""Searches, with a function in place of the trainings; tests/callbacks/test_pruning.py stops real ones."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.utils import instantiate
from omegaconf import OmegaConf

from consistency import config
from consistency.commands.folder import status_of
from consistency.commands.start import start
from consistency.commands.train import train
from consistency.evaluation.extractors import Extractor
from consistency.io.run_dir import locked
from consistency.sweeps.search import SearchSweeper
from consistency.sweeps.space import read_space
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


class Search:
    """A folder with one; each call is the command once more; `run(job)` is a training, and returns its objective."""

    def __init__(self, folder):
        self.folder, self.batches = folder, []

    def __call__(self, run, *arguments, config=None, launcher=None, **settings):
        self.batches = []

        def launch(jobs, initial_job_idx):
            self.batches.append([list(job) for job in jobs])
            return [self._result(run, job) for job in jobs]

        settings = {"n_trials": 6, "sampler": RANDOM, "pruner": None, "params": RANGES, **settings}
        for part in ("sampler", "pruner"):
            settings[part] = settings[part] and OmegaConf.create(settings[part])
        sweeper = SearchSweeper(**settings)
        sweeper.hydra_context = SimpleNamespace(config_loader=None)
        quality = {"callbacks": {"quality": {"every_n_images": 100}}}
        hydra = {"hydra": {"sweep": {"dir": str(self.folder)}}, "study_name": "s", "trainer": {"accelerator": "cpu"}}
        sweeper.config = OmegaConf.create({**hydra, **quality, **(config or {})})
        sweeper.launcher = SimpleNamespace(launch=launch, **(launcher or {}))
        return sweeper.sweep(list(arguments))

    def _result(self, run, job):
        name = next(entry for entry in job if entry.startswith("variant=")).removeprefix("variant=")
        run_dir = self.folder / name
        run_dir.mkdir(exist_ok=True)
        result = JobReturn(overrides=job, working_dir=str(run_dir), status=JobStatus.COMPLETED)
        try:
            outcome = run(job)
            status = outcome if isinstance(outcome, dict) else {"state": "finished", "objective": outcome}
            result.return_value = status.get("objective")
        except Exception as error:
            result.status, result.return_value = JobStatus.FAILED, error
            status = {"state": "failed", "error": str(error), "diverged": isinstance(error, FloatingPointError)}
        (run_dir / "status.json").write_text(json.dumps({"objective_name": "score", **status}))
        return result

    @property
    def jobs(self):
        return [job for batch in self.batches for job in batch]

    @property
    def trials(self):
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(self.folder / "search.journal"))
        )
        return optuna.load_study(study_name="s", storage=storage).trials

    @property
    def states(self):
        return [trial.state.name for trial in self.trials]

    @property
    def summary(self):
        return json.loads((self.folder / "search.json").read_text())


@pytest.fixture
def search(tmp_path):
    return Search(tmp_path / "study")


def lr(job):
    return values(job)["lr"]


def space_of(*overrides):
    return read_space(OverridesParser.create().parse_overrides(list(overrides)))


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
        _, space = space_of(f"x={text}")
        new = space["x"]
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
        assert space_of(f"x={text}")[1]["x"].choices == choices

    def test_of_one_name_the_last_wins(self):
        fixed, space = space_of("a=1,2", "b=interval(0,1)", "c=1", "a=7", "c=interval(0,1)")
        assert fixed == ["a=7"]
        assert set(space) == {"b", "c"}

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
    search(lr, "batch=32", "start=range(20,22)", n_trials=8)
    assert all("batch=32" in job for job in search.jobs)
    assert {values(job)["start"] for job in search.jobs} == {20, 21}


def test_best_and_summary(search, caplog):
    caplog.set_level("INFO")
    best = search(lr, "experiment=e", "logger=wandb")
    assert best == min(lr(job) for job in search.jobs)
    summary = search.summary
    assert [row["objective"] for row in summary["trials"]] == sorted(lr(job) for job in search.jobs)
    assert summary["best"] == summary["trials"][0]
    assert (summary["objective"], summary["direction"]) == ("score", "minimize")
    name = summary["best"]["trial"]
    [job] = [job for job in search.jobs if f"variant={name}" in job]
    assert set(summary["best"]["overrides"]) < set(job)
    assert " ".join(summary["best"]["overrides"]) in caplog.text
    assert set(json.loads((search.folder / "study.json").read_text())["runs"]) == {f"trial{n:03d}" for n in range(6)}
    assert summary["best"]["run"] == name


def test_maximize(search):
    assert search(lr, direction="maximize") == max(lr(job) for job in search.jobs)


def test_complete_search_runs_nothing(search, caplog):
    best = search(lr)
    caplog.set_level("INFO")
    caplog.clear()
    assert search(lr) == best
    assert search.batches == []
    assert "6 trials (6 finished)" in caplog.text
    assert "best: trial" in caplog.text


def test_more_trials_are_new_ones(search, tmp_path):
    search(lr, n_trials=4)
    first = [lr(job) for job in search.jobs]
    search(lr, n_trials=9)
    more = [lr(job) for job in search.jobs]
    assert len(more) == 5
    assert len({*first, *more}) == 9
    straight = Search(tmp_path / "straight")
    straight(lr, n_trials=9)
    assert [lr(job) for job in straight.jobs] == first + more


def test_killed_search_goes_on(search, tmp_path):
    done = []

    def killed(job):
        if len(done) == 3:
            raise SystemExit(143)  # as the launcher does
        done.append(job)
        return lr(job)

    with pytest.raises(SystemExit):
        search(killed, "experiment=e")
    asked = search.jobs
    assert search.states == ["RUNNING"] * 6
    search(lr, "experiment=e")
    assert search.jobs == asked  # the same runs: what is finished returns at once
    assert search.states == ["COMPLETE"] * 6


def test_killed_while_a_trial_was_asked_for(search):
    search(lr, n_trials=2)
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(search.folder / "search.journal"))
    )
    optuna.load_study(study_name="s", storage=storage).ask()
    search(lr, n_trials=3)
    assert [job[0] for job in search.jobs] == ["variant=trial003"]
    assert search.states == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]


def test_neutral_settings_of_resumed_trials_are_those_of_today(search):
    def killed(job):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(killed, "experiment=e", "logger=wandb", "paths.data_dir=old")
    before = search.jobs
    search(lr, "experiment=e", "paths.data_dir=new")
    for old, new in zip(before, search.jobs, strict=True):
        kept = [entry for entry in old if entry not in ("logger=wandb", "paths.data_dir=old")]
        assert new == [*kept, "paths.data_dir=new"]


def test_failed_trials_are_named_and_tried_again(search, caplog):
    def broken(job):
        if values(job)["variant"] in ("trial001", "trial004"):
            raise RuntimeError("no space left")
        return lr(job)

    with pytest.raises(SystemExit) as caught:
        search(broken)
    assert caught.value.code == 1
    assert "failed: trial001: no space left" in caplog.text
    assert search.states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert [row["error"] for row in search.summary["trials"]] == [None] * 4 + ["no space left"] * 2
    before = search.jobs
    search(lr)
    assert search.jobs == [before[1], before[4]]  # the same runs, so that they go on from their checkpoints
    assert [row["state"] for row in search.summary["trials"]] == ["finished"] * 6
    search(lr)
    assert search.jobs == []


def test_a_trial_without_an_objective_fails(search):
    with pytest.raises(SystemExit):
        search(lambda job: None, n_trials=1)
    assert search.states == ["FAIL"]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_diverged_trials_are_the_worst(search, direction):
    def diverges(job):
        name = values(job)["variant"]
        if name == "trial000":
            raise FloatingPointError("the loss is nan")
        return math.nan if name == "trial001" else lr(job)

    search(diverges, direction=direction)
    worst = math.inf if direction == "minimize" else -math.inf
    assert [trial.value for trial in search.trials[:2]] == [worst, worst]
    assert search.states == ["COMPLETE"] * 6
    rows = search.summary["trials"]
    assert [row["state"] for row in rows] == ["finished"] * 4 + ["diverged"] * 2
    search(lr, direction=direction)
    assert search.jobs == []


def test_all_diverged(search, caplog):
    caplog.set_level("INFO")
    assert search(lambda job: math.inf) is None
    assert "no trial has finished" in caplog.text


def test_a_pruned_run_that_could_not_tell(search):
    search(lambda job: {"state": "pruned", "objective": 5.0} if "trial002" in job[0] else lr(job))
    assert search.states == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_what_a_run_told_itself_stays(search):
    def tells(job):
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(search.folder / "search.journal"))
        )
        optuna.load_study(study_name="s", storage=storage).tell(int(job[0][-3:]), 7.0)
        return 7.0

    assert search(tells) == 7.0
    assert search.states == ["COMPLETE"] * 6


class TestBatches:
    def test_a_sampler_that_learns_is_asked_for_one_a_slot(self, search):
        search(lr, sampler=TPE, n_trials=7, launcher={"slots": 3, "gpus": 1, "threads": 1})
        assert [len(batch) for batch in search.batches] == [3, 3, 1]

    def test_of_a_given_size(self, search):
        search(lr, batch=4)
        assert [len(batch) for batch in search.batches] == [4, 2]

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
        search(lr, n_trials=12, params={**RANGES, "lr": "tag(log,interval(1e-2,1))"})
        assert all(lr(job) >= 1e-2 for job in search.jobs)
        assert len(search.jobs) == 6

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("batch", "choice(64,256)", r"batch was searched in choice\(64,128\), now in choice\(64,256\)"),
            ("batch", "interval(0,1)", r"batch was searched in choice\(64,128\), now in interval\(0.0,1.0\)"),
            ("lr", "interval(1e-5,1e-1)", r"lr was searched in tag\(log,interval\(1e-05,0.1\)\), now in interval"),
            ("start", "interval(2,9)", r"start was searched in int\(interval\(2,9\)\), now in interval\(2.0,9.0\)"),
        ],
    )
    def test_other_choices_or_kinds_is_refused(self, search, name, text, words):
        search(lr)
        with pytest.raises(SystemExit, match=rf"{words}.*study_name=NAME"):
            search(lr, params={**RANGES, name: text})
        assert search.jobs == []

    def test_a_parameter_more_or_less(self, search):
        search(lr, "seed=0")
        search(lr, "batch=64", "more=interval(0,1)", n_trials=8)
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
        with pytest.raises(SystemExit, match="direction=minimize, not maximize"):
            search(lr, direction="maximize")

    def test_a_renamed_folder(self, search):
        search(lr)
        search(lr, config={"study_name": "renamed"})
        assert search.jobs == []

    def test_a_line_that_was_not_written_to_its_end(self, search):
        search(lr, n_trials=3)
        with (search.folder / "search.journal").open("a") as journal:
            journal.write('{"op_code":')
        search(lr)
        assert search.states == ["COMPLETE"] * 6


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


def test_runs_get_their_pruner(search):
    pruner = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 4, "interval_steps": 1}
    search(lr, pruner=pruner, n_trials=2, config={"objective": "it's"})
    overrides = OverridesParser.create().parse_overrides(search.jobs[1])
    [prune] = [override for override in overrides if override.key_or_group == "callbacks.prune"]
    assert prune.is_add()
    assert prune.value() == {
        "_target_": "consistency.training.pruning.PruneTrial",
        "storage": str(search.folder / "search.journal"),
        "study": "s",
        "trial": 1,
        "pruner": pruner,
        "objective": "it's",
    }


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
    search(lr, pruner=cfg.hydra.sweeper.pruner, n_trials=1)
    prune = search.jobs[0][-1]
    of_run = composed(prune, "paths.output_dir=unused")
    callback = instantiate(of_run.callbacks.prune, _convert_="object")
    assert isinstance(callback, PruneTrial)
    assert isinstance(callback.pruner, optuna.pruners.MedianPruner)
    assert list(of_run.callbacks)[-1] == "prune"  # after the scores
    given = ["variant=trial000", "optimizer.lr=0.1"]
    assert config.run_name({}, given) == config.run_name({}, [*given, prune])


def test_steps_for():
    assert [config.steps_for(images, 128) for images in (1, 128, 129, 25600)] == [1, 1, 2, 200]
    for wrong in ((0, 8), (100, 0), (2.5, 8), ("100", 8)):
        with pytest.raises(ValueError, match=r"consistency.steps:IMAGES,BATCH.* takes two positive integers"):
            config.steps_for(*wrong)


class Means(Extractor):
    """Row and column means of an image: nothing to train."""

    name, prefix, dim, num_logits, digest = "classifier", "fd_classifier", 16, 2, "0123456789abcdef"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255), requires_grad=False)

    def forward(self, images):
        x = images.float() * self.scale
        features = torch.cat([x.mean(dim=(1, 2)), x.mean(dim=(1, 3))], dim=1)
        return features, features[:, :2]


@pytest.mark.parametrize("upper", [0, 1e9])
def test_a_run_that_is_pruned_and_one_that_is_not(search, tmp_path, monkeypatch, upper):
    """A real run, without the sweeper: it reports, stops or not, and says itself how it ended."""
    monkeypatch.setattr("consistency.evaluation.protocol.classifier", lambda data, **_: Means())
    pruner = {"_target_": "optuna.pruners.ThresholdPruner", "upper": upper}
    with pytest.raises(KeyboardInterrupt):
        search(lambda job: (_ for _ in ()).throw(KeyboardInterrupt), pruner=pruner)
    settings = ["evaluation.num_samples=64", "trainer.max_steps=24", "network.channels=8", "data.batch_size=16"]
    settings += ["callbacks.quality.every_n_images=128", "callbacks.sample_grid=null", "callbacks.progress=null"]
    folders = [f"paths.output_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    cfg = composed(*settings, *folders, search.jobs[2][-1], "run_name=trial002")
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]

    objective = start(cfg, lambda: train(cfg))
    status, trial = status_of(tmp_path / "run"), search.trials[2]
    is_pruned = upper == 0
    assert status["state"] == ("pruned" if is_pruned else "finished")
    assert trial.state.name == ("PRUNED" if is_pruned else "COMPLETE")
    assert list(trial.intermediate_values) == ([128] if is_pruned else [128, 256, 384])
    assert status["images_seen"] == (128 if is_pruned else 384)
    assert objective == status["objective"] == trial.value > 0
    assert status["objective_name"] == "fd_classifier_onestep"
    assert (tmp_path / "run" / "model").exists() != is_pruned
    assert start(cfg, lambda: pytest.fail("it is done already")) == objective
