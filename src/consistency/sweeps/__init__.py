"""Many runs by one command: which runs (a grid, variants, a search), and the launcher that carries them out."""
