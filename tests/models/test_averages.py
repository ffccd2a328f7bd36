import pytest
import torch
from torch import nn
from torch.testing import assert_close

from consistency.models.averages import ema_update_, frozen_copy


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9999])
def test_moves_by_one_minus_decay(decay):
    averages, values = [torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)]
    expected = [decay * a.double() + (1 - decay) * v.double() for a, v in zip(averages, values, strict=True)]
    kept = [value.clone() for value in values]
    ema_update_(averages, values, decay)
    for average, value, old, wanted in zip(averages, values, kept, expected, strict=True):
        assert_close(average, wanted.float())
        assert torch.equal(value, old)


def test_decay_zero_copies():
    averages, values = [torch.randn(100)], [torch.randn(100)]
    ema_update_(averages, values, 0.0)
    assert torch.equal(averages[0], values[0])


def test_constant_values_are_approached_geometrically():
    average = [torch.zeros(1, dtype=torch.float64)]
    for _ in range(10):
        ema_update_(average, [torch.ones(1, dtype=torch.float64)], 0.9)
    assert float(average[0]) == pytest.approx(1 - 0.9**10, rel=1e-12)


def test_updates_parameters_of_modules_without_a_graph():
    online = nn.Linear(2, 2)
    target = frozen_copy(online)
    with torch.no_grad():
        online.weight.add_(1)
    ema_update_(target.parameters(), online.parameters(), 0.5)
    assert_close(target.weight, online.weight - 0.5)
    assert not target.weight.requires_grad
    assert online.weight.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_frozen_copy(training):
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train(training)
    copy = frozen_copy(module)
    assert torch.equal(copy[0].weight, module[0].weight)
    assert copy[0].weight.data_ptr() != module[0].weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert copy.training == copy[1].training == training
