"""Files: written in one go, read without executing anything, found again; the folder of a run, progress."""
