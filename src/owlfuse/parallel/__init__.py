"""Several processes: strategies, sharding, collectives and their checkpoints.

No other package names torch.distributed.
"""
