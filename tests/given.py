"""Noise levels of a step that a test chooses: `levels=AsGiven("pair")` with the fixture `fixed_random`."""


class AsGiven:
    """Levels that are what `random.uniform` gives: sigma, or the pair (sigma_lo, sigma_hi)."""

    def __init__(self, gives):
        self.gives = gives

    def __call__(self, k, u):
        return u

    def describe(self, k):
        return {"num_levels": 18}
