"""Fusion: how visual tokens meet the LLM. See `base.Fusion` for what a fusion is."""
