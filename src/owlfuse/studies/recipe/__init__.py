"""`owlfuse recipe`: stages in order, each from the weights of the one before."""
