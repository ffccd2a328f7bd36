import json
import signal
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from consistency.data.arrays import ImageArray
from consistency.data.module import ImageDataModule
from consistency.evaluation.extractors import Extractor
from consistency.evaluation.protocol import Evaluation
from consistency.methods.metrics import l2
from consistency.methods.training import ConsistencyTraining
from consistency.noise.curricula import FixedLevels
from consistency.noise.levels import GridPairs, uniform_index
from consistency.noise.weightings import uniform
from consistency.sampling.samplers import ConsistencySampler
from consistency.training.averaging import WeightEMA
from consistency.training.checkpointing import RunCheckpoint
from consistency.training.quality import QualityCallback
from consistency.training.required import StepSeeds, StopAtStep


class Means(Extractor):
    """Row and column means of an image."""

    name, prefix, dim, num_logits, digest = "classifier", "fd_classifier", 8, 2, "0123456789abcdef"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255), requires_grad=False)
        self.devices = []

    def forward(self, images):
        x = images.float() * self.scale
        features = torch.cat([x.mean(dim=(1, 2)), x.mean(dim=(1, 3))], dim=1)
        return features, features[:, :2]


@pytest.fixture
def parts(make_denoiser, tmp_path):
    """Everything for a run of a few steps; `build(**options)` gives (method, data, callback)."""

    def build(num_samples=24, every_n_images=0, samplers=None, **options):
        method = ConsistencyTraining(
            make_denoiser(),
            levels=GridPairs(FixedLevels(5), uniform_index),
            metric=l2,
            weighting=uniform,
            optimizer=partial(torch.optim.Adam, lr=1e-2),
        )
        images = torch.randint(0, 256, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        data = ImageDataModule(
            ImageArray(images, torch.zeros(40, dtype=torch.int64)), batch_size=4, seed=0, image_size=4, channels=1
        )
        evaluation = Evaluation(
            lambda data, **_: Means(), num_samples, str(tmp_path / "cache"), batch_size=8, allow_few=True, **options
        )
        samplers = samplers or {"onestep": ConsistencySampler(), "twostep": ConsistencySampler([1.0])}
        callback = QualityCallback(evaluation, samplers, dirpath=str(tmp_path), every_n_images=every_n_images)
        return method, data, callback

    return build


def train(method, data, callbacks, tmp_path, steps=4, ckpt=None, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=-1,
        max_epochs=-1,
        callbacks=[StepSeeds(0), StopAtStep(steps), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(method, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return trainer


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "quality.jsonl").read_text().splitlines()]


def test_measures_when_due_and_at_the_end(parts, tmp_path):
    method, data, quality = parts(every_n_images=8)
    trainer = train(method, data, [quality], tmp_path, steps=5)
    found = rows(tmp_path)
    assert [row["images_seen"] for row in found] == [8, 8, 16, 16, 20, 20]
    assert [row["nfe"] for row in found[:2]] == [1, 2]
    assert found[1]["levels"] == [80.0, 1.0]
    names = {"sampler", "levels", "nfe", "weights", "seed", "num_samples", "reference", "reference_digest", "extractor"}
    assert names <= set(found[0])
    assert set(trainer.callback_metrics) == {"fd_classifier_onestep", "fd_classifier_twostep"}
    assert float(trainer.callback_metrics["fd_classifier_onestep"]) == pytest.approx(found[-2]["fd_classifier"])


def test_training_does_not_notice(parts, tmp_path):
    weights = []
    for measured in (False, True):
        torch.manual_seed(0)
        method, data, quality = parts(every_n_images=4)
        train(method, data, [quality] if measured else [], tmp_path)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in method.denoiser.parameters()]))
    assert torch.equal(*weights)
    assert method.denoiser.training


def test_samples_come_from_the_average(parts, tmp_path):
    method, data, quality = parts()
    average = WeightEMA([0.5])
    train(method, data, [average, quality], tmp_path)
    assert {row["weights"] for row in rows(tmp_path)} == {"ema0.5"}
    extractor, reference = quality._prepared
    with average.applied(method):
        expected = quality.evaluation.measure_sampler(
            method.denoiser.eval(), ConsistencySampler(), extractor, reference, seed=quality.seed
        )
    assert rows(tmp_path)[0]["fd_classifier"] == pytest.approx(expected["fd_classifier"], rel=1e-12)
    raw = quality.evaluation.measure_sampler(
        method.denoiser.eval(), ConsistencySampler(), extractor, reference, seed=quality.seed
    )
    assert raw["fd_classifier"] != pytest.approx(expected["fd_classifier"], rel=1e-6)


