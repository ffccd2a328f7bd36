"""The jobs behind the commands, one file each, readable from top to bottom."""
