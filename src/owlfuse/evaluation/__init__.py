"""How good a model is: validation, questions, benchmarks, and where its answers look."""
