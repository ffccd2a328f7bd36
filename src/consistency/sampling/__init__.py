"""From noise to images: solver steps shared with distillation, and samplers as plain functions."""
