"""Which sample of which source is drawn at which position."""
