"""Where Hydra looks for plugins: it takes classes of this package only."""

from consistency.sweeps import launcher, search, variants


class LocalLauncher(launcher.LocalLauncher):
    """`hydra/launcher=local`."""


class StudySweeper(variants.StudySweeper):
    """`hydra/sweeper=study`."""


class SearchSweeper(search.SearchSweeper):
    """`hydra/sweeper=search`."""
