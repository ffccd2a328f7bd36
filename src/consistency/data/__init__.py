"""Data sets of uint8 images, and the order in which training sees them."""
