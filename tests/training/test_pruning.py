"""Runs of a search that measure and stop; what the runs beside them measured lies in files."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from consistency.training.pruning import PruneTrial
from consistency.training.quality import QualityCallback
from consistency.training.triggers import EveryNImages

optuna = pytest.importorskip("optuna")
UPPER = optuna.pruners.ThresholdPruner(upper=10)


class Scores(QualityCallback):
    """Scores of a list, in place of samples that are measured; the last one stays."""

    names = ("fd_onestep", "other_onestep")

    def __init__(self, dirpath, scores, every_n_images=8):
        self.scores, self.every_n_images, self.last = list(scores), every_n_images, {}
        self._trigger, self.dirpath = EveryNImages(every_n_images), Path(dirpath)

    def prepare(self, data):
        pass

    def setup(self, trainer, pl_module, stage):
        pass

    def measure(self, trainer, pl_module):
        score = self.scores.pop(0) if len(self.scores) > 1 else self.scores[0]
        self.last = {"fd_onestep": score, "other_onestep": 0.0}
        self._trigger.mark(pl_module.progress)
        write(self.dirpath, {pl_module.progress.images_seen: self.last["fd_onestep"]})

    def state_dict(self):
        return {}


def write(run_dir, scores, **status):
    """What a run leaves: its scores, and its status if it has ended."""
    run_dir.mkdir(exist_ok=True)
    with (run_dir / "quality.jsonl").open("a") as file:
        for images, score in scores.items():
            row = {"name": "onestep", "images_seen": images, "fd": score, "other": 0.0}
            file.write(json.dumps(row) + "\n")
    if status:
        (run_dir / "status.json").write_text(json.dumps(status))


@pytest.fixture
def run(make_method, train, tmp_path):
    """Train one run of a search, `trial000` if not said otherwise, with scores of a list."""

    def run(scores, *, pruner=UPPER, name="trial000-abc", steps=8, batch_size=4, before=(), **options):
        quality, method = Scores(tmp_path / name, scores), make_method()
        quality.last = dict(before)
        prune = PruneTrial("s", pruner, **options)
        train(method, steps=steps, batch_size=batch_size, callbacks=[quality, prune])
        return SimpleNamespace(pruned=prune.pruned, images_seen=method.progress.images_seen)

    return run


def test_a_bad_run_stops_and_a_good_one_does_not(run):
    assert vars(run([5.0, 11.0, 3.0])) == {"pruned": True, "images_seen": 16}
    assert vars(run([5.0, 4.0, 3.0, 2.0], name="trial001-abc")) == {"pruned": False, "images_seen": 32}


def test_nothing_is_stopped_at_its_end(run):
    assert not run([1.0, 11.0], steps=4).pruned


def test_another_objective(run):
    assert not run([50.0], steps=3, objective="other_onestep").pruned


def test_a_search_for_the_greatest(run, tmp_path):
    write(tmp_path / "trial000-a", {8: 0.9}, state="finished", objective=0.9)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
    assert run([0.8], pruner=pruner, name="trial001-a", direction="maximize").pruned
    assert not run([0.8], pruner=pruner, name="trial002-a", steps=3).pruned


def test_the_median_of_runs_that_have_ended(run, tmp_path):
    """Batches may differ: scores count at the images when they were due. Runs that go on do not count."""
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    write(tmp_path / "trial000-a", {8: 9.0, 16: 4.0}, state="finished", objective=4.0)
    write(tmp_path / "trial002-a", {8: 1.0, 16: 1.0}, state="running")
    assert not run([100.0], pruner=pruner, name="trial003-a", steps=3).pruned  # only one has ended
    write(tmp_path / "trial001-a", {9: 7.0, 18: 3.0}, state="finished", objective=3.0)
    assert not run([7.9, 2.0], pruner=pruner, name="trial004-a", steps=6, batch_size=3).pruned
    assert run([8.1, 2.0], pruner=pruner, name="trial005-a", steps=6, batch_size=3).pruned


def test_a_pruner_that_promotes(run, tmp_path):
    """Successive halving remembers which runs came how far; it is asked again about the runs beside this one."""
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=8, reduction_factor=2)
    for number, score in enumerate((1.0, 2.0, 3.0)):
        write(tmp_path / f"trial{number:03d}-a", {8: score}, state="running")
    assert run([2.5], pruner=pruner, name="trial003-a", steps=4).pruned
    assert not run([1.5], pruner=pruner, name="trial004-a", steps=3).pruned


def test_scores_of_a_checkpoint_are_no_news(run):
    assert not run([1.0], steps=3, before={"fd_onestep": 99.0}).pruned


def test_what_cannot_be_read_does_not_end_the_run(run, tmp_path, caplog):
    (tmp_path / "trial000-a" / "quality.jsonl").mkdir(parents=True)
    assert not run([50.0], name="trial001-a", steps=3).pruned
    assert "the run goes on" in caplog.text


def test_a_row_that_is_just_being_written(run, tmp_path):
    write(tmp_path / "trial000-a", {8: 1.0}, state="finished", objective=1.0)
    with (tmp_path / "trial000-a/quality.jsonl").open("a") as file:
        file.write('{"name": "onest')
    assert run([2.0], pruner=optuna.pruners.MedianPruner(n_startup_trials=1), name="trial001-a").pruned


@pytest.mark.parametrize(("is_first", "decision"), [(True, True), (False, True), (False, False)])
def test_the_first_rank_decides_for_all(tmp_path, is_first, decision):
    def reduce(mine, all):
        assert mine == is_first
        return mine or decision

    prune, scores = PruneTrial("s", UPPER), Scores(tmp_path / "trial000", [50.0])
    trainer = SimpleNamespace(callbacks=[scores], is_global_zero=is_first, should_stop=False)
    trainer.strategy = SimpleNamespace(reduce_boolean_decision=reduce)
    method = SimpleNamespace(progress=SimpleNamespace(images_seen=8, is_over=False))
    prune.setup(trainer, method, "fit")
    prune.on_fit_start(trainer, method)
    scores.measure(trainer, method)
    prune.on_train_batch_end(trainer, method, None, None, 1)
    assert trainer.should_stop == prune.pruned == decision


@pytest.mark.parametrize(
    ("every_n_images", "objective", "words"),
    [
        (None, None, "callbacks.prune needs scores while the model trains"),
        (0, None, "callbacks.quality.every_n_images=N"),
        (8, "loss", "cannot judge by objective=loss; allowed: fd_onestep, other_onestep"),
    ],
)
def test_refused_before_training(tmp_path, every_n_images, objective, words):
    scores = [] if every_n_images is None else [Scores(tmp_path, [], every_n_images)]
    trainer = SimpleNamespace(callbacks=scores)
    with pytest.raises(ValueError, match=words):
        PruneTrial("s", UPPER, objective=objective).setup(trainer, None, "fit")
