"""One training step's mathematics, per sample: every loss is [B], never reduced over the batch."""
