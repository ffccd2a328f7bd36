import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from consistency.ops import append_dims, derive_seed, from_uint8, randn_of_seeds, same_randomness, to_uint8

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def test_append_dims():
    x = torch.arange(3)
    assert append_dims(x, 4).shape == (3, 1, 1, 1)
    assert append_dims(x, 1).shape == (3,)
    # [B] against [B, C, H, W] must not run along W.
    assert_close((append_dims(x, 4) * torch.ones(3, 1, 3, 3, dtype=torch.int64))[:, 0, 0, 0], x)


def test_append_dims_refuses_to_remove():
    with pytest.raises(ValueError, match="2"):
        append_dims(torch.zeros(2, 2), 1)


@pytest.mark.parametrize("device", DEVICES)
def test_same_randomness(device):
    x = torch.ones(1000, device=device)
    with same_randomness(x.device) as rewind:
        first, on_cpu = F.dropout(x, 0.5), torch.rand(3)
        rewind()
        assert torch.equal(F.dropout(x, 0.5), first)
        assert torch.equal(torch.rand(3), on_cpu)
        rewind()
        assert torch.equal(F.dropout(x, 0.5), first)
    assert not torch.equal(F.dropout(x, 0.5), first)


def test_derive_seed_is_fixed():
    # Seeds name published samples: they must be the same on every machine and in every version.
    assert derive_seed("image", 0, 1) == 9015170255517031653


def test_derive_seed_separates_its_keys():
    seeds = {derive_seed(a, b, c) for a in ("image", "step") for b in range(6) for c in range(6)}
    # Trailing zeros are keys like any other.
    seeds |= {derive_seed("image", b) for b in range(6)} | {derive_seed("image", b, 0, 0) for b in range(6)}
    assert len(seeds) == 2 * 6**2 + 12
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_noise_of_a_seed_does_not_depend_on_the_batch():
    alone, together = randn_of_seeds([7], (2, 3)), randn_of_seeds([5, 7, 9], (2, 3))
    for _ in range(2):
        assert torch.equal(alone(torch.empty(1, 2, 3))[0], together(torch.empty(3, 2, 3))[1])


def test_noise_of_seeds():
    draw = randn_of_seeds([1, 2], (5000,))
    first, second = draw(torch.empty(2, 5000)), draw(torch.empty(2, 5000, dtype=torch.float64))
    assert (first.dtype, second.dtype) == (torch.float32, torch.float64)
    assert_close(
        torch.corrcoef(torch.cat([first.double(), second])), torch.eye(4, dtype=torch.float64), rtol=0, atol=0.05
    )
    assert float(first.std()) == pytest.approx(1, abs=0.05)


def test_noise_of_seeds_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    randn_of_seeds([1], (4,))(torch.empty(1, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_uint8_round_trip_on_all_levels():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def test_uint8_range():
    assert from_uint8(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    # 127.4 and 127.6 grey levels: rounded, not truncated. Values outside are clamped, they do not wrap around.
    images = torch.tensor([-3.0, -0.1 / 127.5, 0.1 / 127.5, 3.0])
    assert to_uint8(images).tolist() == [0, 127, 128, 255]
