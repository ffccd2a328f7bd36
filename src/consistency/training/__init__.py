"""Callbacks. They know of a method only `denoiser`, `target`, `target_decay` and `progress`, and import none."""
