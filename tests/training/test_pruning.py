"""Trials that report and stop, against a real Optuna journal."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from consistency.training.pruning import PruneTrial
from consistency.training.quality import QualityCallback
from consistency.training.triggers import EveryNImages

optuna = pytest.importorskip("optuna")


class Scores(QualityCallback):
    """Scores of a list, in place of samples that are measured."""

    names = ("fd", "other")

    def __init__(self, scores, every_n_images=8):
        self.scores, self.every_n_images, self.last = list(scores), every_n_images, {}
        self._rhythm, self.dirpath = EveryNImages(every_n_images), Path("nowhere")

    def prepare(self, data):
        pass

    def setup(self, trainer, pl_module, stage):
        pass

    def measure(self, trainer, pl_module):
        self.last = {"fd": self.scores.pop(0), "other": 0.0}
        self._rhythm.mark(pl_module.progress)

    def state_dict(self):
        return {}


@pytest.fixture
def study(tmp_path):
    """A study with one trial that has begun."""
    journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "search.journal"))
    study = optuna.create_study(study_name="s", storage=optuna.storages.JournalStorage(journal))
    study.ask()
    return study


@pytest.fixture
def prune(tmp_path):
    def make(trial=0, pruner=None, **options):
        path = str(tmp_path / options.pop("storage", "search.journal"))
        return PruneTrial(path, "s", trial, pruner or optuna.pruners.ThresholdPruner(upper=10), **options)

    return make


def test_scores_are_reported_at_the_images_when_they_were_due(make_method, train, study, prune):
    callback, method = prune(), make_method()
    train(method, steps=7, batch_size=3, callbacks=[Scores([5.0, 4.0, 3.0]), callback])  # measured at 9, 18, 21
    assert study.trials[0].intermediate_values == {8: 5.0, 16: 4.0}
    assert method.progress.is_over
    assert not callback.pruned


def test_a_bad_run_stops(make_method, train, study, prune):
    callback, method = prune(), make_method()
    train(method, steps=8, callbacks=[Scores([5.0, 11.0, 3.0]), callback])
    assert callback.pruned
    assert method.progress.images_seen == 16
    callback.tell(None)
    [trial] = study.trials
    assert (trial.state.name, trial.value, trial.intermediate_values) == ("PRUNED", 11.0, {8: 5.0, 16: 11.0})


def test_another_objective(make_method, train, study, prune):
    train(make_method(), steps=2, callbacks=[Scores([50.0]), prune(objective="other")])
    assert study.trials[0].intermediate_values == {8: 0.0}


def test_nothing_is_stopped_at_its_end(make_method, train, study, prune):
    callback = prune()
    train(make_method(), steps=4, callbacks=[Scores([1.0, 11.0]), callback])
    assert not callback.pruned
    callback.tell(11.0)
    assert (study.trials[0].state.name, study.trials[0].value) == ("COMPLETE", 11.0)


def test_the_median_of_trials_that_said_they_are_done(make_method, train, study, prune):
    """Other runs know of one that has ended before the sweeper does, and batches may differ."""
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    for number, scores in enumerate([(9.0, 4.0), (7.0, 3.0)]):
        callback = prune(number, pruner)
        train(make_method(), steps=4, callbacks=[Scores(scores), callback])
        callback.tell(scores[-1])
        study.ask()
    good, bad = prune(2, pruner), prune(3, pruner)
    study.ask()
    train(make_method(), steps=6, batch_size=3, callbacks=[Scores([7.9, 2.0, 2.0]), good])
    assert not good.pruned
    train(make_method(), steps=6, batch_size=3, callbacks=[Scores([8.1, 2.0, 2.0]), bad])
    assert bad.pruned


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_is_no_objective_is_left_to_the_sweeper(make_method, train, study, prune, value):
    callback = prune()
    train(make_method(), steps=1, callbacks=[Scores([1.0]), callback])
    callback.tell(value)
    assert study.trials[0].state.name == "RUNNING"


def test_killed_after_the_report(make_method, train, study, prune):
    """The run was killed before it stopped: it comes to the same point again, and to the same decision."""
    study._storage.set_trial_intermediate_value(study.trials[0]._trial_id, 8, 11.0)
    callback, method = prune(), make_method()
    train(method, steps=8, callbacks=[Scores([11.5, 3.0]), callback])
    assert callback.pruned
    assert study.trials[0].intermediate_values == {8: 11.0}


def test_scores_of_a_checkpoint_are_no_news(make_method, train, study, prune):
    scores = Scores([1.0])
    scores.last = {"fd": 99.0}
    train(make_method(), steps=2, callbacks=[scores, prune()])
    assert study.trials[0].intermediate_values == {8: 1.0}


def test_a_trial_that_was_told_already(make_method, train, study, prune):
    study.tell(0, 1.0)
    callback, method = prune(), make_method()
    train(method, steps=4, callbacks=[Scores([50.0, 60.0]), callback])
    callback.tell(60.0)
    assert method.progress.is_over
    assert (study.trials[0].value, study.trials[0].intermediate_values) == (1.0, {})


def test_a_lost_disk_does_not_end_the_run(make_method, train, study, prune, monkeypatch, caplog):
    def lost(*args):
        raise OSError("Stale file handle")

    monkeypatch.setattr(optuna.storages.JournalStorage, "set_trial_intermediate_value", lost)
    callback, method = prune(), make_method()
    train(method, steps=2, callbacks=[Scores([50.0]), callback])
    assert method.progress.is_over
    assert "the search was not told of the score after 8 images: Stale file handle" in caplog.text


@pytest.mark.parametrize(("is_first", "decision"), [(True, True), (False, True), (False, False)])
def test_the_first_rank_decides_for_all(study, prune, is_first, decision):
    """The other ranks never open the search."""
    asked = []

    def reduce(mine, all):
        asked.append((mine, all))
        return mine or decision

    callback, scores = prune(), Scores([50.0])
    trainer = SimpleNamespace(callbacks=[scores], is_global_zero=is_first, should_stop=False)
    trainer.strategy = SimpleNamespace(reduce_boolean_decision=reduce)
    method = SimpleNamespace(progress=SimpleNamespace(images_seen=8, is_over=False))
    callback.setup(trainer, method, "fit")
    callback.on_fit_start(trainer, method)
    callback.on_train_start(trainer, method)
    callback.on_train_batch_end(trainer, method, None, None, 0)
    scores.measure(trainer, method)
    callback.on_train_batch_end(trainer, method, None, None, 1)
    assert asked == [(is_first, False)]
    assert trainer.should_stop == callback.pruned == decision
    callback.tell(None)
    assert study.trials[0].state.name == ("PRUNED" if is_first else "RUNNING")


@pytest.mark.parametrize(
    ("scores", "options", "words"),
    [
        (None, {}, "callbacks.prune needs scores while the model trains"),
        (Scores([], every_n_images=0), {}, "callbacks.quality.every_n_images=N"),
        (Scores([]), {"objective": "loss"}, "cannot judge by objective=loss; allowed: fd, other"),
        (Scores([]), {"trial": 7}, "has no trial 7 of s"),
        (Scores([]), {"storage": "gone"}, "gone, which is not there"),
    ],
)
def test_refused_before_training(make_method, train, study, prune, tmp_path, scores, options, words):
    method = make_method()
    with pytest.raises(ValueError, match=words):
        train(method, callbacks=[callback for callback in (scores, prune(**options)) if callback is not None])
    assert method.progress.step == 0
    assert not (tmp_path / "gone").exists()