@pytest.mark.parametrize("before", [True, False])
def test_best_checkpoint_in_any_order_of_callbacks(parts, tmp_path, before):
    method, data, quality = parts(every_n_images=4)
    best = ModelCheckpoint(
        dirpath=tmp_path / "best", monitor="fd_classifier_onestep", every_n_train_steps=1, save_top_k=1
    )
    callbacks = [best, quality] if before else [quality, best]
    train(method, data, callbacks, tmp_path, steps=6, enable_checkpointing=True)
    scores = [row["fd_classifier"] for row in rows(tmp_path)[::2]]
    assert float(best.best_model_score) == pytest.approx(min(scores), rel=1e-5)
    assert quality.best["fd_classifier_onestep"]["value"] == min(scores)
    assert quality.best["fd_classifier_onestep"]["step"] == 1 + scores.index(min(scores))


def test_unknown_monitor_is_refused_at_the_start(parts, tmp_path):
    method, data, quality = parts()
    with pytest.raises(ValueError, match=r"monitors fid50k, which nothing logs; allowed: fd_.*, loss"):
        train(method, data, [quality, ModelCheckpoint(monitor="fid50k")], tmp_path, enable_checkpointing=True)
    assert method.progress.step == 0


def test_best_survives(parts):
    _, _, quality = parts()
    quality.best = {"fd_classifier_onestep": {"value": 1.0, "step": 3, "images_seen": 12}}
    _, _, again = parts()
    again.load_state_dict(quality.state_dict())
    assert again.best == quality.best


def test_what_is_missing_is_said_before_training(parts, tmp_path):
    method, data, quality = parts(metrics=["kd"])
    with pytest.raises(ValueError, match="subsets of 1000"):
        train(method, data, [quality], tmp_path)
    assert method.progress.step == 0


def test_refuses_negative_intervals(parts):
    with pytest.raises(ValueError, match="every_n_images"):
        parts(every_n_images=-1)


class StopIn(ConsistencySampler):
    """The signal comes while this measurement is made."""

    def __init__(self, call, mid_sigmas=()):
        super().__init__(mid_sigmas)
        self.call, self.calls = call, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.call:
            signal.raise_signal(signal.SIGTERM)
        return super().__call__(*args, **kwargs)


# 24 samples in batches of 8: call 5 is in the measurement after 16 images, call 8 in that of the end.
@pytest.mark.parametrize(("call", "step"), [(5, 4), (8, 5)], ids=["half way", "at the end"])
def test_signal_in_a_measurement(parts, tmp_path, call, step):
    """It is given up at once, with a checkpoint of this very step, and made up for: the rows are a straight run's."""
    method, data, quality = parts(every_n_images=8, samplers={"onestep": ConsistencySampler()})
    start = {key: value.clone() for key, value in method.state_dict().items() if isinstance(value, torch.Tensor)}
    train(method, data, [WeightEMA([0.9]), quality], tmp_path, steps=5)
    straight = rows(tmp_path)
    assert [row["step"] for row in straight] == [2, 4, 5]
    (tmp_path / "quality.jsonl").unlink()

    def again(sampler, ckpt=None):
        method, data, quality = parts(every_n_images=8, samplers={"onestep": sampler})
        method.load_state_dict(start, strict=False)
        saver = RunCheckpoint(str(tmp_path / "checkpoints"))
        callbacks = [WeightEMA([0.9]), quality, saver]
        train(method, data, callbacks, tmp_path, steps=5, ckpt=ckpt, enable_checkpointing=True)
        return saver, method, sampler

    saver, method, sampler = again(StopIn(call))
    assert sampler.calls == call  # not a batch more
    assert saver.interrupted_by == signal.SIGTERM
    assert method.progress.step == step
    stored = torch.load(saver.path, weights_only=True)["state_dict"]
    assert stored["progress._extra_state"]["step"] == step
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 5][: call // 3]
    saver, method, _ = again(ConsistencySampler(), saver.path)
    assert saver.interrupted_by is None
    times = ("seconds",)
    assert [{k: v for k, v in row.items() if k not in times and k != "sampler"} for row in rows(tmp_path)] == [
        {k: v for k, v in row.items() if k not in times and k != "sampler"} for row in straight
    ]


def test_rows_of_steps_that_come_again_are_dropped(parts, tmp_path):
    """SIGKILL after a measurement, before the next checkpoint."""
    method, data, quality = parts(every_n_images=8)
    saver = RunCheckpoint(str(tmp_path / "checkpoints"), every_n_steps=3)
    train(method, data, [quality, saver], tmp_path, steps=3, enable_checkpointing=True)
    before = (tmp_path / "quality.jsonl").read_text()
    torn = json.dumps({**rows(tmp_path)[0], "images_seen": 16}) + "\n" + '{"images_seen": 20, "fd'
    (tmp_path / "quality.jsonl").write_text(before + torn)
    method, data, quality = parts(every_n_images=8)
    train(method, data, [quality], tmp_path, steps=3, ckpt=saver.path)
    assert (tmp_path / "quality.jsonl").read_text() == before
