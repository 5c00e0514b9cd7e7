"""Vision backbones: pixels (N, 3, H, W) -> features (N, P, Dv). See `base.Backbone` for what a
backbone is."""
