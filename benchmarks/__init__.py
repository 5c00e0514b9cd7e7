"""What a choice costs: measurements that print tables, draw plots and leave Markdown and JSON.

They are no part of the package: `python -m benchmarks --help`, run in the repository.
"""
