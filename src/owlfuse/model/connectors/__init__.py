"""Connectors: features (N, P, Dv) -> visual tokens (N, Q, D).

A connector is a module built as `Connector(in_width=Dv, out_width=D, patches=P, grid=(h, w), **own
arguments)`, where the first four come from the other parts, with an attribute `tokens` that says Q.

One whose tokens are not the patches one by one may have a method `patch_shares`, features -> (N, Q,
P), that says of which patches each token is made: `owlfuse.evaluation.explain.attention` needs it.
"""
