"""`owlfuse ablate` and `owlfuse report`: a grid of runs, and what it says."""
