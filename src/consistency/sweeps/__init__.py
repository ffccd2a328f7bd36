"""Many runs by one command: which runs (sweepers), and how they are carried out (the launcher)."""
