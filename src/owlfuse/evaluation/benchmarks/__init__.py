"""Benchmarks in their own published formats, scored by their own rules: `owlfuse eval MODEL
task=<name>`.

A benchmark is a subclass of `base.Task` in a file of its own and a yaml in configs/task/.
"""
