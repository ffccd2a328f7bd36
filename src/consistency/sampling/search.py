"""Search for the levels of multistep sampling (CM, Sec. 4: a greedy ternary search over time points)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

Score = Callable[[tuple[int, ...]], float]


def remembered(score: Score) -> Score:
    """`score` that is called once for each argument."""
    known: dict[tuple[int, ...], float] = {}

    def ask(points: tuple[int, ...]) -> float:
        if points not in known:
            known[points] = score(points)
        return known[points]

    return ask


def ternary_search(score: Score, left: int, right: int, points: tuple[int, ...] = ()) -> tuple[int, float]:
    """The best index that was evaluated between `left` and `right` (both excluded) as one more point beside `points`.

    Assumes that the score falls and then rises. A score that is noisy or flat can mislead the bracket, so the result is
    the best of *all* indices that were asked for, never one that was not (OpenAI's script returns such).

    Args:
        score: Sorted points -> score, smaller is better; see `remembered`.
        left: Index below the allowed ones.
        right: Index above the allowed ones; at least left + 2.
        points: Indices that are there already.

    Returns:
        (index, its score).
    """
    if right - left < 2:
        raise ValueError(f"there is no index between {left} and {right}")
    bounds, asked = (left, right), dict[int, float]()

    def ask(index: int) -> float:
        asked[index] = score(tuple(sorted((*points, index))))
        return asked[index]

    while right - left > 3:
        third = (right - left) // 3
        first, second = left + third, right - third
        if ask(first) < ask(second):
            right = second
        else:
            left = first
    for index in range(left + 1, right):
        ask(index)
    best = min(asked, key=lambda index: asked[index])
    # Downhill from there: thirds are coarse, and a noisy score may have cut the minimum off.
    while True:
        for index in (best - 1, best + 1):
            if bounds[0] < index < bounds[1]:
                ask(index)
        if (better := min(asked, key=lambda index: asked[index])) == best:
            return best, asked[best]
        best = better


def greedy_search(score: Score, num_levels: int, num_points: int, *, parts: int = 3) -> tuple[tuple[int, ...], float]:
    """Points one at a time: each is the best that `ternary_search` finds in the gaps that the earlier ones leave.

    The score need not be a valley (on digits it has a minimum at a high and one at a low level), so each gap is
    searched in several parts.

    Args:
        score: Sorted points -> score, smaller is better; indices count down from sigma_max (0) on a grid of levels.
        num_levels: Length of the grid; the ends 0 and num_levels - 1 are not points.
        num_points: How many points to look for.
        parts: Of each gap; 1 is the paper's search, which trusts the valley.

    Returns:
        (the points, their score).
    """
    points: tuple[int, ...] = ()
    for _ in range(num_points):
        found = []
        for left, right in pairwise((0, *points, num_levels - 1)):
            edges = [left + (right - left) * part // parts for part in range(parts + 1)]
            # Neighbouring parts overlap by one index, or the edges themselves would never be tried.
            brackets = [(max(left, a - 1), b) for a, b in pairwise(edges)]
            found += [ternary_search(score, a, b, points) for a, b in brackets if b - a >= 2]
        best, _ = min(found, key=lambda pair: pair[1])
        points = tuple(sorted((*points, best)))
    return points, score(points)
