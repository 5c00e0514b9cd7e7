"""Several runs with one question: sweeps, recipes and ablations."""
