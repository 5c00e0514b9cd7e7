"""Connectors: features (N, P, Dv) -> visual tokens (N, Q, D). See `base.Connector` for what a
connector is."""
