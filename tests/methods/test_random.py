"""Where the random numbers of a step come from: a rank's, stratified or not, or each image's own."""

import pytest
import torch
from torch.testing import assert_close

from consistency.methods.edm import EDM
from consistency.methods.random import Random, RandomOfImages
from consistency.noise import weightings
from consistency.noise.levels import LogNormal

X = torch.zeros(6, 2, 3, 3)


def test_numbers_of_a_rank_come_from_the_global_state():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append((Random().uniform(X), Random().normal(X)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    u, z = drawn[0]
    assert (u.shape, u.dtype, z.shape, z.dtype) == ((6,), torch.float64, X.shape, torch.float32)
    assert len(set(u.tolist())) == 6


def test_strata_of_all_ranks_have_one_number_each():
    u = torch.cat([Random(strata=(rank, 4)).uniform(X) for rank in range(4)])
    assert (u * 24).floor().sort().values.tolist() == list(range(24))
    assert (u.view(4, 6)[0] * 6).floor().tolist() == list(range(6))  # a rank has all of the distribution
    again = torch.cat([Random(strata=(rank, 4)).uniform(X) for rank in range(4)])
    assert not torch.equal(u, again)
    assert (u * 24).frac().std() > 0.1  # anywhere in its stratum


def test_a_coin_knows_nothing_of_the_strata():
    x = torch.zeros(2000, 1)
    heads = Random(strata=(0, 1)).coin(x, 0.3)
    for half in (heads[:1000], heads[1000:]):  # with the strata of `uniform`, all heads would be in the first half
        assert float(half.double().mean()) == pytest.approx(0.3, abs=0.06)


def test_numbers_of_images_do_not_depend_on_the_batch():
    seeds = [11, 12, 13, 14, 15, 16]

    def numbers(seeds, x):
        random = RandomOfImages(seeds)
        return random.coin(x, 0.5), random.uniform(x), random.normal(x), random.uniform(x)

    together = numbers(seeds, X)
    torch.manual_seed(99)
    apart = [torch.cat(parts) for parts in zip(*(numbers([seed], X[:1]) for seed in seeds), strict=True)]
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)
    coin, first, z, second = together
    assert not torch.equal(first, second)
    assert z.shape == X.shape
    assert len(set(first.tolist())) == 6
    assert_close(coin.double(), (coin == 1).double())


def test_stratified_levels_cover_their_distribution_in_each_batch(fit, make_denoiser):
    spreads = {}
    for stratified in (False, True):
        method = EDM(
            make_denoiser(boundary=0.0), levels=LogNormal(), weighting=weightings.edm, optimizer=torch.optim.SGD
        )
        method.stratified = stratified
        seen, step = [], method.step
        method.step = lambda *args, seen=seen, step=step: seen.append(step(*args)) or seen[-1]
        fit(method, steps=8, batch_size=32)
        spreads[stratified] = torch.stack([s.sigma.log().mean() for s in seen]).std()
    assert spreads[True] < 0.3 * spreads[False]
