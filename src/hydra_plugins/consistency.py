"""Where Hydra looks for plugins: it takes classes of this package only."""

from consistency.sweeps import grid, launcher, search


class LocalLauncher(launcher.LocalLauncher):
    """`hydra/launcher=local`."""


class StudySweeper(grid.StudySweeper):
    """`hydra/sweeper=study`."""


class SearchSweeper(search.SearchSweeper):
    """`hydra/sweeper=search`."""
