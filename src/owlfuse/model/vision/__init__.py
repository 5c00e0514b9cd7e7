"""Vision backbones: pixels (N, 3, H, W) -> features (N, P, Dv)."""
