"""Distances between sets of images. The distance d(x, y) of the loss is a `metric`; this is `evaluation`."""
