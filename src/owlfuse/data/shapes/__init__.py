"""A data set of colored shapes with questions, drawn on this machine for the embedded
experiments."""
