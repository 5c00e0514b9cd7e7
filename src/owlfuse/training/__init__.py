"""Training: the module, its optimizers and callbacks, and the checkpoints of a run."""
