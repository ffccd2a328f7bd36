import pytest

from consistency.sampling.search import greedy_search, remembered, ternary_search


class Counted:
    """A score of one point with its minimum at `best`; remembers what it was asked."""

    def __init__(self, best, bumps=None):
        self.best, self.bumps, self.asked = best, bumps or {}, []

    def __call__(self, points):
        self.asked.append(points)
        return sum(abs(point - self.best) + self.bumps.get(point, 0) for point in points)


@pytest.mark.parametrize("best", range(1, 39))
def test_finds_every_minimum_of_a_valley(best):
    score = Counted(best)
    assert ternary_search(score, 0, 39) == (best, 0)
    assert len(set(score.asked)) < 25


@pytest.mark.parametrize(("left", "right"), [(0, 2), (0, 3), (4, 7)])
def test_narrow_gaps(left, right):
    index, _ = ternary_search(Counted(left + 1), left, right)
    assert index == left + 1


def test_no_gap_is_refused():
    with pytest.raises(ValueError, match="no index between 3 and 4"):
        ternary_search(Counted(0), 3, 4)


def test_result_was_evaluated_and_is_the_best_of_those_that_were():
    # A bump misleads the bracket away from the minimum at 10.
    score = Counted(10, bumps={13: 100})
    index, value = ternary_search(score, 0, 39)
    assert (index,) in score.asked
    assert value == min(score((point,)) for (point,) in list(score.asked))


def test_same_point_is_measured_once():
    score = Counted(5)
    ask = remembered(score)
    for _ in range(3):
        ask((1,))
        ask((2,))
    assert score.asked == [(1,), (2,)]


# The scan of digits_ict (levels 1 to 38 of 40): two valleys, at 11 and, deeper, at 28.
SCAN = (
    *(7.56, 7.41, 7.25, 7.12, 6.99, 6.86, 6.76, 6.68, 6.62, 6.57, 6.56, 6.57, 6.61),
    *(6.70, 6.82, 6.99, 7.22, 7.45, 7.65, 7.85, 7.97, 7.98, 7.83, 7.55, 7.13, 6.68),
    *(6.39, 6.32, 6.43, 6.63, 6.88, 7.13, 7.39, 7.62, 7.80, 7.94, 8.02, 8.07),
)


def test_two_valleys():
    def score(points):
        return SCAN[points[0] - 1]

    assert greedy_search(score, 40, 1, parts=1)[0] == (11,)
    assert greedy_search(score, 40, 1)[0] == (28,)


@pytest.mark.parametrize("best", range(1, 39))
def test_parts_miss_no_index(best):
    assert greedy_search(lambda points: float(points != (best,)), 40, 1, parts=13)[0] == (best,)


def test_greedy_adds_points_one_at_a_time():
    wanted = (8, 20)

    def score(points):
        # Each wanted level that has a point near it helps.
        return sum(min(abs(point - level) for point in points) for level in wanted)

    points, value = greedy_search(remembered(score), 40, 2)
    assert len(points) == 2
    assert points == tuple(sorted(points))
    assert value == score(points)
    assert value < min(score((point,)) for point in range(1, 39))
