from types import SimpleNamespace

import pytest
import torch

from consistency.noise.curricula import FixedDecay
from consistency.training.agreement import RankConsistencyCheck, check_ranks_agree
from consistency.training.averaging import TargetEMA, WeightEMA


def trainer_of(*rows):
    """All ranks' numbers, as the first would gather them."""
    gathered = torch.tensor(rows, dtype=torch.float64)
    strategy = SimpleNamespace(all_gather=lambda mine: gathered, root_device=torch.device("cpu"))
    return SimpleNamespace(world_size=len(rows), strategy=strategy)


def test_names_what_differs_and_where():
    nan = float("nan")
    check_ranks_agree(trainer_of([1.0, nan], [1.0, nan]), {"a": 1.0, "b": nan})
    check_ranks_agree(trainer_of([1.0], [1.0 + 1e-4]), {"a": 1.0}, tolerance=1e-3)
    with pytest.raises(RuntimeError, match="process 1 has another a"):
        check_ranks_agree(trainer_of([1.0], [1.0 + 1e-7]), {"a": 1.0})  # networks must be equal, not close
    with pytest.raises(RuntimeError, match=r"process 2 has another b \(2\.1\) than process 0 \(2\)"):
        check_ranks_agree(trainer_of([1.0, 2.0], [1.0, 2.0], [1.0, 2.1]), {"a": 1.0, "b": 2.0})


def test_one_process_gathers_nothing():
    check_ranks_agree(SimpleNamespace(world_size=1), {"a": 1.0})


@pytest.mark.parametrize("part", ["online network", "target network", "average ema0.9"])
def test_every_network_is_looked_at(make_method, train, monkeypatch, part):
    seen = []
    monkeypatch.setattr("consistency.training.agreement.check_ranks_agree", lambda _, numbers: seen.append(numbers))
    monkeypatch.setattr("lightning.Trainer.world_size", 2)
    method = make_method(target_decay=FixedDecay(0.5))
    train(
        method, steps=8, callbacks=[TargetEMA(), WeightEMA([0.9]), RankConsistencyCheck(every_n_steps=3)], batch_size=8
    )
    assert seen[0] == {"progress.step": 0, "progress.schedule_step": 0, "progress.images_seen": 0}
    assert len(seen) == 7  # at the start, and after steps 1, 2, 3, 4, 6, 8
    assert len({numbers[part] for numbers in seen[1:]}) == 6  # it moves
