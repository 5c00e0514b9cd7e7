"""Formats: one file each, a class whose k-th item is a `Sample`. See `base.Source`."""
